"""Computes the costs of stages from measured or estimated times of the model's parts. No torch here."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import attrgetter

from base.ranges import NonNegativeFloat
from dualpipe.costs import CostModel, StageCosts
from dualpipe.ir import Placement, mirrored_placement
from model.size import count_work
from train.config import TrainConfig


@dataclass(frozen=True, slots=True)
class LaneWork:
    """Time of computation and of exchange, which overlap."""

    compute: float = 0.0
    exchange: float = 0.0

    def __add__(self, other: "LaneWork") -> "LaneWork":
        """Returns the sum of both lanes."""
        return LaneWork(self.compute + other.compute, self.exchange + other.exchange)

    def __mul__(self, times: float) -> "LaneWork":
        """Returns the work of several equal parts."""
        return LaneWork(self.compute * times, self.exchange * times)

    @property
    def time(self) -> float:
        """The time of the longer lane."""
        return max(self.compute, self.exchange)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelWork:
    """Work of one micro-batch, forward and backward, in the parts of a model; dense layers come first."""

    num_dense: int
    num_moe: int
    embedding: LaneWork
    dense: LaneWork
    moe: LaneWork
    heads: LaneWork

    @property
    def num_layers(self) -> int:
        """The number of layers without MTP modules."""
        return self.num_dense + self.num_moe


def times_of_ranks(works: Sequence[LaneWork], placement: Placement) -> tuple[float, ...]:
    """Returns the time of every pipeline rank, given the work of every stage."""
    totals = [LaneWork()] * (max(max(row) for row in placement) + 1)
    for stage, work in enumerate(works):
        for row in placement:
            totals[row[stage]] += work
    return tuple(total.time for total in totals)


def runs_in_lockstep(placement: Placement) -> bool:
    """Returns whether there are two mirrored directions and several chunks for each."""
    num_ranks = max(placement[0]) + 1
    chunks = len(placement[0]) // num_ranks
    return chunks > 1 and placement == mirrored_placement(num_ranks, chunks)


def lockstep_loads(works: Sequence[LaneWork], placement: Placement) -> list[list[float]]:
    """Returns what each mirror pair has to do in each slot of a block, relative to a micro-batch.

    With several chunks for each direction, a block of micro-batches runs one chunk after the other. In the lockstep
    order (`dualpipe.generate.lockstep`), F of stage s starts s slots after the block enters, its I 2S - 1 - s slots,
    and both last for P slots, so each F or I meets the same others in every block. F is taken as a third of the work.
    Slots are rounded to a quarter of P, as ranks may be a slot ahead or behind. A pair's mean is its ranks' work.
    """
    num_stages = len(works)
    num_ranks = max(placement[0]) + 1
    chunks = num_stages // num_ranks
    unit = max(1, num_ranks // 4)
    loads = []
    for pair in range(-(-num_ranks // 2)):
        lanes = [[0.0] * (num_stages + 1) for _ in range(2)]
        for row in placement:
            for stage in (stage for stage, rank in enumerate(row) if rank == pair):
                for start, share in ((stage, 1 / 3), (2 * num_stages - 1 - stage, 2 / 3)):
                    slot = (start + unit // 2) // unit * unit % num_stages
                    for lane, work in zip(lanes, (works[stage].compute, works[stage].exchange), strict=True):
                        _add_window(lane, slot, num_ranks, work * share * chunks)
        loads.append([max(both) for both in zip(*map(accumulate, lanes), strict=True)][:-1])
    return loads


def _add_window(changes: list[float], start: int, length: int, value: float) -> None:
    """Adds a value to slots, given as changes from slot to slot; the first slots follow the last."""
    last = len(changes) - 1
    end = start + length
    changes[start] += value
    changes[min(end, last)] -= value
    if end > last:
        changes[0] += value
        changes[end - last] -= value


def pace(works: Sequence[LaneWork], placement: Placement) -> float:
    """Returns the time of one micro-batch per direction in the steady state.

    It is that of the heaviest rank, or, with several chunks for each of two directions, the sum over the slots of the
    pair that is the heaviest in each of them.
    """
    heaviest = max(times_of_ranks(works, placement))
    if not runs_in_lockstep(placement):
        return heaviest
    slots: list[float] = [max(loads) for loads in zip(*lockstep_loads(works, placement), strict=True)]
    return max(heaviest, sum(slots) / len(slots))


def stage_works(sizes: Sequence[int], model: ModelWork) -> list[LaneWork]:
    """Returns the work of every stage."""
    first = 0
    works = []
    for stage, size in enumerate(sizes):
        dense = max(0, min(size, model.num_dense - first))
        work = model.dense * dense + model.moe * (size - dense)
        works.append(work + model.embedding * (stage == 0) + model.heads * (stage == len(sizes) - 1))
        first += size
    return works


def rank_groups(placement: Placement) -> tuple[int, ...]:
    """Returns the group of each stage, named for its first rank; mirror pairs share stages."""
    group = list(range(max(max(row) for row in placement) + 1))
    for ranks in zip(*placement, strict=True):
        merged = {group[rank] for rank in ranks}
        group = [min(merged) if number in merged else number for number in group]
    return tuple(group[rank] for rank in placement[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class PartTimes:
    """The seconds of one micro-batch in one part of the model, with computation and exchange separate."""

    forward: NonNegativeFloat = 0.0
    backward_input: NonNegativeFloat = 0.0
    backward_weight: NonNegativeFloat = 0.0
    forward_exchange: NonNegativeFloat = 0.0
    backward_exchange: NonNegativeFloat = 0.0

    def __add__(self, other: "PartTimes") -> "PartTimes":
        """Returns the times of both parts, one after the other."""
        return part_times(sum(both) for both in zip(_values(self), _values(other), strict=True))

    def __mul__(self, factor: float) -> "PartTimes":
        """Returns the times of several equal parts, or of a share of one."""
        return part_times(factor * seconds for seconds in _values(self))

    def without_overlap(self) -> "PartTimes":
        """Returns the times if nothing hides the exchange, which then counts as computation."""
        return PartTimes(
            forward=self.forward + self.forward_exchange,
            backward_input=self.backward_input + self.backward_exchange,
            backward_weight=self.backward_weight,
        )

    @property
    def work(self) -> LaneWork:
        """Forward and backward together."""
        return LaneWork(
            self.forward + self.backward_input + self.backward_weight, self.forward_exchange + self.backward_exchange
        )


_FIELDS = PartTimes.__slots__
_values = attrgetter(*_FIELDS)
"""Returns the fields of `PartTimes`, several times as fast as `astuple`: a search adds hundreds of thousands."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerTimes:
    """The times of a model's parts: layers, embedding, main head, and all MTP modules with heads.

    Parts that the model does not have take 0 s. `latency_seconds` is from a pipeline rank to the next, 0 without one.
    """

    dense: PartTimes
    moe: PartTimes
    embedding: PartTimes
    head: PartTimes
    mtp: PartTimes
    latency_seconds: NonNegativeFloat


