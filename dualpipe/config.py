"""Which pipeline schedule a run follows, as values. No torch here."""

from dataclasses import dataclass
from typing import Annotated, Literal

from dualpipe.registry import SCHEDULES


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """`kind`: a registered schedule by its name, or `auto`, the best of all by simulation.

    `pairing`: run the members of a group phase by phase under each other's exchange, or one after the other.
    """

    kind: Annotated[str, SCHEDULES]
    pairing: Literal["overlapped", "sequential"]
