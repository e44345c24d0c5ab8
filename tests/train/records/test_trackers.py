"""Tests of trackers: how many series they get, that readers of theirs find them, and that a run has one id."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.request import urlopen

import pytest

from tests.tiny import tiny_config
from train.config import TrackConfig
from train.records.reporter import Reporter
from train.records.trackers import Prometheus, TensorBoard, Wandb, series, split_address

_TOP = (
    "loss main_loss mtp_loss balance_loss validation_loss validation_bits_per_byte grad_norm lr mtp_loss_weight tokens"
)
_TOP += " bias_update_rate global_batch_sequences step_seconds tokens_per_second mfu pipeline_bubble peak_memory_bytes"
_TOP += " mean_peak_memory_bytes max_violation nodes_per_token inter_node_bytes intra_node_bytes lower_bound_share"
_TOP += " nic_imbalance clipped_tokens"
_PARTS = "compute exposed_exchange bubble optimizer other saving"


def record_of(step: int, num_layers: int) -> dict[str, Any]:
    """A record with the keys of a run with `num_layers` layers of experts, whose layer n has the numbers n."""
    layers = range(3, 3 + num_layers)
    router = ("max_violation", "bias_least", "bias_most", "bias_std")
    exchange = ("rows_within_nodes", "rows_across_nodes", "bytes_within_nodes", "nodes_per_token", "nic_imbalance")
    return {
        **dict.fromkeys(_TOP.split(), 0.5),
        "step": step,
        "step_time": {f"{name}_seconds": 0.5 for name in _PARTS.split()},
        "router": {f"layer_{layer}": dict.fromkeys(router, float(layer)) for layer in layers},
        "exchange": {f"layer_{layer}": dict.fromkeys(exchange, layer) for layer in layers},
    }


@pytest.fixture
def track(tmp_path: Path) -> TrackConfig:
    return tiny_config(tmp_path).track


def test_default_series_are_few_at_any_depth_and_every_layer_is_a_group_on_request() -> None:
    few = series(record_of(1, 3), layers=False)
    assert len(few) <= 40
    assert few.keys() == series(record_of(1, 58), layers=False).keys()
    assert (few["router/max_violation_mean"], few["router/max_violation_max"]) == (4.0, 5.0)
    assert {"loss/main_loss", "time/bubble_seconds", "validation/loss", "optimizer/lr"} <= few.keys()
    every = series(record_of(1, 58), layers=True)
    assert len(every) == len(few) + 58 * 9
    assert every["layer_03/router_bias_std"] == 3.0
    plugin = {"step": 1, "bits": 2, "name": "text", "rollouts": {"reward": 1.0, "parts": {"exact": 0.5}}}
    expected = {"metrics/bits": 2.0, "rollouts/reward": 1.0, "rollouts/parts.exact": 0.5}
    assert series(plugin, layers=True) == expected


def test_wandb_has_one_id_over_attempts_and_gets_entity_and_tags(
    tmp_path: Path, track: TrackConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[dict[str, Any]] = []

    def init(**options: Any) -> object:
        starts.append(options)
        return SimpleNamespace(config=SimpleNamespace(update=lambda *_, **__: None))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **_: None))
    config = replace(track, wandb="online", entity="lab", tags=("a", "b"))
    for folder in ("run", "run", "other"):
        (tmp_path / folder).mkdir(exist_ok=True)
        Wandb(config, "tiny", tmp_path / folder, {})
    first, requeued, other = (start["id"] for start in starts)
    assert first == requeued != other
    assert (starts[0]["entity"], starts[0]["tags"], starts[0]["resume"]) == ("lab", ["a", "b"], "allow")


def test_tensorboards_reader_finds_the_series_and_repeated_steps_once(tmp_path: Path, track: TrackConfig) -> None:
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name, reason="the extra tensorboard is not installed")
    writer = TensorBoard(track, tmp_path, 0)
    for step in (1, 2, 3):
        writer.record(record_of(step, 3))
    writer.roll_back(1)
    writer.record({**record_of(2, 3), "loss": 7.0})
    writer.close()
    reader = events.EventAccumulator(str(tmp_path / "tensorboard"))
    reader.Reload()
    assert set(reader.Tags()["scalars"]) == series(record_of(1, 3), layers=False).keys()
    assert [(event.step, event.value) for event in reader.Scalars("loss/loss")] == [(1, 0.5), (2, 7.0)]


def test_prometheus_reads_a_file_and_a_port(tmp_path: Path) -> None:
    assert split_address("0.0.0.0:9400") == ("0.0.0.0", 9400)
    assert split_address("metrics/train.prom") is None
    file = Prometheus(f"{tmp_path}/train.prom", "tiny")
    port = Prometheus("127.0.0.1:0", "tiny")
    for tracker in (file, port):
        tracker.record(record_of(4, 3))
    lines = (tmp_path / "train.prom").read_text().splitlines()
    assert 'train_step{run="tiny"} 4.0' in lines
    assert 'train_router_max_violation_max{run="tiny"} 5.0' in lines
    with urlopen(f"http://127.0.0.1:{port._server.server_port}/metrics") as answer:
        assert answer.read().decode().splitlines() == lines
    for tracker in (file, port):
        tracker.close()


def test_a_report_is_drawn_again_after_its_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[float] = []
    now = [0.0]
    monkeypatch.setattr("train.records.reporter.time", SimpleNamespace(monotonic=lambda: now[0]))
    report: Any = SimpleNamespace(try_to_write=lambda: drawn.append(now[0]))
    balance: Any = None
    reporter = Reporter(None, [], None, report, 60.0)
    for seconds in (0.0, 59.0, 60.0, 119.0, 121.0):
        now[0] = seconds
        reporter.record({"step": 1}, balance)
    assert drawn == [60.0, 121.0]