def nominal_times(config: TrainConfig) -> LayerTimes:
    """Returns the configured costs of all ranks, divided among the parts by estimated work.

    Exchange takes time only if experts are sharded, and only in MoE layers.
    """
    model = config.model
    costs = config.costs
    work = count_work(
        model,
        config.batch.sequence_length_tokens,
        is_fp8=config.precision.kind == "fp8",
        context=config.parallelism.context,
    )
    exchanging = model.num_layers - model.num_dense_layers + model.mtp_depth
    per_work = config.parallelism.pipeline / work.total(model)
    exchange = 0.0
    if exchanging and config.parallelism.expert > 1:
        exchange = costs.exchange * config.parallelism.pipeline / exchanging

    def times(part: float, exchanges: int = 0) -> PartTimes:
        return PartTimes(
            forward=costs.forward * part * per_work,
            backward_input=costs.backward_input * part * per_work,
            backward_weight=costs.backward_weight * part * per_work,
            forward_exchange=exchange * exchanges,
            backward_exchange=exchange * exchanges,
        )

    return LayerTimes(
        dense=times(work.dense),
        moe=times(work.moe, 1),
        embedding=times(work.embedding),
        head=times(work.head),
        mtp=times(work.mtp, model.mtp_depth),
        latency_seconds=costs.latency,
    )


def stage_costs(times: LayerTimes, config: TrainConfig, cut: Sequence[range]) -> CostModel:
    """Returns the costs of each stage of the run's model, or of its slices, in the unit of the times.

    Activations are in units of model/P: each of P equal stages keeps 1. MTP modules count as layers. If groups run
    sequentially, the time of an exchange is added to computation, because nothing hides it. Copies to host memory are
    not measured: they take the configured multiple of computation.
    """
    model = config.model
    weight_of_all = model.num_layers + model.mtp_depth
    stages = []
    for stage, layers in enumerate(cut):
        is_last = stage == len(cut) - 1
        parts = [times.dense if layer < model.num_dense_layers else times.moe for layer in layers]
        parts += [times.embedding] * (stage == 0) + [times.head, times.mtp] * is_last
        share = config.parallelism.pipeline * (len(layers) + model.mtp_depth * is_last) / weight_of_all
        total = as_paired(sum(parts, PartTimes()), config)
        stages.append(StageCosts(**dict(zip(_FIELDS, _values(total), strict=True)), activation=share))
    return CostModel(
        stages=_with_copies(stages, config),
        latency=times.latency_seconds,
        slices=config.schedule.slices,
        link_depth=config.schedule.link_depth,
    )


def _with_copies(stages: Sequence[StageCosts], config: TrainConfig) -> tuple[StageCosts, ...]:
    """Returns the stages with the time of a copy to host memory, in the configured ratio to computation."""
    costs = config.costs
    if costs.offload is None:
        return tuple(stages)
    measured = sum(stage.forward + stage.backward_input + stage.backward_weight for stage in stages)
    unit = measured / config.parallelism.pipeline / (costs.forward + costs.backward_input + costs.backward_weight)
    return tuple(replace(stage, offload=unit * costs.offload * stage.activation) for stage in stages)


def model_work(times: LayerTimes, config: TrainConfig) -> ModelWork:
    """Returns the work of the model's parts, by which a cut is balanced."""
    model = config.model
    return ModelWork(
        num_dense=model.num_dense_layers,
        num_moe=model.num_layers - model.num_dense_layers,
        embedding=as_paired(times.embedding, config).work,
        dense=as_paired(times.dense, config).work,
        moe=as_paired(times.moe, config).work,
        heads=as_paired(times.head + times.mtp, config).work,
    )


def as_paired(times: PartTimes, config: TrainConfig) -> PartTimes:
    """Returns the times of a part in groups of the run, in which exchange may count as computation."""
    return times if config.schedule.pairing == "overlapped" else times.without_overlap()


def part_times(seconds: Iterable[float]) -> PartTimes:
    """Builds `PartTimes` from the values of its fields, in order."""
    return PartTimes(**dict(zip(_FIELDS, seconds, strict=True)))
