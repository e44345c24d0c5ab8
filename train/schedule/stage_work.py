"""Adds up the work of a model's parts in pipeline stages and on pipeline ranks. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from dualpipe.ir import Placement, mirrored_placement


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
