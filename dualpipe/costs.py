"""Defines the costs of operations for the simulator and the generators."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, assert_never

from dualpipe.ir import Group, Op, Operation, ScheduleError


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Times of one rank's share of the model, model/P, in any unit.

    Attributes:
        exchange: exchange of one F, and also of one I.
        latency: time from the end of a group to the arrival of its outputs at another rank.
        offload: copy of one activation to host memory, and also the copy back; None if nothing may be offloaded.

    Raises:
        ScheduleError: if a time is negative or not finite.
    """

    forward: float = 1.0
    backward_input: float = 1.0
    backward_weight: float = 1.0
    exchange: float = 0.0
    latency: float = 0.0
    offload: float | None = None

    def __post_init__(self) -> None:
        _check_times(self, "costs")

    def __repr__(self) -> str:
        changed = [field.name for field in fields(self) if getattr(self, field.name) != field.default]
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in changed)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCosts:
    """Times of one micro-batch in one stage, and the memory of its activation from F to W, in any unit."""

    forward: float
    backward_input: float
    backward_weight: float
    forward_exchange: float
    backward_exchange: float
    activation: float
    offload: float | None = None

    def __post_init__(self) -> None:
        _check_times(self, "stage costs")

    def compute_of(self, kind: Op) -> float:
        """Returns the computation time of one operation."""
        match kind:
            case Op.FORWARD:
                return self.forward
            case Op.BACKWARD:
                return self.backward_input + self.backward_weight
            case Op.BACKWARD_INPUT:
                return self.backward_input
            case Op.BACKWARD_WEIGHT:
                return self.backward_weight
            case Op.OFFLOAD | Op.RELOAD:
                return 0.0
            case _ as other:
                assert_never(other)

    def exchange_of(self, kind: Op) -> float:
        """Returns the exchange time of one operation."""
        match kind:
            case Op.FORWARD:
                return self.forward_exchange
            case Op.BACKWARD | Op.BACKWARD_INPUT:
                return self.backward_exchange
            case Op.BACKWARD_WEIGHT | Op.OFFLOAD | Op.RELOAD:
                return 0.0
            case _ as other:
                assert_never(other)


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Costs of every stage by its number, of a link between two ranks, and of a rank's weights.

    Attributes:
        weights: memory of one copy of a rank's weights, gradients and optimizer state, in the unit of
            `StageCosts.activation`; 0 to count activations only. A rank holds one copy for each direction.
        alone: factor on the computation of a group of one operation. It is below 1 if exchange takes part of a device
            that computes, and an operation without another to hide its exchange has the whole device.
        slices: as `Schedule.slices`. Costs and activations are those of one slice.
        by_slice: times of each slice by stage, of which `stages` has the means; empty if slices are equal. Activations
            always count as equal.
        link_depth: as `Schedule.link_depth`.
    """

    stages: tuple[StageCosts, ...]
    latency: float
    weights: float = 0.0
    alone: float = 1.0
    slices: int = 1
    by_slice: tuple[tuple[StageCosts, ...], ...] = ()
    link_depth: int = 1

    def __repr__(self) -> str:
        parts = []
        for field in fields(StageCosts):
            values = [value for stage in self.stages if (value := getattr(stage, field.name)) is not None]
            if any(values):
                parts.append(f"{field.name} {min(values):g}" + f" to {max(values):g}" * (min(values) < max(values)))
        others = [f"{name} {getattr(self, name):g}" for name in ("latency", "weights") if getattr(self, name)]
        return f"CostModel({len(self.stages)} stages: {', '.join(parts + others)})"

    def compute_of(self, op: Operation) -> float:
        """Returns the computation time of one operation."""
        return self.stages_of(op.micro_batch)[op.stage].compute_of(op.kind)

    def exchange_of(self, op: Operation) -> float:
        """Returns the exchange time of one operation."""
        return self.stages_of(op.micro_batch)[op.stage].exchange_of(op.kind)

    def stages_of(self, micro_batch: int) -> tuple[StageCosts, ...]:
        """Returns the costs of every stage for a micro-batch."""
        return self.by_slice[micro_batch % self.slices] if self.by_slice else self.stages

    def extreme_stages(self, pick: Callable[[Iterable[float]], float]) -> tuple[StageCosts, ...]:
        """Returns the smallest (`min`) or the largest (`max`) costs that any slice has in every stage."""
        names = [field.name for field in fields(StageCosts) if field.name != "offload"]
        return tuple(
            replace(stage, **{name: pick([getattr(each, name) for each in of_slices]) for name in names})
            for stage, *of_slices in zip(self.stages, *(self.by_slice or (self.stages,)), strict=True)
        )

    @classmethod
    def of_slices(cls, slices: Sequence["CostModel"]) -> "CostModel":
        """Returns the costs of all slices of a sequence, given those of each."""
        by_slice = tuple(costs.stages for costs in slices)
        means = tuple(map(_mean, zip(*by_slice, strict=True)))
        latency = sum(costs.latency for costs in slices) / len(slices)
        return replace(slices[0], stages=means, latency=latency, by_slice=by_slice if len(set(by_slice)) > 1 else ())

    @property
    def can_offload(self) -> bool:
        """Whether activations of any stage may be offloaded to host memory."""
        return any(stage.offload is not None for stage in self.stages)

    def without_offload(self) -> "CostModel":
        """Returns the same costs for activations that all stay on the device."""
        return replace(self, stages=tuple(replace(stage, offload=None) for stage in self.stages))

    def of_whole_sequences(self) -> "CostModel":
        """Returns the costs of whole sequences, if these are the costs of slices."""
        if self.slices == 1:
            return self
        stages = []
        for stage in self.stages:
            costs = {field.name: getattr(stage, field.name) for field in fields(StageCosts)}
            stages.append(
                replace(stage, **{name: cost * self.slices for name, cost in costs.items() if cost is not None})
            )
        return replace(self, stages=tuple(stages), slices=1, by_slice=())

    def copy_time_of(self, op: Operation) -> float:
        """Returns the time of an offload's or reload's copy, or raises a `ScheduleError` if none is allowed."""
        time = self.stages[op.stage].offload
        if time is None:
            raise ScheduleError(f"costs.offload: must be the time of a copy, as the schedule contains {op}, is null")
        return time

    def duration_of(self, group: Group) -> float:
        """Returns the time of a group under perfect overlap, in which no operation is faster than alone."""
        return overlapped_time([(self.compute_of(op), self.exchange_of(op)) for op in group], self.alone)


def overlapped_time(members: Sequence[tuple[float, float]], alone: float = 1.0) -> float:
    """Returns the time of overlapped (computation, exchange) pairs: max(computation, exchange, any pair)."""
    if len(members) == 1:
        return alone * members[0][0] + members[0][1]
    compute = exchange = longest = 0.0
    for own_compute, own_exchange in members:
        compute += own_compute
        exchange += own_exchange
        longest = max(longest, own_compute + own_exchange)
    return max(compute, exchange, longest)


def pair_time(costs: Costs) -> float:
    """Returns the time of F&B: a forward overlapped with a full backward, both of model/P."""
    backward = costs.backward_input + costs.backward_weight
    return overlapped_time([(costs.forward, costs.exchange), (backward, costs.exchange)])


def uniform(costs: Costs, num_ranks: int, num_stages: int) -> CostModel:
    """Returns costs of equal stages, of which each has its fraction of the costs of model/`num_ranks`."""
    share = num_ranks / num_stages
    stage = StageCosts(
        forward=costs.forward * share,
        backward_input=costs.backward_input * share,
        backward_weight=costs.backward_weight * share,
        forward_exchange=costs.exchange * share,
        backward_exchange=costs.exchange * share,
        activation=share,
        offload=None if costs.offload is None else costs.offload * share,
    )
    return CostModel(stages=(stage,) * num_stages, latency=costs.latency)


def resampled(costs: CostModel, num_stages: int) -> CostModel:
    """Returns the costs of the same model with another number of stages, each a fraction of the old ones."""
    num_old = len(costs.stages)
    if num_stages == num_old:
        return costs
    shares = [_shares(stage, num_stages, num_old) for stage in range(num_stages)]
    stages, *by_slice = (
        tuple(_sum([old_stages[old] for old in each], each.values()) for each in shares)
        for old_stages in (costs.stages, *costs.by_slice)
    )
    return replace(costs, stages=stages, by_slice=tuple(by_slice))


def _mean(stages: Sequence[StageCosts]) -> StageCosts:
    return _sum(stages, [1 / len(stages)] * len(stages))


def _sum(stages: Sequence[StageCosts], weights: Iterable[float]) -> StageCosts:
    """Returns the weighted sum of costs; no offload if none of them has any."""
    weights = list(weights)
    sums: dict[str, Any] = {}
    for field in fields(StageCosts):
        values = [getattr(stage, field.name) for stage in stages]
        terms = [weight * (value or 0.0) for weight, value in zip(weights, values, strict=True)]
        sums[field.name] = None if values == [None] * len(values) else sum(terms)
    return StageCosts(**sums)


def _shares(stage: int, num_new: int, num_old: int) -> dict[int, float]:
    # In units of which every old stage has num_new and every new one num_old.
    start = stage * num_old
    end = start + num_old
    spans = {old: min(end, (old + 1) * num_new) - max(start, old * num_new) for old in range(num_old)}
    return {old: length / num_new for old, length in spans.items() if length > 0}


def _check_times(values: Costs | StageCosts, subject: str) -> None:
    for field in fields(values):
        value = getattr(values, field.name)
        if value is None or field.name == "stages":  # no offload; entries that check themselves
            continue
        if not (isinstance(value, int | float) and math.isfinite(value) and value >= 0):
            dotted = f"{subject}.{field.name}" if isinstance(values, Costs) else f"{subject}: {field.name}"
            raise ScheduleError(f"{dotted}: must be a finite number of at least 0, is {value!r}")
