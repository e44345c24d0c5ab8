"""Defines the configuration of the pipeline schedule. Does not import torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dualpipe.registry import SCHEDULES


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Configuration of the pipeline schedule.

    Attributes:
        kind: name of a registered schedule, or `auto` for the best one by simulation.
        pairing: whether the phases of a group's operations overlap each other's exchanges or run in sequence.
    """

    kind: Annotated[str, SCHEDULES]
    pairing: Literal["overlapped", "sequential"]
