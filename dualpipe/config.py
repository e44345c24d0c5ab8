"""Which pipeline schedule a run follows, as values. No torch here."""

from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["dualpipe_split", "dualpipe", "dualpipe_v", "zb_v", "zb_h1", "1f1b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """`kind`: a schedule by its name, or the best of all by simulation.

    `pairing`: run the members of a group phase by phase under each other's exchange, or one after the other.
    """

    kind: Literal[ScheduleKind, "auto"]
    pairing: Literal["overlapped", "sequential"]
