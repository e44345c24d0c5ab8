"""Bounds the memory of a layout's ranks from below by arithmetic. No torch here.

Weights, gradients, optimizer state, FP8 copies and the reserve are exact for a given cut. Of the passes only what a
micro-batch keeps from F to I and from I to W is counted, so the bound is below the prediction by its transient tensors.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dualpipe.ir import Op, Placement, Schedule
from model.size import HeldParameters, Sizes, StageShape, held_parameters, stage_phases, stage_shapes
from train.config import TrainConfig
from train.memory.predict import planning_sizes
from train.memory.static import ReplicaCounts, static_bytes

LiveCounts = tuple[tuple[tuple[int, int, int], ...], ...]
"""For each of some moments: (stage, micro-batches between F and I, micro-batches between I and W)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptBytes:
    """Bytes that one micro-batch keeps in a part of the model.

    Attributes:
        activations: from F to I.
        pending: from I to W.
    """

    activations: int = 0
    pending: int = 0

    def __add__(self, other: "KeptBytes") -> "KeptBytes":
        """Returns the sum of both."""
        return KeptBytes(activations=self.activations + other.activations, pending=self.pending + other.pending)

    def __mul__(self, count: int) -> "KeptBytes":
        """Returns the bytes of several equal parts."""
        return KeptBytes(activations=self.activations * count, pending=self.pending * count)


@dataclass(frozen=True, kw_only=True, slots=True)
class PartBytes:
    """Bytes that one micro-batch keeps in each part of the model."""

    embedding: KeptBytes
    dense: KeptBytes
    moe: KeptBytes
    heads: KeptBytes

    @classmethod
    def of_run(cls, sizes: Sizes) -> "PartBytes":
        """Returns the bytes of the parts of a run's model."""
        first = sizes.config.num_dense_layers

        def kept(layers: range, *, is_first: bool = False, is_last: bool = False) -> KeptBytes:
            phases = stage_phases(sizes, StageShape(layers=layers, is_first=is_first, is_last=is_last))
            activations = sum(phase.kept for phase in phases)
            return KeptBytes(activations=activations, pending=sum(phase.waiting for phase in phases))

        return cls(
            embedding=kept(range(0), is_first=True),
            dense=kept(range(min(1, first))),
            moe=kept(range(first, first + 1)),
            heads=kept(range(0), is_last=True),
        )

    def of_stage(self, shape: StageShape, num_dense_layers: int) -> KeptBytes:
        """Returns the bytes of a stage.

        Args:
            shape: layers and ends of the stage.
            num_dense_layers: dense layers of the model, which come first.
        """
        dense = sum(layer < num_dense_layers for layer in shape.layers)
        kept = self.dense * dense + self.moe * (len(shape.layers) - dense)
        return kept + self.embedding * shape.is_first + self.heads * shape.is_last


def mean_memory(config: TrainConfig, copies: int) -> int:
    """Returns the bytes that the mean rank needs at least, for any cut and any schedule.

    Args:
        copies: pipeline ranks that hold each stage.
    """
    mesh, model, sizes = config.parallelism, config.model, planning_sizes(config)
    whole = StageShape(layers=range(model.num_layers), is_first=True, is_last=True)
    held = held_parameters(model, [whole], sizes.num_local_experts)
    replicas = ReplicaCounts(
        dense=mesh.stage_ranks * copies,
        embedding=mesh.stage_ranks * copies,
        experts=mesh.stage_ranks // mesh.expert * copies,
    )
    static = sum(static_bytes(config, held, sizes, replicas)) + (held.code_bytes if sizes.is_fp8 else 0)
    # A copy of the embedding for MTP is in addition to this.
    kept = PartBytes.of_run(sizes).of_stage(whole, model.num_dense_layers).activations
    return (static * copies + kept) // mesh.pipeline + config.cluster.memory_reserve_bytes


