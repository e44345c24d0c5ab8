"""All ranks follow the schedule that rank 0 decided on: as named, as begun, or the best for what was measured."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.config import ParallelismConfig
from comm.layout import Layout
from dualpipe.config import ScheduleConfig
from dualpipe.ir import from_json, to_json
from dualpipe.registry import build
from dualpipe.validate import validate
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from train.checkpoint.manifest import SCHEDULE_NAME, write_manifest
from train.config import TrainConfig
from train.schedule.plan import plan


def config_of(folder: Path, kind: str, **changes: Any) -> TrainConfig:
    """Two pipeline ranks."""
    parallelism = ParallelismConfig(pipeline=2, data=1, expert=1)
    schedule = ScheduleConfig(kind=kind, chunks=None, pairing="overlapped")
    return tiny_config(folder, parallelism=parallelism, schedule=schedule, **changes)


def _planned(rank: int, world_size: int, config: TrainConfig) -> tuple[str, str]:
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    found = plan(config, layout, torch.device("cpu"))
    validate(found.schedule, config.memory_cap)
    return to_json(found.schedule), found.reason


@pytest.mark.parametrize("kind", ["dualpipe_split", "auto"])
def test_plan_is_the_same_on_every_rank(kind: str, tmp_path: Path) -> None:
    first, second = run_ranks(2, _planned, config_of(tmp_path, kind))
    assert first == second
    assert ("the configured one" in first[1]) == (kind != "auto")


@pytest.mark.slow
def test_plan_under_auto_keeps_the_cap(tmp_path: Path) -> None:
    """2 of model/P rule out the published DualPipe, which keeps 3."""
    (text, reason), _ = run_ranks(2, _planned, config_of(tmp_path, "auto", memory_cap=2.0))
    assert from_json(text).kind != "dualpipe"
    assert "of the 2 allowed" in reason


def test_plan_reuses_the_schedule_of_the_checkpoint(tmp_path: Path) -> None:
    """Another order would sum gradients in another order: a resumed run would no longer be bitwise the same."""
    config = config_of(tmp_path, "auto")
    begun = build("dualpipe", 2, config.num_micro_batches)
    folder = tmp_path / "run" / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / SCHEDULE_NAME).write_text(to_json(begun))
    write_manifest(folder, 1, config, "f00d")
    resumed = replace(config, resume=str(tmp_path / "run"))
    for text, reason in run_ranks(2, _planned, resumed):
        assert from_json(text) == begun
        assert "step-00000001" in reason
    other = replace(resumed, schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"))
    for _, reason in run_ranks(2, _planned, other):
        assert reason == "the configured one"
