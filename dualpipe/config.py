"""Defines the configuration of the pipeline schedule, and of the costs of `launch.schedule`."""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from dualpipe.ir import ScheduleError
from dualpipe.registry import SCHEDULES
from dualpipe.simulate.costs import CostModel, Costs, StageCosts, resampled, uniform
from kernels.ranges import NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleConfig:
    """Which schedule a run uses, and how the members of a group run; `conf/schedule` explains the keys."""

    kind: Annotated[str, SCHEDULES]
    chunks: PositiveInt | None
    pairing: Literal["overlapped", "sequential"]
    slices: PositiveInt = 1


_STAGE_KEYS = tuple(field.name for field in fields(StageCosts))


@dataclass(frozen=True, slots=True)
class StageEntry:
    """Costs of one stage: `factor` times an equal stage's, or some of them by name."""

    factor: float
    values: tuple[tuple[str, float], ...] = ()

    @classmethod
    def from_plain(cls, value: object) -> "StageEntry":
        """Reads a number or a mapping, or raises a `ScheduleError`."""
        if not isinstance(value, Mapping):
            return cls(factor=_number(value, "must be a number, or costs by name,"))
        for key in value:
            if key not in _STAGE_KEYS:
                raise ScheduleError(f"{key} is no cost of a stage; nearest: {', '.join(_STAGE_KEYS)}")
        named = tuple((str(key), _number(item, f"{key} must be a number")) for key, item in value.items())
        return cls(factor=1.0, values=named)

    def to_plain(self) -> float | dict[str, float]:
        """Returns the form that `from_plain` reads."""
        return dict(self.values) if self.values else self.factor

    def costs(self, equal: StageCosts) -> StageCosts:
        """Returns the stage's costs, given those of an equal share of the model."""
        given = {name: getattr(equal, name) for name in _STAGE_KEYS}
        scaled = {name: self.factor * value for name, value in given.items() if value is not None}
        return StageCosts(**(scaled | dict(self.values)))


def _number(value: object, rule: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ScheduleError(f"{rule} of at least 0, is {value!r}")
    return float(value)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelCosts(Costs):
    """Costs of a model on a pipeline, for any number of stages; no entries mean equal stages.

    `weights` is the memory of one copy of a rank's weights, gradients and optimizer state, in activations of model/P.
    """

    offload: float | None  # required here
    stages: tuple[StageEntry, ...]
    weights: NonNegativeFloat

    def of_stages(self, num_ranks: int, num_stages: int) -> CostModel:
        """Returns the costs of every stage; unless there is an entry for each, a fraction of the entries'."""
        entries = self.stages
        if len(entries) % num_ranks:
            below = len(entries) - len(entries) % num_ranks
            nearest = " or ".join(str(count) for count in (below, below + num_ranks) if count)
            raise ScheduleError(
                f"costs.stages: must have an entry for each stage, a multiple of num_ranks={num_ranks}, has "
                f"{len(entries)}; nearest: {nearest}, or []"
            )
        equal = uniform(self, num_ranks, len(entries) or num_stages)
        stages = (
            tuple(entry.costs(stage) for entry, stage in zip(entries, equal.stages, strict=True)) if entries else ()
        )
        return resampled(replace(equal, stages=stages or equal.stages, weights=self.weights), num_stages)
