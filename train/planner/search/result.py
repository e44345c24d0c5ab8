"""Defines the result of a search. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from train.config import TrainConfig
from train.memory import JobMemory
from train.planner.cost import JobCost
from train.planner.search.rejections import RejectedLayouts
from train.planner.timing import StepTime


@dataclass(frozen=True, kw_only=True, slots=True)
class FoundLayout:
    """A layout that fits.

    Attributes:
        config: its configuration with a listed cut.
        memory: predicted peak of each pipeline rank.
        time: of a step.
        cost: of the run's own steps; None until the search has ended.
        is_pareto: whether no other layout is as fast with less memory, or faster with as much.
    """

    config: TrainConfig
    memory: JobMemory
    time: StepTime
    cost: JobCost | None = None
    is_pareto: bool = False

    @property
    def peak_bytes(self) -> int:
        """The peak of the rank that needs most."""
        return self.memory.worst.total

    @property
    def order(self) -> tuple[float, int]:
        """Step time, then memory."""
        return self.time.step, self.peak_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchCounts:
    """Numbers of layouts.

    Attributes:
        layouts: all layouts of the search.
        rejected: by rules or memory.
        dropped: that neither a bound nor a prediction allows to be better than what is returned.
        built: whose schedule was built and timed.
        open: that may be better, but were not built because that takes too long.
        open_seconds: least bound of their steps; None if there are none.
    """

    layouts: int
    rejected: int
    dropped: int
    built: int
    open: int
    open_seconds: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchResult:
    """The result of a search.

    Attributes:
        run: configuration that was given.
        config: the same with the batch of all layouts.
        found: layouts by step time.
        rejected: groups of rejected layouts, the largest first.
        counts: numbers of layouts.
    """

    run: TrainConfig
    config: TrainConfig
    found: tuple[FoundLayout, ...]
    rejected: tuple[RejectedLayouts, ...]
    counts: SearchCounts


def with_front(found: Sequence[FoundLayout]) -> tuple[FoundLayout, ...]:
    """Returns layouts in order of time, with the Pareto front of time and memory marked.

    Args:
        found: layouts; the fastest of all that fit are among them, so one that none of them dominates is dominated by
            no other.
    """
    marked, least = [], float("inf")
    for layout in sorted(found, key=lambda each: each.order):
        marked.append(replace(layout, is_pareto=layout.peak_bytes < least))
        least = min(least, layout.peak_bytes)
    return tuple(marked)