def static_memory(config: TrainConfig, cut: Sequence[range], placement: Placement, sizes: Sizes) -> list[int]:
    """Returns the bytes of each rank outside its passes, with FP8 copies of weights and the reserve.

    Args:
        placement: for each direction, the rank of each stage.
    """
    shapes, pipeline = stage_shapes(cut), config.parallelism.pipeline
    ends = (0, len(cut) - 1) if config.model.mtp_depth else (0,)
    embeddings = config.parallelism.stage_ranks * len({row[stage] for row in placement for stage in ends})
    found, known = [], dict[tuple[int, ...], int]()
    for rank in range(pipeline):
        stages = tuple(sorted({stage for row in placement for stage, own in enumerate(row) if own == rank}))
        if stages not in known:
            held = held_parameters(config.model, [shapes[stage] for stage in stages], sizes.num_local_experts)
            known[stages] = _static_of_rank(config, held, sizes, _replicas(config, placement, rank, embeddings))
        found.append(known[stages])
    return found


def _replicas(config: TrainConfig, placement: Placement, rank: int, embeddings: int) -> ReplicaCounts:
    mesh = config.parallelism
    copies = 2 if len(placement) > 1 and 2 * rank + 1 != mesh.pipeline else 1
    held = mesh.stage_ranks * copies
    return ReplicaCounts(dense=held, embedding=embeddings, experts=held // mesh.expert)


def _static_of_rank(config: TrainConfig, held: HeldParameters, sizes: Sizes, replicas: ReplicaCounts) -> int:
    static = sum(static_bytes(config, held, sizes, replicas))
    return static + (held.code_bytes if sizes.is_fp8 else 0) + config.cluster.memory_reserve_bytes


def one_micro_batch(placement: Placement) -> list[LiveCounts]:
    """Returns what each rank keeps in any schedule: one micro-batch of a direction in all its stages.

    Args:
        placement: for each direction, the rank of each stage.
    """
    ranks = range(max(map(max, placement)) + 1)
    return [
        tuple(tuple((stage, 1, 0) for stage, own in enumerate(row) if own == rank) for row in placement)
        for rank in ranks
    ]


def live_counts(schedule: Schedule) -> list[LiveCounts]:
    """Returns how many micro-batches each rank keeps after its groups, where that may be the peak."""
    return [_counts_of_rank(schedule, rank) for rank in range(schedule.num_ranks)]


def _counts_of_rank(schedule: Schedule, rank: int) -> LiveCounts:
    alive: dict[int, list[int]] = {stage: [0, 0] for _, stage in schedule.stages_of(rank)}
    moments = set[tuple[tuple[int, int, int], ...]]()
    for group in schedule.ranks[rank]:
        for op in group:
            counts = alive[op.stage]
            if op.kind in (Op.FORWARD, Op.RELOAD):
                counts[0] += 1
            elif op.kind is not Op.BACKWARD_WEIGHT:
                counts[0] -= 1
            if op.kind in (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT):
                counts[1] += 1 if op.kind is Op.BACKWARD_INPUT else -1
        moments.add(tuple((stage, counts[0], counts[1]) for stage, counts in alive.items()))
    largest = sorted(moments, key=lambda moment: -sum(sum(each[1:]) for each in moment))
    kept = list[tuple[tuple[int, int, int], ...]]()
    for moment in largest:
        if not any(_covers(other, moment) for other in kept):
            kept.append(moment)
    return tuple(kept)


def _covers(one: Iterable[tuple[int, int, int]], other: Iterable[tuple[int, int, int]]) -> bool:
    """Returns whether one moment keeps at least as much as another of the same rank."""
    return all(mine[1] >= its[1] and mine[2] >= its[2] for mine, its in zip(one, other, strict=True))


def largest_memory(static: Sequence[int], counts: Sequence[LiveCounts], kept: Sequence[KeptBytes]) -> list[int]:
    """Returns the bytes that each rank needs at least.

    Args:
        static: bytes of each rank outside its passes.
        counts: what each rank keeps at some moments.
        kept: bytes of a micro-batch in each stage.
    """
    return [
        own
        + max(
            sum(kept[stage].activations * before + kept[stage].pending * after for stage, before, after in moment)
            for moment in moments
        )
        for own, moments in zip(static, counts, strict=True)
    ]
