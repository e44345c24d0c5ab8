"""Measures the cost of the guard on one rank: `python -m bench.guard [OVERRIDE...]`.

Overrides are those of `conf/train.yaml`. The guard needs no additional exchange: it checks sums that a step computes
anyway, and one of them carries the preemption request. Its cost is the norm of a rank's gradients and the check, in CPU
time relative to the step's.
"""

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from launch.config.run import compose_run
from tests.train.job import close_job, open_job
from train.core.guard import Guard
from train.core.step import train_step
from train.optim import staged
from train.start.corpus import prepare_corpus

CHOICES = ("parallelism=one_rank", "guard=skip", "guard.spike_factor=10", "validation.sequences=0")


@dataclass(slots=True)
class Cost:
    """Cost in CPU seconds."""

    guard: float = 0.0
    step: float = 0.0


def measure(overrides: Sequence[str], num_steps: int) -> Cost:
    """Measures steps after a first one. Needs a process group of one rank."""
    from data.loader import Loader

    config = compose_run([*CHOICES, *overrides])
    prepared = prepare_corpus(config)
    learner = open_job(config)
    loader = Loader(prepared, sizes=config.batch_sizes)
    cost, plain_norm, plain_judge = Cost(), staged.local_norm, Guard.judge
    guard = Guard(replace(config.guard, spike_factor=1e9), [(1.0, 1.0)] * config.guard.spike_window_steps)

    def timed(call: Any) -> Any:
        def measured(*arguments: Any) -> Any:
            begun = time.process_time()
            result = call(*arguments)
            cost.guard += time.process_time() - begun
            return result

        return measured

    staged.local_norm, Guard.judge = timed(plain_norm), timed(plain_judge)  # type: ignore[method-assign]
    try:
        for number in range(num_steps + 1):
            begun = time.process_time()
            train_step(learner, config.task, loader, number, guard)
            cost.step += time.process_time() - begun
            if number == 0:
                cost.guard = cost.step = 0.0
    finally:
        staged.local_norm, Guard.judge = plain_norm, plain_judge  # type: ignore[method-assign]
    close_job(learner)
    return cost


def main(overrides: Sequence[str]) -> int:
    """Measures and prints the cost."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(str(Path(folder) / "store"), 1)  # type: ignore[attr-defined]
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        cost = measure(overrides, 5)
        dist.destroy_process_group()
    print(
        f"guard {1e3 * cost.guard / 5:.2f} ms of {1e3 * cost.step / 5:.0f} ms CPU time a step, "
        f"{100 * cost.guard / cost.step:.2f} %"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
