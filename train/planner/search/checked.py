"""Enumerates the layouts of a search that rules accept, with their first bounds. No torch here."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from comm.config import Cut
from dualpipe.config import ScheduleConfig
from dualpipe.registry import FALLBACK
from model.config import RECOMPUTED
from train.config import TrainConfig
from train.planner.as_json import layout_json
from train.planner.search.estimates import Estimates, LayoutChoice
from train.planner.search.rejections import Rejections
from train.planner.search.space import SearchSpace

Rules = Callable[[TrainConfig], None]
"""Raises ValueError for an invalid configuration of a run."""

_GB = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundedLayout:
    """A layout with lower bounds of its step and of its peak memory, for any cut."""

    choice: LayoutChoice
    seconds: float
    memory: int


class LayoutChecks:
    """Rules of a run applied to layouts. What layouts share is checked once.

    Rules about ranks, precision and dispatch are checked with `FALLBACK`, which accepts all sizes, and with everything
    recomputed; rules about a schedule with the first setting of its size that is valid. A layout is checked as a whole
    before it is built.
    """

    def __init__(self, space: SearchSpace, rules: Rules, rejections: Rejections) -> None:
        """Starts without known results.

        Args:
            rejections: where rejected layouts are added.
        """
        self._space = space
        self._rules = rules
        self._rejections = rejections
        self._known: dict[tuple[object, ...], str | None] = {}
        self.count = 0

    def accepted(self) -> Iterator[LayoutChoice]:
        """Yields the layouts that no rule rejects, in order of their pipelines."""
        fallback = next((each for each in self._space.schedules if each.kind == FALLBACK), self._space.schedules[0])
        fallback = replace(fallback, chunks=None)
        of_pipeline: dict[int, tuple[ScheduleConfig, ...]] = {}
        for setting in self._space.settings():
            if setting.pipeline not in of_pipeline:
                of_pipeline[setting.pipeline] = self._space.schedules_of(setting.pipeline)
            schedules = of_pipeline[setting.pipeline]
            self.count += len(schedules)
            widest = replace(setting, recompute=RECOMPUTED)
            reason = self._once((widest,), LayoutChoice(setting=widest, schedule=fallback))
            if reason is not None:
                shown = layout_of(self._space, LayoutChoice(setting=setting, schedule=fallback)) | _ANY_SCHEDULE
                self._rejections.add(shown, reason, count=len(schedules))
                continue
            for schedule in schedules:
                choice = LayoutChoice(setting=setting, schedule=schedule)
                reason = self._once((setting.pipeline, setting.data, setting.micro_sequences, schedule), choice)
                if reason is None:
                    yield choice
                else:
                    self._rejections.add(layout_of(self._space, choice), reason)

    def _once(self, key: tuple[object, ...], choice: LayoutChoice) -> str | None:
        if key not in self._known:
            config = self._space.layout_config(choice.setting, choice.schedule)
            # A cap is checked when the schedule is built, and an even cut exists if any does.
            mesh, costs = replace(config.parallelism, cut=Cut("even")), replace(config.costs, offload=None)
            self._known[key] = broken_rule(self._rules, replace(config, parallelism=mesh, memory_cap=None, costs=costs))
        return self._known[key]


_ANY_SCHEDULE: dict[str, Any] = {"schedule": None, "chunks": None}


def broken_rule(rules: Rules, config: TrainConfig) -> str | None:
    """Returns the message of a rule that a configuration breaks, or None."""
    try:
        rules(config)
    except ValueError as error:
        return str(error)
    return None


def layout_of(space: SearchSpace, choice: LayoutChoice) -> dict[str, Any]:
    """Returns a layout without a cut in its public form."""
    config = space.layout_config(choice.setting, choice.schedule)
    return layout_json(config) | {"chunks": choice.schedule.chunks, "cut": None}


def bounded_layouts(
    space: SearchSpace, checks: LayoutChecks, estimates: Estimates, rejections: Rejections
) -> Iterator[BoundedLayout]:
    """Yields the layouts that rules accept and that may fit.

    Args:
        rejections: where layouts that cannot fit are added.
    """
    room = space.config.cluster.memory_bytes
    for choice in checks.accepted():
        memory = estimates.mean_memory(choice)
        if room is not None and memory > room:
            reason = f"memory: the mean rank needs at least {memory / _GB:.1f} GB of {room / _GB:.1f}"
            rejections.add(layout_of(space, choice), reason, excess=memory / room)
            continue
        yield BoundedLayout(choice=choice, seconds=estimates.seconds(choice), memory=memory)
