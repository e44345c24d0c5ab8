"""Which pipeline schedule a run follows, as values. No torch here."""

from dataclasses import dataclass
from typing import Literal

ScheduleKind = Literal["dualpipe", "1f1b"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """`pairing`: run the members of a group phase by phase under each other's exchange, or one after the other."""

    kind: ScheduleKind
    pairing: Literal["overlapped", "sequential"]
