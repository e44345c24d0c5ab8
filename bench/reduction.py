"""Measures how much of the reduction of gradients and of the update of weights runs under the passes.

`python -m bench.reduction` prints a line for each link speed. Four ranks run schedules of two
directions. Schedule, interpreter, optimizer and collectives are those of training. Sleeps emulate computation and the
time that bytes take on a link, so that few cores can run all ranks. Steps that reduce after all passes and complete
the update before the next step alternate with those of training. Of all rounds the shortest counts, because other
work only makes a step longer.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import distributed as dist

from bench.measure import COSTS
from comm.config import ParallelismConfig
from dualpipe.builder import build_schedule
from dualpipe.costs import uniform
from dualpipe.ir import Schedule
from model.stage import StageRun
from tests.ranks import run_ranks
from tests.tiny import BATCH, MODEL, OPTIM, tiny_config, write_text
from tests.train.job import close_job, open_job, open_loader, sequential_step
from train.config import PrecisionConfig, TrainConfig
from train.core.learner import Learner
from train.core.step import train_step
from train.optim.zero1 import Zero1AdamW

NUM_RANKS, NUM_MICRO_BATCHES = 4, 8
NUM_ROUNDS, NUM_STEPS = 4, 2
KINDS = (("dualpipe_split", 1), ("dualpipe_interleaved", 2))
"""Schedules, with their chunks."""
PHASE_SECONDS = 0.03
"""Time of the forward, the backward for inputs, or the backward for weights of one phase."""
SHARES = (0.0, 0.1, 0.2)
"""Times of all reductions and gathers of a rank, relative to that of its computation."""


def _overlapped_step(learner: Learner, config: TrainConfig, loader: Any, step: int) -> float:
    return train_step(learner, config.task, loader, step).grad_norm


WAYS = {"after": sequential_step, "under": _overlapped_step}


def measure(rank: int, world_size: int, config: TrainConfig, schedule: Schedule) -> list[dict[str, list[float]]]:
    """Returns the seconds of a step in each round, for each of `SHARES`, by the way of reducing."""
    learner, loader = open_job(config, schedule), open_loader(config)
    found: list[dict[str, list[float]]] = [{name: [] for name in WAYS} for _ in SHARES]
    with _slow_phases():
        for number in range(NUM_ROUNDS + 1):
            for share, times in zip(SHARES, found, strict=True):
                for name, run_step in WAYS.items():
                    with _slow_links(learner, share):
                        seconds = _time(learner, config, loader, run_step)
                    times[name] += [seconds] if number else []
    close_job(learner)
    return found


def _time(learner: Learner, config: TrainConfig, loader: Any, run_step: Callable[..., float]) -> float:
    """Returns the seconds of a step: those of several consecutive steps of all ranks, divided by their number."""
    dist.barrier()
    begun = time.perf_counter()
    for step in range(NUM_STEPS):
        run_step(learner, config, loader, step)
    learner.replica.weight_updates.wait_all()
    dist.barrier()
    return (time.perf_counter() - begun) / NUM_STEPS


def _slow_phases() -> ExitStack:
    """Makes every computation of this process longer by `PHASE_SECONDS`."""
    stack = ExitStack()
    for name in ("forward", "backward", "weight"):
        stack.enter_context(patch.object(StageRun, name, _delayed(getattr(StageRun, name), lambda *_: PHASE_SECONDS)))
    return stack


def _slow_links(learner: Learner, share: float) -> ExitStack:
    """Makes reductions and updates longer. Together they take `share` of the time of a rank's computation."""
    total = sum(parameter.numel() for parameter in learner.replica.network.parameters())
    # Every stage of a rank runs half of the micro-batches.
    phases = sum(len(stage.lanes) for stage in learner.replica.stages.values()) * NUM_MICRO_BATCHES / 2
    seconds = share * 3 * phases * PHASE_SECONDS

    def of_unit(unit: Zero1AdamW, part: float) -> float:
        return part * seconds * sum(each.numel() for each in unit._parameters) / total

    stack = ExitStack()
    # A gather sends bf16, half as many bytes as a reduction.
    for name, part in (("reduce", 2 / 3), ("update", 1 / 3)):
        plain = getattr(Zero1AdamW, name)
        slow = _delayed(plain, lambda unit, *_, part=part: of_unit(unit, part))
        stack.enter_context(patch.object(Zero1AdamW, name, slow))
    return stack


def _delayed(plain: Callable[..., Any], seconds: Callable[..., float]) -> Callable[..., Any]:
    def slow(*arguments: Any) -> Any:
        result = plain(*arguments)
        time.sleep(seconds(*arguments))
        return result

    return slow


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="reduction-") as name:
        folder = Path(name)
        write_text(folder)
        for kind, chunks in KINDS:
            num_layers = NUM_RANKS * max(chunks for _, chunks in KINDS)
            config = tiny_config(
                folder,
                parallelism=ParallelismConfig(pipeline=NUM_RANKS, data=1, expert=1),
                batch=replace(BATCH, sequence_length_tokens=12, global_sequences=NUM_MICRO_BATCHES),
                model=replace(MODEL, num_layers=num_layers, num_dense_layers=num_layers, mtp_depth=0),
                precision=PrecisionConfig(kind="bf16"),
                optim=replace(OPTIM, sharding="zero1"),
            )
            schedule = build_schedule(kind, NUM_RANKS, NUM_MICRO_BATCHES, uniform(COSTS, NUM_RANKS, NUM_RANKS * chunks))
            ranks = run_ranks(NUM_RANKS, measure, config, schedule, timeout_seconds=900)
            print(f"{kind}, chunks: {chunks}")
            _print(ranks)
    return 0


def _print(ranks: list[list[dict[str, list[float]]]]) -> None:
    shortest = [
        {way: min(max(each) for each in zip(*(rank[index][way] for rank in ranks), strict=True)) for way in WAYS}
        for index in range(len(SHARES))
    ]
    for share, seconds in zip(SHARES, shortest, strict=True):
        added = {way: seconds[way] - shortest[0][way] for way in WAYS}
        hidden = f", {100 * (1 - added['under'] / added['after']):.0f} % hidden" if share else ""
        print(
            f"reductions and updates of {100 * share:.0f} % of the computation: after the passes "
            f"{1e3 * seconds['after']:.0f} ms a step, under them {1e3 * seconds['under']:.0f} ms, "
            f"ratio {seconds['under'] / seconds['after']:.3f}{hidden}",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
