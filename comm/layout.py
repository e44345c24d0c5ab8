"""Computes coordinates, groups and relays of ranks by arithmetic, for any size. Imports no torch.

The groups into which the world is split are slices of ranks, one group at a time. The relay of another rank's rows is
the rank with the same index in its node.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

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
        return pipeline_index * mesh.stage_ranks + data_index * mesh.context + context_index

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
        ranks = self.ranks_at(self._replica_indices(rank, mirrored=mirrored))
        return ranks[self.expert_index(rank) :: self.parallelism.expert]

    def _replica_indices(self, rank: int, *, mirrored: bool) -> list[int]:
        index = self.pipeline_index(rank)
        return sorted({index, self.parallelism.pipeline - 1 - index}) if mirrored else [index]


class Relays:
    """Members of an expert group and their nodes, which are renumbered from 0 in ascending order."""

    node_of: tuple[int, ...]  # node of each member
    members_of: tuple[tuple[int, ...], ...]  # members of each node by their index in the group, ascending

    def __init__(self, member_nodes: Sequence[int]) -> None:
        nodes = sorted(set(member_nodes))
        self.node_of = tuple(nodes.index(node) for node in member_nodes)
        self.members_of = tuple(
            tuple(member for member, node in enumerate(self.node_of) if node == number) for number in range(len(nodes))
        )

    @property
    def num_nodes(self) -> int:
        """Number of nodes."""
        return len(self.members_of)

    @property
    def num_most_members(self) -> int:
        """Number of members of the fullest node."""
        return max(map(len, self.members_of))

    def relay(self, member: int, node: int) -> int:
        """Returns the member that relays rows of `member` into a node; on its own node, itself."""
        home_members = self.members_of[self.node_of[member]]
        node_members = self.members_of[node]
        return node_members[home_members.index(member) % len(node_members)]

    def sources(self, relay: int) -> tuple[int, ...]:
        """Returns the members of other nodes for which a member relays rows into its node, ascending."""
        node = self.node_of[relay]
        return tuple(
            member for member, home in enumerate(self.node_of) if home != node and self.relay(member, node) == relay
        )

    def rails(self) -> tuple[tuple[int, ...], ...]:
        """Splits the members into most sets that hold their members' relays: one per index if nodes are equal."""
        # Connected components of the graph "relays rows of".
        unseen = set(range(len(self.node_of)))
        rails = []
        while unseen:
            rail = set()
            pending = [min(unseen)]
            while pending:
                member = pending.pop()
                if member not in rail:
                    rail.add(member)
                    pending += self.sources(member)
                    pending += [self.relay(member, node) for node in range(self.num_nodes)]
            unseen -= rail
            rails.append(tuple(sorted(rail)))
        return tuple(rails)


Slices = tuple[range, ...]
"""Ranks of one group as disjoint ascending slices. The groups of a partition are ordered by their lowest rank."""


def expert_partition(layout: Layout) -> Iterator[Slices]:
    """Yields the groups of `Layout.expert_group`."""
    size = layout.parallelism.expert
    return ((range(first, first + size),) for first in range(0, layout.world_size, size))


def pipeline_partition(layout: Layout) -> Iterator[Slices]:
    """Yields the groups of `Layout.pipeline_group`."""
    size = layout.parallelism.stage_ranks
    return ((range(first, layout.world_size, size),) for first in range(size))


def context_partition(layout: Layout) -> Iterator[Slices]:
    """Yields the groups of `Layout.context_group`."""
    size = layout.parallelism.context
    return ((range(first, first + size),) for first in range(0, layout.world_size, size))


def stage_partition(layout: Layout, *, mirrored: bool) -> Iterator[Slices]:
    """Yields the groups of `Layout.stage_group`."""
    for indices in _replica_indices(layout, mirrored=mirrored):
        yield tuple(range(layout.rank(index, 0), layout.rank(index + 1, 0)) for index in indices)


def expert_data_partition(layout: Layout, *, mirrored: bool) -> Iterator[Slices]:
    """Yields the groups of `Layout.expert_data_group`."""
    step = layout.parallelism.expert
    for indices in _replica_indices(layout, mirrored=mirrored):
        blocks = [(layout.rank(index, 0), layout.rank(index + 1, 0)) for index in indices]
        for expert_index in range(step):
            yield tuple(range(first + expert_index, end, step) for first, end in blocks)


