"""Reads the recorded steps of a run, of which the last ones count. No torch here."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from train.records.json_lines import LONGEST_LINE_BYTES, number_of, read_line

METRICS_NAME = "metrics.jsonl"
_MOST_BYTES = 2**26
_PARTS = ("compute_seconds", "exposed_exchange_seconds", "bubble_seconds")


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedStep:
    """The time of one step in seconds, means over all ranks, and its memory.

    Attributes:
        number: of the step, from 1.
        sequences: of its global batch.
        step: the whole step.
        compute: forward and backward.
        exposed_exchange: exchange that nothing hid.
        bubble: idle time in the pipeline.
        peak_memory_bytes: of the rank that has needed most so far.
    """

    number: int
    sequences: int
    step: float
    compute: float
    exposed_exchange: float
    bubble: float
    peak_memory_bytes: int

    @property
    def outside(self) -> float:
        """Time outside the passes: optimizer, data, agreement of the ranks, rollouts."""
        return max(0.0, self.step - self.compute - self.exposed_exchange - self.bubble)


def typical_steps(folder: Path) -> tuple[RecordedStep, ...]:
    """Returns the recorded steps of the largest batch, the oldest first.

    The run's first step, which takes longer, is left out if there are others. Of a long run only the last steps are
    read.
    """
    steps = [step for line in _last_lines(folder / METRICS_NAME) if (step := _step_of(line)) is not None]
    largest = max((step.sequences for step in steps), default=0)
    steps = [step for step in steps if step.sequences == largest]
    return tuple(step for step in steps if step.number > 1) or tuple(steps)


def median_of(steps: Sequence[RecordedStep], name: str) -> float:
    """Returns the median of one of the numbers of steps."""
    numbers: list[float] = [getattr(step, name) for step in steps]
    return median(numbers)


def _last_lines(path: Path) -> Iterator[bytes]:
    """Yields the whole lines of the end of a regular file."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        skipped = max(0, path.stat().st_size - _MOST_BYTES)
        if skipped:
            file.seek(skipped)
            file.readline(LONGEST_LINE_BYTES)
        while line := file.readline(LONGEST_LINE_BYTES):
            if line.endswith(b"\n"):
                yield line


def _step_of(line: bytes) -> RecordedStep | None:
    """Returns the step of a line; None if it is not a step with the parts of its time."""
    record = read_line(line)
    parts: Any = None if record is None else record.get("step_time")
    if record is None or not isinstance(parts, Mapping):
        return None
    numbers = [number_of(record, name) for name in ("step_seconds", "global_batch_sequences", "peak_memory_bytes")]
    numbers += [number_of(parts, name) for name in _PARTS]
    known = [number for number in numbers if number is not None and 0 <= number < float("inf")]
    if len(known) < len(numbers):
        return None
    step, sequences, memory, compute, exposed, bubble = known
    if step <= 0:
        return None
    return RecordedStep(
        number=record["step"],
        sequences=int(sequences),
        step=step,
        compute=compute,
        exposed_exchange=exposed,
        bubble=bubble,
        peak_memory_bytes=int(memory),
    )
