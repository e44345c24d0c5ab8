"""Tests the metrics of a step: MFU from the model's FLOPs, and equal values of wandb offline and online."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest

from launch.config.run_config import compose_run
from tests.tiny import MODEL, tiny_config
from train.records.metrics import Wandb, mfu


def test_mfu_of_deepseek_v3_is_what_its_report_implies() -> None:
    """2.788M H800 hours, 2,664K of them for 14.8T tokens: 1,543 tokens a second and GPU (section 1)."""
    choices = ["model=v3_671b", "parallelism=v3_2048_ranks", "cluster=h800", "batch.sequence_length_tokens=4096"]
    config = compose_run(choices)
    tokens_per_second = 14.8e12 / (2664e3 * 3600) * 2048
    assert config.cluster.peak_flops is not None
    peak = config.cluster.peak_flops * config.parallelism.world_size
    assert mfu(config.model, 4096, tokens_per_second, peak) == {"mfu": pytest.approx(0.39, abs=0.003)}


def test_mfu_is_left_out_if_the_peak_is_unknown() -> None:
    assert mfu(MODEL, 24, 1000.0, None) == {}
    assert mfu(MODEL, 24, 2000.0, 1e9)["mfu"] == 2 * mfu(MODEL, 24, 1000.0, 1e9)["mfu"] > 0


def test_wandb_receives_the_same_record_offline_and_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: dict[str, list[tuple[dict[str, Any], int]]] = {}

    def init(*, mode: str, **_: object) -> object:
        def log(values: dict[str, Any], step: int) -> None:
            logged.setdefault(mode, []).append((values, step))

        return SimpleNamespace(config={}, log=log, finish=lambda: None)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Settings=lambda **_: None))
    modes: tuple[Literal["offline", "online"], ...] = ("offline", "online")
    for mode in modes:
        run = Wandb(replace(tiny_config(tmp_path).track, wandb=mode), "tiny", tmp_path, {})
        for step in (1, 2):
            run.record({"step": step, "loss": 1.5 / step, "router": {"layer_1": {"bias_most": 0.1}}})
        run.close()
    assert logged["offline"] == logged["online"]
    assert [step for _, step in logged["online"]] == [1, 2]
