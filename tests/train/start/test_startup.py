"""The comparison of ranks at the start, callbacks of a run, and which ranks hold the same parameters."""

import json
import os
import subprocess
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import distributed as dist

from comm.config import ParallelismConfig
from data.prepare import prepare
from dualpipe.ir import Placement, Schedule, ScheduleError, mirrored_placement, straight_placement, v_placement
from dualpipe.validate import embedding_ranks, is_mirrored
from tests.commands import run_command
from tests.ports import reserved_port
from tests.ranks import run_ranks
from tests.tiny import BATCH, CHECKPOINTING, TASK, VALIDATION, tiny_config, write_text
from tests.train.job import close_job, open_job
from train.callbacks import Callbacks
from train.config import TrainConfig
from train.core.learner import LearnersByBatchSize
from train.errors import CallbackError
from train.files.json_lines import JsonLines
from train.files.run_files import StatusFile
from train.loop import TrainingLoop
from train.records.reporter import Reporter
from train.start import startup
from train.start.startup import compare_ranks


def compared(rank: int, world_size: int, configs: list[TrainConfig], versions: list[str]) -> str:
    """Compares the configurations of ranks, each a node, which claim to have these versions of torch."""
    kept, version = dict(os.environ), startup.version  # type: ignore[attr-defined]
    os.environ |= {"GROUP_RANK": str(rank), "MY_API_KEY": "abc0123456789"}
    startup.version = lambda name: versions[rank] if name == "torch" else version(name)  # type: ignore[assignment, attr-defined]
    try:
        return compare_ranks(configs[rank])
    finally:
        os.environ.clear()
        os.environ.update(kept)
        startup.version = version  # type: ignore[attr-defined]


def test_ranks_that_differ_name_nodes_keys_and_values(tmp_path: Path) -> None:
    first = tiny_config(tmp_path)
    optim = replace(first.optim, learning_rate=0.5)
    # A name that holds a secret of the environment is hidden.
    second = replace(first, optim=optim, seed=8, name="abc0123456789", out_dir="")
    texts = run_ranks(3, compared, [first, second, first], ["1", "1", "2"])
    assert len(set(texts)) == 1
    assert "rank 0 on node 0 (" in texts[0]
    assert "rank 1 on node 1 (" in texts[0]
    assert "rank 2 on node 2 (" in texts[0]
    for part in ("seed is 8 instead of 7", "optim.learning_rate is 0.5 instead of 0.01", 'name is "***"'):
        assert part in texts[0]
    assert "version of torch is 2 instead of 1" in texts[0]
    assert "2 of 3 ranks differ" in texts[0]
    assert "abc0123456789" not in texts[0]
    assert "out_dir" not in texts[0]


def test_ranks_that_are_equal_may_leave_out_dir_to_rank_0(tmp_path: Path) -> None:
    first = tiny_config(tmp_path)
    assert run_ranks(2, compared, [first, replace(first, out_dir="")], ["1", "1"]) == ["", ""]
    (text, _) = run_ranks(2, compared, [first, replace(first, out_dir="/elsewhere")], ["1", "1"])
    assert f"out_dir is /elsewhere instead of {first.out_dir}" in text


def test_identity_holds_every_key_as_on_the_command_line_and_the_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path)
    identity = startup.identity_of(config)
    assert identity["data.paths"] == f'["{tmp_path / "text"}"]'
    assert {"data.kind", "task.steps", "model.vocab_size", "cluster.timeout_seconds"} <= identity.keys()
    for name in startup._SOURCES:
        (tmp_path / name).mkdir()
    monkeypatch.setattr(startup, "_ROOT", tmp_path)
    digests = [startup.identity_of(config)["sources"]]
    (tmp_path / "model" / "head.py").write_text("a = 1\n")
    digests.append(startup.identity_of(config)["sources"])
    assert len({identity["sources"], *digests}) == 3


@pytest.mark.slow
def test_two_nodes_with_different_overrides_end_with_code_2_before_a_step(tmp_path: Path) -> None:
    """Two commands, as another launcher starts them on two nodes."""
    write_text(tmp_path)
    job = [
        *("cluster=laptop", "model=tiny", "data=files", f"data.paths=[{tmp_path / 'text'}]", "samples.prompt="),
        *(f"data.cache_dir={tmp_path / 'cache'}", "data.tokenizer_vocab_size=320", "data.validation_fraction=0.2"),
        *("validation.sequences=0", "batch.sequence_length_tokens=32", f"out_dir={tmp_path / 'run'}", "task.steps=2"),
    ]

    def start(node: int, rate: float, port: int) -> subprocess.CompletedProcess[str]:
        names = {"RANK": node, "GROUP_RANK": node, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "none"}
        environment = {**os.environ, **{name: str(value) for name, value in names.items()}, **address}
        return run_command(["-m", "launch.train", *job, f"optim.learning_rate={rate}"], env=environment)

    with reserved_port() as port, ThreadPoolExecutor(2) as pool:
        nodes = list(pool.map(start, range(2), (0.001, 0.002), (port, port)))
    for node in nodes:
        output = node.stdout + node.stderr
        assert node.returncode == 2, output
        assert "optim.learning_rate is 0.002 instead of 0.001" in output
        assert "on node 1 (" in output
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    assert '"exit_code": 2' in (tmp_path / "run" / "status.json").read_text()


Call = tuple[str, int]


