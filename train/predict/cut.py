"""Places stages: their layers and ranks, and ramp sizes that keep the placement. No torch here.

A balanced cut makes the steady state of a step fast: what counts is the work of the heaviest rank. With several chunks
for each of two directions, ranks run the chunks of a block of micro-batches one after the other, so each of these parts
must be even (`layer_times.pace`).

A model is an embedding, dense layers, MoE layers, and heads with MTP modules, in this order. Layers of one kind cost
the same, so only their number in each stage matters. For each way to place the dense layers on the first stages, MoE
layers are added one by one to the rank with the least work, which is optimal because they are identical.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice, product

from comm.config import Cut
from dualpipe.ir import Placement
from dualpipe.registry import FALLBACK, SCHEDULES, kind_for_size
from model.config import CutError, ModelConfig, cut_at, cut_layers
from train.config import TrainConfig, sized_config
from train.predict.layer_times import (
    LaneWork,
    LayerTimes,
    ModelWork,
    lockstep_loads,
    model_work,
    nominal_times,
    pace,
    rank_groups,
    runs_in_lockstep,
    stage_works,
    times_of_ranks,
)

_KEY = "parallelism.cut"
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


def num_stages(model: ModelConfig, pipeline: int, kind: str, chunks: int | None) -> int:
    """Returns the number of stages of a kind of schedule, the smallest by default."""
    spec = SCHEDULES.get(kind)
    return spec.num_stages(pipeline, spec.chunk_choices(chunks)[0])


def run_stages(config: TrainConfig, kind: str) -> int:
    """Returns `num_stages` of the run's model; a listed cut determines the number of chunks."""
    return num_stages(config.model, config.parallelism.pipeline, kind, run_chunks(config))


def run_chunks(config: TrainConfig) -> int | None:
    """Returns the chunks of a rank that the configuration determines, or None if they may be chosen."""
    chunks, rest = divmod(len(config.parallelism.cut.layers), config.parallelism.pipeline)
    return config.schedule.chunks if rest or not chunks else chunks


def run_placement(config: TrainConfig, kind: str) -> Placement:
    """Returns the placement of the run's stages under a kind of schedule, for `auto` that of `FALLBACK`."""
    kind = FALLBACK if kind == "auto" else kind
    pipeline = config.parallelism.pipeline
    return SCHEDULES.get(kind).placement(pipeline, run_stages(config, kind) // pipeline)


def run_cut(config: TrainConfig, placement: Placement, times: LayerTimes | None = None) -> tuple[range, ...]:
    """Returns the layers of each stage. Every process computes the same from the same arguments.

    Without measured times, the work of the model's parts is estimated.

    Raises:
        CutError: the model has fewer layers than stages, or the list does not fit the model and the stages.
    """
    model = config.model
    cut = config.parallelism.cut
    num_stages = len(placement[0])
    if cut.kind == "listed":
        _check_listed(cut.layers, config, num_stages)
        return cut_at(cut.layers)
    per_rank = num_stages // config.parallelism.pipeline
    even = cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=per_rank)
    if cut.kind == "even":
        return even
    sizes = _cached_cut(model_work(times or nominal_times(config), config), placement)
    assert sizes is not None
    return cut_at(sizes)


def with_cut(config: TrainConfig, cut: Sequence[range]) -> TrainConfig:
    """Returns the configuration with a listed cut."""
    listed = Cut("listed", tuple(map(len, cut)))
    return replace(config, parallelism=replace(config.parallelism, cut=listed))


def _check_listed(sizes: tuple[int, ...], config: TrainConfig, num_stages: int) -> None:
    """Rejects a list that does not fit the model and the number of stages."""
    layers = config.model.num_layers
    last = len(sizes) - 1
    correction = f"is {_text(sizes)}; nearest valid: {_text(_nearest(sizes, config, num_stages))}"
    if len(sizes) != num_stages:
        raise CutError(
            f"{_KEY}: must list the layers of {num_stages} stages, because schedule={config.schedule.kind} has so many "
            f"with parallelism.pipeline={config.parallelism.pipeline}, lists {len(sizes)}, {correction}, or auto"
        )
    empty = [stage for stage, size in enumerate(sizes) if size == 0 and stage not in (0, last)]
    if empty:
        raise CutError(
            f"{_KEY}: every stage except the first and the last must have at least one layer, stage {empty[0]} has "
            f"none, {correction}, or auto"
        )
    if sum(sizes) != layers:
        raise CutError(
            f"{_KEY}: must add up to model.num_layers={layers}, adds up to {sum(sizes)}, {correction}, or auto"
        )


def _nearest(sizes: tuple[int, ...], config: TrainConfig, num_stages: int) -> tuple[int, ...]:
    """Returns the list with as few changes as possible, or the even cut for another number of stages."""
    model = config.model
    last = num_stages - 1
    least = [int(stage not in (0, last)) for stage in range(num_stages)]
    if len(sizes) != num_stages or sum(least) > model.num_layers:
        return tuple(map(len, cut_layers(model.num_layers, num_stages, model.mtp_depth)))
    changed = list(map(max, sizes, least))
    while sum(changed) != model.num_layers:
        change = 1 if sum(changed) < model.num_layers else -1
        open_stages = [stage for stage in range(num_stages) if changed[stage] + change >= least[stage]]
        changed[min(open_stages, key=lambda stage: (change * changed[stage], stage))] += change
    return tuple(changed)


