"""Cuts layers into stages so that the steady state of a step is fast. No torch here.

What counts is the work of the heaviest rank. With several chunks for each of two directions, ranks run the chunks of a
block of micro-batches one after the other, so each of these parts must be even (`stage_work.pace`).

A model is an embedding, dense layers, MoE layers, and heads with MTP modules, in this order. Layers of one kind cost
the same, so only their number in each stage matters. For each way to place the dense layers on the first stages, MoE
layers are added one by one to the rank with the least work, which is optimal because they are identical.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from itertools import islice, product

from dualpipe.ir import Placement
from train.schedule.layer_times import (
    LaneWork,
    ModelWork,
    lockstep_loads,
    pace,
    rank_groups,
    runs_in_lockstep,
    stage_works,
    times_of_ranks,
)

_MOST_TRIED = 128
"""Maximum number of ways to place dense layers that are tried, the most even ones first. DeepSeek-V3 has 4."""
_MOST_STARTS = 6
"""Maximum number of these that moves of single layers improve, if chunks make ranks depend on each other."""
_DIGITS = 9
_TOLERANCE = 0.02
"""How much longer a micro-batch may take, if this makes stages more even."""
_NEARLY = 1e-6
_FEW_STAGES = 24
"""Number of stages up to which all moves of a layer are tried."""
_LARGEST_STAGE = 0.1
"""Weight of the largest stage against the pace. Ranks wait for a neighbor with a large stage."""
_UNEVENNESS = 0.001
"""Weight of how much all ranks and stages differ, which decides between cuts that are otherwise equal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLimits:
    """Maximum numbers of layers that groups of ranks with the same stages hold, as memory allows.

    Layers of `late` groups go to later stages first, because a schedule keeps fewer activations of those.
    """

    layers: Mapping[int, int] = field(default_factory=dict)
    late: AbstractSet[int] = frozenset()

    def allow(self, sizes: Sequence[int], groups: Sequence[int]) -> bool:
        """Returns whether no group has more layers than it may have."""
        return all(
            sum(size for size, own in zip(sizes, groups, strict=True) if own == group) <= most
            for group, most in self.layers.items()
        )


def balanced_cut(model: ModelWork, placement: Placement, limits: CutLimits | None = None) -> tuple[int, ...] | None:
    """Returns the number of layers of each stage in the best contiguous cut.

    Every stage has at least one layer, except that the last one may have none besides its heads. The best cut has the
    fastest pace. Of cuts within 2 % of it, the one is best whose pace is fast and whose largest stage is small, then
    the one with the most even ranks and stages, then the one with the fewest layers in early stages, of which a
    schedule keeps the most activations.

    None if no cut keeps the limits. The model has at least as many layers as there are stages.
    """
    if model.num_moe == 0:
        # Layers of one kind need no search.
        model = replace(model, num_dense=0, num_moe=model.num_dense, moe=model.dense)
    limits = limits or CutLimits()
    num_stages = len(placement[0])
    found = list[tuple[int, ...]]()
    for dense in islice(_dense_sizes(model.num_dense, num_stages, model.num_layers / num_stages), _MOST_TRIED):
        filling = _Filling(model, placement, limits, dense)
        if filling.run():
            found.append(tuple(filling.sizes))
    if not found:
        return None
    most = (1 + _TOLERANCE) * min(pace(stage_works(sizes, model), placement) for sizes in found)
    starts = sorted(found, key=lambda sizes: _score(sizes, model, placement, most))
    tried = starts[: _MOST_STARTS if runs_in_lockstep(placement) else 1]
    cuts = (_climb(start, model, placement, limits, most) for start in tried)
    return min(cuts, key=lambda sizes: _score(sizes, model, placement, most))


def _climb(
    sizes: tuple[int, ...], model: ModelWork, placement: Placement, limits: CutLimits, most: float
) -> tuple[int, ...]:
    """Moves single layers from one stage to another while that improves the score."""
    groups = rank_groups(placement)
    score = _score(sizes, model, placement, most)
    while True:
        sources = _sources(sizes, model, placement)
        moves = ((_score(moved, model, placement, most), moved) for moved in _moves(sizes, groups, limits, sources))
        better = min(moves, default=(score, sizes))
        if better[0] >= score:
            return sizes
        score, sizes = better


