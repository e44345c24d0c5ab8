"""Which rank does what: arithmetic on rank numbers alone, so that a job of any size can be reasoned about anywhere."""

from dataclasses import dataclass

from comm.config import ParallelismConfig
from comm.relays import Relays


class LayoutError(ValueError):
    """A mesh that cannot be laid out on ranks."""


@dataclass(frozen=True, slots=True)
class Layout:
    """rank = pipeline_index * data + data_index, nodes being `ranks_per_node` consecutive ranks.

    The data axis is the fast one, so an expert group is a run of consecutive ranks and fills whole nodes
    before it spills (arXiv:2412.19437, section 3.2: 16-way pipeline, 64-way experts over 8 nodes).
    An argument `mirrored` says whether pipeline ranks p and P-1-p hold the same stages, as under DualPipe;
    the middle one of an odd number is its own mirror.

    Raises:
        LayoutError: an axis below 1, or a data axis that the expert axis does not divide.
    """

    parallelism: ParallelismConfig
    ranks_per_node: int

    def __post_init__(self) -> None:
        mesh = self.parallelism
        sizes = (("pipeline", mesh.pipeline), ("data", mesh.data), ("expert", mesh.expert))
        for name, size in (*sizes, ("ranks_per_node", self.ranks_per_node)):
            if size < 1:
                raise LayoutError(f"layout: {name} must be at least 1, got {size}")
        if mesh.data % mesh.expert:
            nearest = max(size for size in range(1, mesh.expert + 1) if mesh.data % size == 0)
            raise LayoutError(f"layout: expert must divide data={mesh.data}, got {mesh.expert}; {nearest} would")

    @property
    def world_size(self) -> int:
        """Ranks in the job."""
        return self.parallelism.world_size

    @property
    def num_nodes(self) -> int:
        """Nodes in the job; the last may be partly used."""
        return -(-self.world_size // self.ranks_per_node)

    def rank(self, pipeline_index: int, data_index: int) -> int:
        """Returns the rank at a place of the mesh."""
        return pipeline_index * self.parallelism.data + data_index

    def pipeline_index(self, rank: int) -> int:
        """Returns the place along the pipeline axis."""
        return rank // self.parallelism.data

    def data_index(self, rank: int) -> int:
        """Returns the place along the data axis."""
        return rank % self.parallelism.data

    def expert_index(self, rank: int) -> int:
        """Returns the place within the expert group: which slice of every layer's routed experts the rank holds."""
        return self.data_index(rank) % self.parallelism.expert

    def expert_data_index(self, rank: int) -> int:
        """Returns which of the data axis' expert groups the rank belongs to."""
        return self.data_index(rank) // self.parallelism.expert

    def mirror_rank(self, rank: int) -> int:
        """Returns the rank at the mirrored pipeline place, with the same data index."""
        return self.rank(self.parallelism.pipeline - 1 - self.pipeline_index(rank), self.data_index(rank))

    def node_of(self, rank: int) -> int:
        """Returns the node that the rank runs on."""
        return rank // self.ranks_per_node

    def expert_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks that together hold every routed expert of this rank's stages, by expert index."""
        first = rank - self.expert_index(rank)
        return tuple(range(first, first + self.parallelism.expert))

    def node_groups(self, rank: int) -> set[tuple[int, ...]]:
        """Returns the ranks of this rank's expert group, one set for each node; ascending."""
        experts = self.expert_group(rank)
        return {tuple(experts[place] for place in places) for places in self._relays(experts).members_of}

    def rail_groups(self, rank: int) -> set[tuple[int, ...]]:
        """Returns the ranks of this rank's expert group, one set for each rail, within which rows cross nodes."""
        experts = self.expert_group(rank)
        return {tuple(experts[place] for place in places) for places in self._relays(experts).rails()}

    def pipeline_group(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks of this rank's pipeline, by pipeline index."""
        data_index = self.data_index(rank)
        return tuple(self.rank(pipeline_index, data_index) for pipeline_index in range(self.parallelism.pipeline))

    def stage_group(self, rank: int, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks that hold the same ordinary parameters, ascending: data, times mirror if mirrored."""
        return tuple(
            self.rank(pipeline_index, data_index)
            for pipeline_index in self._replica_places(rank, mirrored)
            for data_index in range(self.parallelism.data)
        )

    def expert_data_group(self, rank: int, mirrored: bool) -> tuple[int, ...]:
        """Returns the ranks that hold the same routed experts, ascending: expert-data, times mirror if mirrored."""
        expert_index = self.expert_index(rank)
        return tuple(
            self.rank(pipeline_index, data_index)
            for pipeline_index in self._replica_places(rank, mirrored)
            for data_index in range(expert_index, self.parallelism.data, self.parallelism.expert)
        )

    def _relays(self, experts: tuple[int, ...]) -> Relays:
        return Relays([self.node_of(rank) for rank in experts])

    def _replica_places(self, rank: int, mirrored: bool) -> list[int]:
        place = self.pipeline_index(rank)
        return sorted({place, self.parallelism.pipeline - 1 - place}) if mirrored else [place]