def node_partition(layout: Layout) -> Iterator[Slices]:
    """Yields each expert group split by node."""
    return _split_expert_groups(layout, lambda relays: relays.members_of)


def rail_partition(layout: Layout) -> Iterator[Slices]:
    """Yields each expert group split by rail. Rows cross nodes only within a rail."""
    return _split_expert_groups(layout, Relays.rails)


def distinct_expert_groups(layout: Layout) -> list[range]:
    """Returns one expert group for each way to lie on nodes: the first rank's index within its node."""
    size = layout.parallelism.expert
    first_by_offset: dict[int, int] = {}
    for first in range(0, layout.world_size, size):
        if first_by_offset.setdefault(first % layout.ranks_per_node, first) != first:
            break  # the offsets repeat from here on
    return [range(first, first + size) for first in first_by_offset.values()]


def _replica_indices(layout: Layout, *, mirrored: bool) -> Iterator[tuple[int, ...]]:
    """Yields the pipeline indices that hold the same stages: pairs of mirrors, or single indices."""
    num_indices = layout.parallelism.pipeline
    for index in range((num_indices + 1) // 2 if mirrored else num_indices):
        mirror = num_indices - 1 - index if mirrored else index
        yield (index,) if mirror == index else (index, mirror)


def _split_expert_groups(layout: Layout, split: Callable[[Relays], Sequence[Sequence[int]]]) -> Iterator[Slices]:
    """Yields the parts of each expert group, which `split` returns as indices within the group."""
    # The parts depend only on how the group lies on nodes, so they are computed once for each such way.
    parts_by_offset = {}
    for group in distinct_expert_groups(layout):
        parts = split(Relays([layout.node_of(rank) for rank in group]))
        parts_by_offset[group.start % layout.ranks_per_node] = [_as_slices(part) for part in parts]
    for (group,) in expert_partition(layout):
        for part in parts_by_offset[group.start % layout.ranks_per_node]:
            yield tuple(group[part_slice.start : part_slice.stop : part_slice.step] for part_slice in part)


def _as_slices(members: Sequence[int]) -> Slices:
    """Returns ascending numbers as one slice if their distances are equal, else as one for each number."""
    steps = {high - low for low, high in pairwise(members)} or {1}
    if len(steps) == 1:
        return (range(members[0], members[-1] + 1, *steps),)
    return tuple(range(member, member + 1) for member in members)


MOST_GATHERED_RANKS = 16
"""Largest context group that gathers the rows of all ranks; a larger one passes them around a ring."""


def num_kept_ranks(size: int) -> int:
    """Returns how many other ranks' rows a rank keeps until the backward."""
    return size - 1 if size <= MOST_GATHERED_RANKS else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextBytes:
    """Bytes that one rank sends to other ranks for one layer and micro-batch."""

    forward: int
    backward: int


def forecast_context_bytes(
    *,
    size: int,
    num_tokens: int,
    row_bytes: int,
    gradient_bytes: int,
    wide_gradient_bytes: int,
    is_ring: bool,
    slices: int = 1,
) -> ContextBytes:
    """Predicts what a rank sends for whole sequences. Each of c ranks holds T / c tokens of each sequence.

    With an all-gather, a rank sends the rows of its tokens to c - 1 ranks, and in the backward one part of the gradient
    to each of them. In a ring it forwards c - 1 messages as large as its own rows, and as many again in the backward,
    with as many sums of gradients in `wide_gradient_bytes` per token. `num_tokens` are those of all ranks of the group.
    With n slices of equal length, the gradients of each are sent (n + 1) / 2 times on average, and in a ring the rows.
    """
    sent = num_tokens // size * (size - 1)
    again = sent * (slices + 1) // 2
    if is_ring:
        return ContextBytes(forward=again * row_bytes, backward=again * (row_bytes + wide_gradient_bytes))
    return ContextBytes(forward=sent * row_bytes, backward=again * gradient_bytes)
