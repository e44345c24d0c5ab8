"""Compiles a schedule into the programs of one pipeline rank."""

from collections.abc import Mapping
from typing import Literal

from dualpipe.ir import Schedule
from dualpipe.passes import forward_only
from dualpipe.runtime import pairing as pairings
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.program import Program, with_reductions
from dualpipe.validate import validate_passes
from model.stage import Stage


def compile_programs(
    schedule: Schedule,
    pairing: Literal["overlapped", "sequential"],
    pipeline_rank: int,
    stages: Mapping[int, Stage],
    *,
    is_proven: bool = False,
) -> tuple[Program, Program]:
    """Compiles programs for training and for forward alone; validates an unproven schedule.

    Raises:
        ScheduleError: the schedule is not valid.
    """
    if not is_proven:
        validate_passes(schedule)
    forwards = forward_only(schedule)
    order = {"overlapped": pairings.overlapped, "sequential": pairings.sequential}[pairing]
    lanes = {number: stage.lanes for number, stage in stages.items()}
    training = with_reductions(compile_rank(schedule, pipeline_rank, lanes, order))
    return training, compile_rank(forwards, pipeline_rank, lanes, order)
