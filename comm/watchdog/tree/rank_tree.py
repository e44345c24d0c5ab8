"""Arranges the ranks of a job as a tree, so that each rank deals with a few blocks at most.

A block is 64 consecutive ranks, with its first rank as leader. 64 blocks form a group of the next level, and so on. The
environment of the launcher plays no part: every rank computes the same tree from its rank and the world size.
"""

from collections.abc import Iterator
from dataclasses import dataclass

FANOUT = 64
_ROTATION = 13  # ranks per turn: a leader of one turn, and all of its node, are ordinary ranks in the next ones
MAX_TURNS = 64


@dataclass(frozen=True, slots=True)
class RankTree:
    """Tree of all ranks.

    Attributes:
        world_size: number of ranks.
        fanout: ranks of a block, and blocks or groups of a group of the next level.
    """

    world_size: int
    fanout: int = FANOUT

    @property
    def is_flat(self) -> bool:
        """Whether all ranks are in one block, so that each sends to all others itself."""
        return self.world_size <= self.fanout

    @property
    def num_levels(self) -> int:
        """Number of levels above the ranks. The group of the last level is led by rank 0."""
        level, reach = 1, self.fanout
        while reach < self.world_size:
            level, reach = level + 1, reach * self.fanout
        return level

    @property
    def num_blocks(self) -> int:
        """Number of blocks; the last one may be partly filled."""
        return -(-self.world_size // self.fanout)

    def block(self, rank: int) -> range:
        """Returns the ranks of this rank's block."""
        return self.group(1, rank // self.fanout)

    def group(self, level: int, index: int) -> range:
        """Returns the members of a group: the ranks of a block, or the leaders of the groups one level below."""
        size = self.fanout**level
        return range(index * size, min((index + 1) * size, self.world_size), size // self.fanout)

    def path(self, rank: int) -> list[int]:
        """Returns the index of this rank's group at each level, from its block up to the root."""
        return [rank // self.fanout**level for level in range(1, self.num_levels + 1)]

    def led_levels(self, rank: int) -> list[int]:
        """Returns the levels whose group this rank leads, ascending. Empty for most ranks."""
        return [level for level in range(1, self.num_levels + 1) if rank % self.fanout**level == 0]

    def children(self, rank: int, origin: int = 0, turn: int = 0) -> Iterator[int]:
        """Yields the ranks to which this rank forwards a broadcast.

        Args:
            origin: rank that sends the broadcast, the root of its tree.
            turn: number of the broadcast. Each turn has other leaders, so a lost one costs one turn alone.
        """
        label = self._label(rank, origin, turn)
        for level in range(self.num_levels):
            size = self.fanout**level
            if label % (size * self.fanout):
                break  # the label leads no group of this level
            for child in range(label + size, min(label + size * self.fanout, self.world_size), size):
                yield self._rank(child, origin, turn)

    def parent(self, rank: int, origin: int = 0, turn: int = 0) -> int | None:
        """Returns the rank from which this rank receives a broadcast, or None for its origin."""
        label = self._label(rank, origin, turn)
        if label == 0:
            return None
        size = 1
        while label % (size * self.fanout) == 0:
            size *= self.fanout
        return self._rank(label - label % (size * self.fanout), origin, turn)

    def _label(self, rank: int, origin: int, turn: int) -> int:
        """Returns the place of a rank in the tree of a broadcast: 0 for its origin, others rotated by turn."""
        if rank == origin:
            return 0
        ahead = (rank - origin) % self.world_size - 1
        return 1 + (ahead - turn * _ROTATION) % (self.world_size - 1)

    def _rank(self, label: int, origin: int, turn: int) -> int:
        """Returns the rank at a place of the tree."""
        if label == 0:
            return origin
        return (origin + 1 + (label - 1 + turn * _ROTATION) % (self.world_size - 1)) % self.world_size
