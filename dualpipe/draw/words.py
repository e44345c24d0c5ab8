"""Words and numbers that all pictures share."""

import math

from dualpipe.ir import Op, Schedule

NAMES = {
    Op.FORWARD: "forward",
    Op.BACKWARD: "backward",
    Op.BACKWARD_INPUT: "backward for inputs",
    Op.BACKWARD_WEIGHT: "backward for weights",
}


def number(value: float) -> str:
    """At most six digits, no trailing zeros; sums of rounded times that miss zero by an ulp are zero."""
    return f"{0.0 if abs(value) < 1e-9 else value:.6g}"


def spread(values: tuple[float, ...]) -> str:
    """The one value, or the least and the largest."""
    shown = list(dict.fromkeys(number(value) for value in sorted(values)))
    return shown[0] if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"


def percent(fraction: float) -> str:
    """Two decimals, as in `9.09 %`."""
    return f"{100 * fraction:.2f} %"


def round_up(value: float) -> float:
    """The least of 1, 2, 5 times a power of ten that is not below the value."""
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= value * (1 - 1e-9))


def plain(text: str) -> str:
    """ASCII for terminals and pipes of any encoding."""
    return text.encode("ascii", "backslashreplace").decode()


def stage_tells(schedule: Schedule, rank: int, direction: int) -> bool:
    """Whether a label needs the stage: the rank holds several for the direction."""
    return [held for held, _ in schedule.stages_of(rank)].count(direction) > 1


def size(schedule: Schedule) -> str:
    """As in `8 ranks, 20 micro-batches`."""
    ranks, batches = schedule.num_ranks, schedule.num_micro_batches
    return f"{ranks} rank{'s' * (ranks != 1)}, {batches} micro-batch{'es' * (batches != 1)}"