def _sources(sizes: tuple[int, ...], model: ModelWork, placement: Placement) -> list[int]:
    """Returns the stages that may lose a layer: if there are many, only the heaviest."""
    if len(sizes) <= _FEW_STAGES:
        return list(range(len(sizes)))
    works = stage_works(sizes, model)
    times = times_of_ranks(works, placement)
    largest = max(work.time for work in works)
    heavy = {rank for rank, time in enumerate(times) if time >= max(times) * (1 - _NEARLY)}
    if runs_in_lockstep(placement):
        loads = [max(slots) for slots in lockstep_loads(works, placement)]
        heavy.add(loads.index(max(loads)))
    return [
        stage
        for stage, ranks in enumerate(zip(*placement, strict=True))
        if heavy & set(ranks) or works[stage].time >= largest * (1 - _NEARLY)
    ]


def _moves(
    sizes: tuple[int, ...], groups: tuple[int, ...], limits: CutLimits, sources: Sequence[int]
) -> Iterator[tuple[int, ...]]:
    """Yields the cuts in which a source gives a layer to another stage, within the limits."""
    last = len(sizes) - 1
    for source, target in product(sources, range(len(sizes))):
        is_late = bool({groups[source], groups[target]} & limits.late)
        if source != target and sizes[source] > (source < last) and not is_late:
            moved = list(sizes)
            moved[source] -= 1
            moved[target] += 1
            if limits.allow(moved, groups):
                yield tuple(moved)


def _score(sizes: Sequence[int], model: ModelWork, placement: Placement, most: float) -> tuple[float, float, int]:
    """Returns what is compared between cuts, the less the better; from `most` on only the pace counts."""
    works = stage_works(sizes, model)
    times = times_of_ranks(works, placement)
    ranks = _relative(times)
    stages = _relative([work.time for work in works])
    squares = sum((time - 1) ** 2 for each in (ranks, stages) for time in each) / len(stages)
    time = pace(works, placement)
    even = sum(times) / len(times) or 1.0
    value = time / even + _LARGEST_STAGE * max(stages) + _UNEVENNESS * squares
    early = sum(size * (len(sizes) - stage) for stage, size in enumerate(sizes))
    return round(max(0.0, time / most - 1), _DIGITS) if most else 0.0, round(value, _DIGITS), early


def _relative(times: Sequence[float]) -> list[float]:
    mean = sum(times) / len(times) or 1.0
    return [time / mean for time in times]


def _dense_sizes(left: int, num_stages: int, even: float) -> Iterator[list[int]]:
    """Yields the ways to place dense layers on first stages, those next to the mean `even` first."""
    if left == 0:
        yield []
        return
    for size in sorted(range(1, left + 1), key=lambda size: (abs(size - even), size)):
        if size == left:
            yield [size]
        elif num_stages > 1:
            yield from ([size, *others] for others in _dense_sizes(left - size, num_stages - 1, even))


class _Filling:
    """Adds MoE layers to given dense layers, one by one, to the rank with the least work."""

    def __init__(self, model: ModelWork, placement: Placement, limits: CutLimits, dense: Sequence[int]) -> None:
        last = len(placement[0]) - 1
        self.sizes = [*dense, *(int(stage < last or last == 0) for stage in range(len(dense), last + 1))]
        self._model = model
        self._limits = limits
        self._groups = rank_groups(placement)
        # A rank in the middle of an odd number of ranks holds a stage for both directions.
        self._held = [max(map(ranks.count, ranks)) for ranks in zip(*placement, strict=True)]
        # MoE layers can join the last dense layers, or come later.
        self._open = range(max(0, len(dense) - 1), last + 1)
        self._stages = stage_works(self.sizes, model)
        self._totals: dict[int, LaneWork] = defaultdict(LaneWork)
        for group, work, held in zip(self._groups, self._stages, self._held, strict=True):
            self._totals[group] += work * held

    def run(self) -> bool:
        """Adds all layers. Returns whether there are enough layers, and whether the limits are kept."""
        left = self._model.num_layers - sum(self.sizes)
        for _ in range(left):
            stage = min(filter(self._has_room, self._open), key=self._cost_with_another, default=None)
            if stage is None:
                return False
            self.sizes[stage] += 1
            self._stages[stage] += self._model.moe
            self._totals[self._groups[stage]] += self._model.moe * self._held[stage]
        return left >= 0 and self._limits.allow(self.sizes, self._groups)

    def _has_room(self, stage: int) -> bool:
        grown = [size + (place == stage) for place, size in enumerate(self.sizes)]
        return not self._limits.layers or self._limits.allow(grown, self._groups)

    def _cost_with_another(self, stage: int) -> tuple[float, ...]:
        """Returns the time of the stage's rank, then of the stage, with one more MoE layer."""
        group = self._groups[stage]
        moe = self._model.moe
        total = self._totals[group] + moe * self._held[stage]
        own = 0.0 if group in self._limits.late else (self._stages[stage] + moe).time
        return round(total.time, _DIGITS), group, round(own, _DIGITS), -stage
