"""Computes the coordinates and groups of ranks by arithmetic alone, for jobs of any size."""

from collections.abc import Iterable
from dataclasses import dataclass

from comm.config import ParallelismConfig


class LayoutError(ValueError):
    """Raised if a mesh cannot be laid out on ranks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Layout of the mesh on ranks: rank = pipeline_index * data + data_index.

    A node is `ranks_per_node` consecutive ranks. The data axis varies fastest, so an expert group is a run of
    consecutive ranks and fills whole nodes first (arXiv:2412.19437, section 3.2: 16-way pipeline, 64-way experts over
    8 nodes). The argument `mirrored` of some methods says whether pipeline ranks p and P-1-p hold the same stages, as
    under DualPipe. The middle rank of an odd number is its own mirror.

    Raises:
        LayoutError: if an axis is below 1, or the expert axis does not divide the data axis.
    """

    parallelism: ParallelismConfig
    ranks_per_node: int

    def __post_init__(self) -> None:
        mesh = self.parallelism
        sizes = (("pipeline", mesh.pipeline), ("data", mesh.data), ("expert", mesh.expert))
        for name, size in (*sizes, ("ranks_per_node", self.ranks_per_node)):
            if size < 1:
                raise LayoutError(f"layout: {name} must be at least 1, is {size}")
        if mesh.data % mesh.expert:
            nearest = max(size for size in range(1, mesh.expert + 1) if mesh.data % size == 0)
            raise LayoutError(
                f"layout: expert must divide data={mesh.data}, is {mesh.expert}; nearest valid: {nearest}"
            )

    @property
    def world_size(self) -> int:
        """Number of ranks in the job."""
        return self.parallelism.world_size

    @property
    def num_nodes(self) -> int:
        """Number of nodes in the job; the last one may be partly used."""
        return -(-self.world_size // self.ranks_per_node)

    def rank(self, pipeline_index: int, data_index: int) -> int:
        """Returns the rank at these coordinates of the mesh."""
        return pipeline_index * self.parallelism.data + data_index

    def pipeline_index(self, rank: int) -> int:
        """Returns the index along the pipeline axis."""
        return rank // self.parallelism.data

    def data_index(self, rank: int) -> int:
        """Returns the index along the data axis."""
        return rank % self.parallelism.data

    def expert_index(self, rank: int) -> int:
        """Returns the index within the expert group: the rank's slice of each layer's routed experts."""
        return self.data_index(rank) % self.parallelism.expert

    def expert_data_index(self, rank: int) -> int:
        """Returns the index of the rank's expert group along the data axis."""
        return self.data_index(rank) // self.parallelism.expert

    def mirror_rank(self, rank: int) -> int:
        """Returns the rank at the mirrored pipeline index, with the same data index."""
        return self.rank(self.parallelism.pipeline - 1 - self.pipeline_index(rank), self.data_index(rank))

    def node_of(self, rank: int) -> int:
        """Returns the node that the rank runs on."""
        return rank // self.ranks_per_node

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that together hold all routed experts of this rank's stages, by expert index."""
        first = rank - self.expert_index(rank)
        return tuple(range(first, first + self.parallelism.expert))

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks of this rank's pipeline, ordered by pipeline index."""
        data_index = self.data_index(rank)
        return tuple(self.rank(pipeline_index, data_index) for pipeline_index in range(self.parallelism.pipeline))

    def stage_group(self, rank: int, *, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks with the same non-expert parameters: the data axis, times mirror if mirrored."""
        return self.data_group(self._replica_indices(rank, mirrored=mirrored))

    def data_group(self, pipeline_indices: Iterable[int]) -> tuple[int, ...]:
        """Returns all ranks at some indices along the pipeline axis: these indices times the data axis."""
        return tuple(
            self.rank(pipeline_index, data_index)
            for pipeline_index in sorted(pipeline_indices)
            for data_index in range(self.parallelism.data)
        )

    def expert_data_group(self, rank: int, *, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks with the same routed experts: the expert-data axis, times mirror if mirrored."""
        expert_index = self.expert_index(rank)
        return tuple(
            self.rank(pipeline_index, data_index)
            for pipeline_index in self._replica_indices(rank, mirrored=mirrored)
            for data_index in range(expert_index, self.parallelism.data, self.parallelism.expert)
        )

    def _replica_indices(self, rank: int, *, mirrored: bool) -> list[int]:
        index = self.pipeline_index(rank)
        return sorted({index, self.parallelism.pipeline - 1 - index}) if mirrored else [index]
