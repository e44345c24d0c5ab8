"""Computes the coordinates and groups of ranks by arithmetic alone, for jobs of any size."""

from collections.abc import Iterable
from dataclasses import dataclass

from comm.config import ParallelismConfig


class LayoutError(ValueError):
    """Raised if a mesh cannot be laid out on ranks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of the mesh on ranks: rank = (pipeline_index * data + data_index) * context + context_index.

    A node is `ranks_per_node` consecutive ranks. The context axis varies fastest, then the data axis, and the expert
    axis divides both together. So a context group and an expert group are runs of consecutive ranks and fill whole
    nodes first (arXiv:2412.19437, section 3.2: 16-way pipeline, 64-way experts over 8 nodes). `mirrored`: pipeline
    ranks p and P-1-p hold the same stages, as under DualPipe; the middle rank of an odd number is its own mirror.

    Raises LayoutError if an axis is below 1, or the expert axis does not divide data x context.
    """

    parallelism: ParallelismConfig
    ranks_per_node: int

    def __post_init__(self) -> None:
        mesh = self.parallelism
        sizes = (("pipeline", mesh.pipeline), ("data", mesh.data), ("expert", mesh.expert), ("context", mesh.context))
        for name, size in (*sizes, ("ranks_per_node", self.ranks_per_node)):
            if size < 1:
                raise LayoutError(f"layout: {name} must be at least 1, is {size}")
        if mesh.stage_ranks % mesh.expert:
            nearest = max(size for size in range(1, mesh.expert + 1) if mesh.stage_ranks % size == 0)
            divided = f"data={mesh.data}" if mesh.context == 1 else f"data x context={mesh.stage_ranks}"
            raise LayoutError(f"layout: expert must divide {divided}, is {mesh.expert}; nearest valid: {nearest}")

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.parallelism.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes in the job; the last one may be partly used."""
        return -(-self.world_size // self.ranks_per_node)

    def rank(self, pipeline_index: int, data_index: int, context_index: int = 0) -> int:
        """Returns the rank at these coordinates of the mesh."""
        mesh = self.parallelism
        return (pipeline_index * mesh.data + data_index) * mesh.context + context_index

    def pipeline_index(self, rank: int) -> int:
        """Returns the index along the pipeline axis."""
        return rank // self.parallelism.stage_ranks

    def data_index(self, rank: int) -> int:
        """Returns the index along the data axis. Ranks with different indices read different sequences."""
        return rank // self.parallelism.context % self.parallelism.data

    def context_index(self, rank: int) -> int:
        """Returns the index along the context axis: the rank's part of each sequence."""
        return rank % self.parallelism.context

    def member_index(self, rank: int) -> int:
        """Returns the index among the ranks at its pipeline index, which is also the number of its pipeline."""
        return rank % self.parallelism.stage_ranks

    def expert_index(self, rank: int) -> int:
        """Returns the index within the expert group: the rank's slice of each layer's routed experts."""
        return self.member_index(rank) % self.parallelism.expert

    def node_of(self, rank: int) -> int:
        """Returns the node that the rank runs on."""
        return rank // self.ranks_per_node

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that together hold all routed experts of this rank's stages, by expert index."""
        first = rank - self.expert_index(rank)
        return tuple(range(first, first + self.parallelism.expert))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks of this rank's pipeline, ordered by pipeline index."""
        return tuple(range(self.member_index(rank), self.world_size, self.parallelism.stage_ranks))

    def context_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that share this rank's sequences, ordered by context index."""
        first = rank - self.context_index(rank)
        return tuple(range(first, first + self.parallelism.context))

    def stage_group(self, rank: int, *, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks with the same non-expert parameters: data x context, times mirror if mirrored."""
        return self.ranks_at(self._replica_indices(rank, mirrored=mirrored))

    def ranks_at(self, pipeline_indices: Iterable[int]) -> tuple[int, ...]:
        """Returns all ranks at some indices along the pipeline axis: these indices times data x context."""
        size = self.parallelism.stage_ranks
        return tuple(rank for index in sorted(pipeline_indices) for rank in range(index * size, (index + 1) * size))

    def expert_data_group(self, rank: int, *, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks with the same routed experts: the expert-data axis, times mirror if mirrored."""
        held = self.ranks_at(self._replica_indices(rank, mirrored=mirrored))
        return held[self.expert_index(rank) :: self.parallelism.expert]

    def _replica_indices(self, rank: int, *, mirrored: bool) -> list[int]:
        index = self.pipeline_index(rank)
        return sorted({index, self.parallelism.pipeline - 1 - index}) if mirrored else [index]
