"""Counts the collectives of a training step by group and name, and the reads that make a host wait for its device.

Four gloo ranks run the second step of a small model and its record. A transfer of the pipeline counts as a collective
of its link, and a phase, such as the update of a stage, as one. Reads are those of the main thread, by line of source;
the plan of each exchange is read on the lane, once for a layer and micro-batch. On a CPU all numbers are on the host,
so lines that would read a CUDA device are known by their remark `host sync`. Copies by `cpu` and `tolist` leave no
trace on a CPU: each sum over the world has one, and the losses' sums have one.
"""

import linecache
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from comm.config import ParallelismConfig
from comm.watchdog.collective_log import Collective, CollectiveLog
from dualpipe.registry import ScheduleConfig
from tests import ROOT
from tests.host_reads import Reads
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader
from train.config import TrainConfig
from train.core.step import train_step
from train.records.step_record import PipelineTimeline, record_of

NUM_RANKS = 4

StepCalls = tuple[dict[tuple[str, str], int], dict[str, int]]
"""Collectives by kind of group and name, and reads of the main thread by line of source."""


class _Lines(Reads):
    """Counts each read by the line of this project that causes it."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = len(self.found)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if len(self.found) > before:
            frame = sys._getframe(1)
            while not _is_source(frame.f_code.co_filename) and frame.f_back is not None:
                frame = frame.f_back
            path, number = frame.f_code.co_filename, frame.f_lineno
            remark = "host sync" if "host sync" in linecache.getline(path, number) else "of the host"
            self.lines[f"{remark}: {Path(path).relative_to(ROOT)}:{number}"] += 1
        return result


def _is_source(path: str) -> bool:
    return any(
        path.startswith(f"{ROOT}/{folder}/") for folder in ("comm", "data", "dualpipe", "kernels", "model", "train")
    )


def _second_step(rank: int, world_size: int, config: TrainConfig) -> StepCalls:
    learner, loader = open_job(config), open_loader(config)
    timeline = PipelineTimeline(learner.world, config.name, Path(config.out_dir))
    calls: Counter[tuple[str, str]] = Counter()
    start = CollectiveLog.start

    def counted(log: CollectiveLog, group: str, *arguments: Any, **keywords: Any) -> Collective:
        collective = start(log, group, *arguments, **keywords)
        calls[group.partition(" ")[0], collective.name] += 1
        return collective

    for step in range(2):
        calls.clear()
        reads = _Lines()
        with mock.patch.object(CollectiveLog, "start", counted), reads:
            result = train_step(learner, config.task, loader, step)
            record_of(learner.replica, timeline, step + 1, result, None)
    close_job(learner)
    return dict(calls), dict(reads.lines)


def measure_collectives() -> StepCalls:
    """Counts what the first of four ranks calls in a step: two stages, two ranks of experts, eight micro-batches."""
    with tempfile.TemporaryDirectory(prefix="collectives-") as name:
        folder = Path(name)
        write_text(folder)
        config = tiny_config(
            folder,
            parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
            schedule=ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped"),
            batch=replace(BATCH, global_sequences=16),
            model=replace(MODEL, num_layers=4),
        )
        calls: StepCalls = run_ranks(NUM_RANKS, _second_step, config)[0]
    return calls


def collectives_text(calls: StepCalls) -> str:
    """Formats a line for each group and name, those of the world first, then the reads."""
    collectives, reads = calls
    ordered = sorted(collectives.items(), key=lambda item: (item[0][0] != "world", item[0]))
    lines = [f"Collectives of rank 0 in a step of {NUM_RANKS} ranks, and reads of its main thread", ""]
    lines += [f"{group:24}{name:28}{count:>6}" for (group, name), count in ordered]
    lines += [f"{name:52}{count:>6}" for name, count in sorted(reads.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    print(collectives_text(measure_collectives()))
