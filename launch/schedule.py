"""`python -m launch.schedule`: a pipeline schedule as JSON, or as a text grid with what the simulator makes of it."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, assert_never

from dualpipe.config import ScheduleConfig
from dualpipe.costs import Costs
from dualpipe.draw.text import grid, summary
from dualpipe.generate.select import build
from dualpipe.ir import Schedule, to_json
from dualpipe.simulate import simulate
from dualpipe.validate import validate
from launch.compose import compose
from launch.decode import decode
from launch.report import command


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleCommandConfig:
    """What the command shows: a schedule, the costs that it is timed by, and the form."""

    schedule: ScheduleConfig
    num_ranks: int
    num_micro_batches: int
    costs: Costs
    format: Literal["text", "json"]


def main(overrides: Sequence[str]) -> int:
    """Prints a schedule that has been proven valid.

    Args:
        overrides: of `conf/schedule.yaml`.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: an unknown or missing key, a value of another type.
        ScheduleError: ranks, micro-batches or costs that no schedule can take.
    """
    config = decode(ScheduleCommandConfig, compose("schedule", overrides))
    schedule = build(config.schedule.kind, config.num_ranks, config.num_micro_batches)
    validate(schedule)
    match config.format:
        case "json":
            print(to_json(schedule))
        case "text":
            timed = _as_paired(schedule, config.schedule)
            simulation = simulate(timed, config.costs)
            print(grid(timed, simulation))
            print(summary(timed, simulation, config.costs))
        case _ as other:
            assert_never(other)
    return 0


def _as_paired(schedule: Schedule, config: ScheduleConfig) -> Schedule:
    """The schedule as the run would time it: members of a group one after the other where nothing is overlapped."""
    match config.pairing:
        case "overlapped":
            return schedule
        case "sequential":
            ranks = tuple(tuple((op,) for group in groups for op in group) for groups in schedule.ranks)
            return replace(schedule, ranks=ranks)
        case _ as other:
            assert_never(other)


if __name__ == "__main__":
    sys.exit(command("schedule", main))
