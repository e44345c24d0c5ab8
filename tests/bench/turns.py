"""Measures CPU seconds of steps of two trainers, each in a separate process with one thread, whose steps alternate.

TRL is an optional extra: `pip install -e .[bench]`.
"""

import importlib.metadata
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from multiprocessing.connection import Connection
from typing import Any

NUM_WARM_STEPS = 3


@dataclass(frozen=True, slots=True)
class StepSample:
    """CPU seconds of a contender's steps: median and minimum, and the last loss."""

    median: float
    shortest: float
    loss: float


class Steps:
    """Serves one pipe: measures CPU seconds from one report to the next, while the other contender waits."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._began = 0.0

    def start(self) -> None:
        """Waits for the turn."""
        self._pipe.recv()
        self._began = time.process_time()

    def end(self, loss: float) -> None:
        """Reports a step."""
        self._pipe.send((time.process_time() - self._began, loss))


def missing_trl() -> str | None:
    """Returns why TRL cannot be measured, or None."""
    return None if find_spec("trl") else "trl is not installed; pip install -e .[bench]"


def measure_in_turns(
    num_rounds: int, contenders: Mapping[str, Callable[[int, Connection], None]]
) -> dict[str, StepSample]:
    """Runs steps of all contenders in turn, after unmeasured ones.

    Args:
        num_rounds: measured steps of each.
        contenders: functions that run a number of steps, each between a `Steps.start` and a `Steps.end`.
    """
    context = multiprocessing.get_context("spawn")
    started = []
    for name, serve in contenders.items():
        here, there = context.Pipe()
        process = context.Process(target=serve, args=(NUM_WARM_STEPS + num_rounds, there), daemon=True)
        process.start()
        there.close()
        started.append((name, process, here))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    for turn in range(NUM_WARM_STEPS + num_rounds):
        for name, _, pipe in started:
            pipe.send(True)
            taken = pipe.recv()
            if turn >= NUM_WARM_STEPS:
                times[name].append(taken)
    for _, process, _ in started:
        process.join()
    found = {}
    for name, steps in times.items():
        seconds = [taken for taken, _ in steps]
        found[name] = StepSample(statistics.median(seconds), min(seconds), steps[-1][1])
    return found


def trl_text(subject: str, samples: Mapping[str, StepSample], most: float) -> str:
    """Formats a table of this project and TRL.

    Args:
        subject: what a step does.
        samples: of `here` and `TRL`.
        most: target of the ratio of CPU seconds.
    """
    ours, trl = samples["here"], samples["TRL"]
    lines = [
        f"A step of {subject}, one thread, interleaved; TRL {importlib.metadata.version('trl')}, target <= {most} of "
        f"its CPU seconds",
        f"{'':8}{'CPU s':>8}{'least':>8}{'loss':>8}",
        *(f"{name:8}{each.median:8.3f}{each.shortest:8.3f}{each.loss:8.3f}" for name, each in samples.items()),
        f"{'ratio':8}{ours.median / trl.median:8.2f}{ours.shortest / trl.shortest:8.2f}",
    ]
    return "\n".join(lines)


def step_rows(samples: Mapping[str, StepSample]) -> list[dict[str, Any]]:
    """Returns the same as plain data."""
    return [
        {"contender": name, "cpu_seconds": each.median, "least_cpu_seconds": each.shortest}
        for name, each in samples.items()
    ]
