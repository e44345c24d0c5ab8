"""Defines what a search knows of a layout. No torch here."""

from dataclasses import dataclass
from enum import IntEnum

from train.config import TrainConfig
from train.planner.search.estimates import LayoutChoice
from train.planner.timing import StepTime


class Level(IntEnum):
    """What is known of a layout."""

    WORK = 0
    CUT = 1
    BOUNDED = 2
    COUNTED = 3
    TIMED = 4
    UNFITTED = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchEntry:
    """A layout with lower bounds of time and memory; `config` has a listed cut as soon as it is known."""

    choice: LayoutChoice
    seconds: float
    memory: int
    level: Level = Level.WORK
    config: TrainConfig | None = None
    time: StepTime | None = None
    has_fitted_cut: bool = False