def _text(sizes: Sequence[int]) -> str:
    return f"[{','.join(map(str, sizes))}]"


def sized_run(config: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the configuration of a run with one size of its batch ramp, and no ramp.

    If the configured schedule does not accept the size, another one with the same placement is configured.

    Raises:
        ScheduleError: no schedule with this placement accepts the size.
    """
    sized = sized_config(config, sequences)
    kind = config.schedule.kind
    pipeline = config.parallelism.pipeline
    if kind == "auto":
        return sized
    chunks = run_stages(config, kind) // pipeline
    sized_kind = kind_for_size(kind, pipeline, sized.num_micro_batches, chunks, micro_batches_key="batch.ramp")
    if sized_kind == kind:
        return sized
    return replace(sized, schedule=replace(config.schedule, kind=sized_kind, chunks=chunks))


def ramp_notices(config: TrainConfig) -> Iterator[str]:
    """Yields a line for consecutive sizes of the ramp that do not use the configured schedule."""
    kinds = [(size, sized_run(config, size).schedule.kind) for size in config.batch_sizes.sizes]
    for kind, group in groupby(kinds, key=lambda item: item[1]):
        if kind != config.schedule.kind:
            sizes = [size for size, _ in group]
            span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            yield (
                f"batch.ramp: steps of {span} sequences use schedule {kind}, which has the same placement, because "
                f"{config.schedule.kind} is not defined for their number of micro-batches"
            )


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
            sum(size for size, stage_group in zip(sizes, groups, strict=True) if stage_group == group) <= most
            for group, most in self.layers.items()
        )


def balanced_cut(model: ModelWork, placement: Placement, limits: CutLimits | None = None) -> tuple[int, ...] | None:
    """Returns the number of layers of each stage in the best contiguous cut.

    Every stage has at least one layer, except that the last one may have none besides its heads. The best cut has the
    fastest pace. Among cuts within 2 % of it, a fast pace and a small largest stage come first, then even ranks and
    stages, then few layers in early stages, of which a schedule keeps the most activations.

    None if no cut keeps the limits. The model has at least as many layers as there are stages.
    """
    if model.num_moe == 0:
        # Layers of one kind need no search.
        model = replace(model, num_dense=0, num_moe=model.num_dense, moe=model.dense)
    limits = limits or CutLimits()
    num_stages = len(placement[0])
    fillings = list[tuple[int, ...]]()
    for dense in islice(_dense_sizes(model.num_dense, num_stages, model.num_layers / num_stages), _MOST_TRIED):
        filling = _Filling(model, placement, limits, dense)
        if filling.run():
            fillings.append(tuple(filling.sizes))
    if not fillings:
        return None
    most = (1 + _TOLERANCE) * min(pace(stage_works(sizes, model), placement) for sizes in fillings)
    starts = sorted(fillings, key=lambda sizes: _score(sizes, model, placement, most))
    tried = starts[: _MOST_STARTS if runs_in_lockstep(placement) else 1]
    cuts = (_climb(start, model, placement, limits, most) for start in tried)
    return min(cuts, key=lambda sizes: _score(sizes, model, placement, most))


_cached_cut = lru_cache(maxsize=256)(balanced_cut)


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
    squares = sum((time - 1) ** 2 for ratios in (ranks, stages) for time in ratios) / len(stages)
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
        self._num_copies = [max(map(ranks.count, ranks)) for ranks in zip(*placement, strict=True)]
        # MoE layers can join the last dense layers, or come later.
        self._open = range(max(0, len(dense) - 1), last + 1)
        self._stages = stage_works(self.sizes, model)
        self._totals: dict[int, LaneWork] = defaultdict(LaneWork)
        for group, work, copies in zip(self._groups, self._stages, self._num_copies, strict=True):
            self._totals[group] += work * copies

    def run(self) -> bool:
        """Adds all layers. Returns whether there are enough layers, and whether the limits are kept."""
        left = self._model.num_layers - sum(self.sizes)
        for _ in range(left):
            stage = min(filter(self._has_room, self._open), key=self._cost_with_another, default=None)
            if stage is None:
                return False
            self.sizes[stage] += 1
            self._stages[stage] += self._model.moe
            self._totals[self._groups[stage]] += self._model.moe * self._num_copies[stage]
        return left >= 0 and self._limits.allow(self.sizes, self._groups)

    def _has_room(self, stage: int) -> bool:
        grown = [size + (index == stage) for index, size in enumerate(self.sizes)]
        return not self._limits.layers or self._limits.allow(grown, self._groups)

    def _cost_with_another(self, stage: int) -> tuple[float, ...]:
        """Returns the time of the stage's rank, then of the stage, with one more MoE layer."""
        group = self._groups[stage]
        moe = self._model.moe
        total = self._totals[group] + moe * self._num_copies[stage]
        stage_time = 0.0 if group in self._limits.late else (self._stages[stage] + moe).time
        return round(total.time, _DIGITS), group, round(stage_time, _DIGITS), -stage
