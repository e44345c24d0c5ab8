"""Defines the configuration of the pipeline schedule. Does not import torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dualpipe.registry import SCHEDULES
from kernels.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Configuration of the pipeline schedule.

    Attributes:
        kind: name of a registered schedule, or `auto` for the best one by simulation.
        chunks: stages that a rank holds for one direction; None for the best number that the layers allow.
        pairing: whether the phases of a group's operations overlap each other's exchanges or run in sequence.
    """

    kind: Annotated[str, SCHEDULES]
    chunks: PositiveInt | None
    pairing: Literal["overlapped", "sequential"]
