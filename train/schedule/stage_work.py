"""Adds up the work of a model's parts in pipeline stages and on pipeline ranks. No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass

from dualpipe.ir import Placement


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
    """Work of one micro-batch, forward and backward, in the parts of a model.

    Attributes:
        num_dense: number of dense layers.
        num_moe: number of MoE layers, which follow the dense ones.
        embedding: of the embedding, in the first stage.
        dense: of one dense layer.
        moe: of one MoE layer.
        heads: of all heads and MTP modules, in the last stage.
    """

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


def rank_times(sizes: Sequence[int], model: ModelWork, placement: Placement) -> tuple[float, ...]:
    """Returns the work of every pipeline rank with one micro-batch per direction.

    Args:
        sizes: number of layers of each stage.
        model: work of the model's parts.
        placement: for each direction, the rank of each stage.
    """
    return times_of_ranks(stage_works(sizes, model), placement)


def times_of_ranks(works: Sequence[LaneWork], placement: Placement) -> tuple[float, ...]:
    """Returns the time of every pipeline rank, given the work of every stage."""
    totals = [LaneWork()] * (max(max(row) for row in placement) + 1)
    for stage, work in enumerate(works):
        for row in placement:
            totals[row[stage]] += work
    return tuple(total.time for total in totals)


def stage_works(sizes: Sequence[int], model: ModelWork) -> list[LaneWork]:
    """Returns the work of every stage.

    Args:
        sizes: number of layers of each stage.
        model: work of the model's parts.
    """
    first, works = 0, []
    for stage, size in enumerate(sizes):
        dense = max(0, min(size, model.num_dense - first))
        work = model.dense * dense + model.moe * (size - dense)
        works.append(work + model.embedding * (stage == 0) + model.heads * (stage == len(sizes) - 1))
        first += size
    return works


def rank_groups(placement: Placement) -> tuple[int, ...]:
    """Returns the group of each stage; ranks of a group share stages, as mirror pairs do.

    A group has the number of its first rank.
    """
    group = list(range(max(max(row) for row in placement) + 1))
    for ranks in zip(*placement, strict=True):
        merged = {group[rank] for rank in ranks}
        group = [min(merged) if number in merged else number for number in group]
    return tuple(group[rank] for rank in placement[0])