def config_of(folder: Path, name: str) -> TrainConfig:
    """Four steps on two ranks; a validation and a checkpoint after two of them."""
    return tiny_config(
        folder,
        out_dir=str(folder / name),
        parallelism=ParallelismConfig(pipeline=1, data=2, expert=2),
        batch=replace(BATCH, global_sequences=2),
        task=replace(TASK, steps=4),
        validation=replace(VALIDATION, every_steps=2, sequences=2),
        checkpointing=replace(CHECKPOINTING, every_steps=2),
    )


def run(rank: int, world_size: int, config: TrainConfig, fails: Call | None) -> tuple[list[Call], list[Any], str]:
    """The calls and records that this rank saw, and the error that ended its run."""
    calls: list[Call] = []
    records: list[Any] = []

    def note(name: str, step: int) -> None:
        calls.append((name, step))
        if (name, step) == fails:
            raise ValueError("too\nbad")

    def on_step(record: Mapping[str, Any]) -> None:
        records.append(dict(record))
        note("on_step", record["step"])

    def on_checkpoint(step: int, folder: Path) -> None:
        assert (folder / "manifest.json").is_file()
        note("on_checkpoint", step)

    out_dir, learner = Path(config.out_dir), open_job(config)
    out_dir.mkdir(exist_ok=True)
    reporter = Reporter(None, [JsonLines(out_dir / "metrics.jsonl", 0)] if rank == 0 else [])
    callbacks = Callbacks(
        on_step=on_step, on_validation=lambda step, loss: note("on_validation", step), on_checkpoint=on_checkpoint
    )
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    learners, status = LearnersByBatchSize(learner, config.batch_sizes, {}), StatusFile(out_dir, is_writer=rank == 0)
    error = ""
    try:
        TrainingLoop(config, learners, prepared, reporter, status, 0, callbacks).run()
    except CallbackError as failure:
        error = str(failure)
    reporter.close()
    dist.barrier()
    close_job(learner)
    return calls, records, error


@pytest.mark.slow
def test_callbacks_are_called_on_rank_0_with_the_recorded_values(folder: Path) -> None:
    config = config_of(folder, "whole")
    (calls, records, error), other = run_ranks(2, run, config, None)
    assert other == ([], [], "")
    assert error == ""
    assert [step for name, step in calls if name == "on_step"] == [1, 2, 3, 4]
    assert [step for name, step in calls if name == "on_validation"] == [2, 4]
    assert [step for name, step in calls if name == "on_checkpoint"] == [2, 4]
    assert calls.index(("on_validation", 2)) < calls.index(("on_step", 2))
    lines = (Path(config.out_dir) / "metrics.jsonl").read_text().splitlines()
    assert records == [json.loads(line) for line in lines]
    assert [("validation_loss" in record) for record in records] == [False, True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize("fails", [("on_step", 3), ("on_validation", 2), ("on_checkpoint", 2)])
def test_callback_that_fails_ends_the_run_on_all_ranks(folder: Path, fails: Call) -> None:
    name, _ = fails
    config = config_of(folder, f"failed_{name}")
    (calls, _, error), (_, _, other) = run_ranks(2, run, config, fails)
    assert error == f"{name}: ValueError: too\nbad"
    assert other == error
    assert fails in calls
    saved = {each.name for each in (Path(config.out_dir) / "checkpoints").glob("*")}
    if name == "on_checkpoint":  # in which step it becomes whole depends on the disk
        assert "step-00000002" in saved
    else:
        assert ("on_step", 4) not in calls
        # A checkpoint that was being written is whole.
        assert saved == (set() if name == "on_validation" else {"step-00000002"})


def placed(placement: Placement, num_ranks: int) -> Schedule:
    return Schedule(kind="any", num_ranks=num_ranks, num_micro_batches=2, placement=placement, ranks=((),) * num_ranks)


@pytest.mark.parametrize("num_ranks", range(1, 6))
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_mirror_pairs_hold_the_same_stages_for_any_number_of_chunks(num_ranks: int, chunks: int) -> None:
    schedule = placed(mirrored_placement(num_ranks, chunks), num_ranks)
    assert is_mirrored(schedule)
    held = [{stage for _, stage in schedule.stages_of(rank)} for rank in range(num_ranks)]
    assert held == held[::-1]
    assert not is_mirrored(placed(straight_placement(num_ranks, chunks), num_ranks))


@pytest.mark.parametrize("up", [(0, 1, 2), (1, 0, 2), (2, 0, 1)])
def test_is_mirrored_rejects_directions_that_share_stages_otherwise(up: tuple[int, ...]) -> None:
    with pytest.raises(ScheduleError, match="rank P-1-r"):
        is_mirrored(placed(((0, 1, 2), up), 3))


@pytest.mark.parametrize(
    ("placement", "num_ranks", "without_mtp", "with_mtp"),
    [
        (straight_placement(1), 1, (0,), (0,)),
        (straight_placement(4), 4, (0,), (0, 3)),
        (straight_placement(4, 2), 4, (0,), (0, 3)),
        (v_placement(4), 4, (0,), (0,)),
        (mirrored_placement(4), 4, (0, 3), (0, 3)),
        (mirrored_placement(3, 2), 3, (0, 2), (0, 2)),
        (((1, 0, 2, 3), (2, 3, 1, 0)), 4, (1, 2), (0, 1, 2, 3)),
    ],
)
def test_embedding_is_on_the_first_stage_and_with_mtp_on_the_last(
    placement: Placement, num_ranks: int, without_mtp: tuple[int, ...], with_mtp: tuple[int, ...]
) -> None:
    schedule = placed(placement, num_ranks)
    assert embedding_ranks(schedule, 0) == without_mtp
    assert embedding_ranks(schedule, 2) == with_mtp
