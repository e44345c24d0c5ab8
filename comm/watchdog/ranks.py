"""Describes sets of ranks, and arranges ranks as a tree, so that no message or rank's work grows.

A set is a few arithmetic progressions for a group of any size. In the tree, a block is 64 consecutive ranks with its
first rank as leader, 64 blocks form a group of the next level, and so on. Every rank computes the same tree.
"""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, Self

from comm.watchdog.wire import MessageError, decode_integer

FANOUT = 64
MAX_RUNS = 32  # most progressions in a message. They describe any group of up to 64 ranks, and every group of a mesh.
MAX_LISTED = 16
MAX_TURNS = 64
_MAX_NAMED_RUNS = 8
_ROTATION = 13  # ranks per turn: a leader of one turn, and all of its node, are ordinary ranks in the next ones


@dataclass(frozen=True, slots=True)
class RankSet:
    """Set of ranks as ascending, disjoint progressions, by first rank."""

    runs: tuple[range, ...]

    @classmethod
    def of(cls, ranks: Iterable[int]) -> "RankSet":
        """Returns the set of these ranks; ascending progressions are found greedily."""
        if isinstance(ranks, RankSet):
            return ranks
        if isinstance(ranks, range) and ranks.step > 0:
            return cls((ranks,) if ranks else ())
        return cls(tuple(_runs(sorted(set(ranks)))))

    @classmethod
    def from_json(cls, rows: Any, key: str, world_size: int) -> Self:
        """Decodes at most `MAX_RUNS` disjoint progressions, or raises `MessageError` that names `key`."""
        if not isinstance(rows, list) or len(rows) > MAX_RUNS:
            raise MessageError(f"{key}: not a list of at most {MAX_RUNS} progressions")
        runs: list[range] = []
        for row in rows:
            if not isinstance(row, list) or len(row) != 3:
                raise MessageError(f"{key}: not a progression: first, count and step")
            first = decode_integer(row[0], key, world_size)
            count, step = (decode_integer(number, key, world_size + 1) for number in row[1:])
            if not count or not step or first + (count - 1) * step >= world_size:
                raise MessageError(f"{key}: a progression is empty or leaves the job's ranks")
            run = range(first, first + (count - 1) * step + 1, step)
            if any(_overlap(run, earlier) for earlier in runs):
                raise MessageError(f"{key}: a rank is listed twice")
            runs.append(run)
        return cls(tuple(sorted(runs, key=lambda run: run.start)))

    def to_plain(self) -> list[list[int]]:
        """Returns first rank, count and step of each progression, at most `MAX_RUNS`."""
        return [[run.start, len(run), run.step] for run in self.runs[:MAX_RUNS]]

    def first(self, num_ranks: int) -> "RankSet":
        """Returns the first progressions, as many as a message holds, with at most `num_ranks` ranks in all."""
        runs: list[range] = []
        for run in self.runs[:MAX_RUNS]:
            if num_ranks > 0:
                runs.append(run[:num_ranks])
                num_ranks -= len(runs[-1])
        return RankSet(tuple(runs))

    def __len__(self) -> int:
        return sum(len(run) for run in self.runs)

    def __iter__(self) -> Iterator[int]:
        for run in self.runs:
            yield from run

    def __contains__(self, rank: object) -> bool:
        return any(rank in run for run in self.runs)

    def __str__(self) -> str:
        """Names the ranks, as in `0, 1, 2` or, for more than 16, `0 to 6271, 94080 to 100288 by 64`."""
        names = _names(self)
        if len(self) <= MAX_LISTED or len(self.runs) <= _MAX_NAMED_RUNS:
            return ", ".join(names)
        # The hash keeps the names of different groups different.
        digest = hashlib.sha256(repr(self.runs).encode()).hexdigest()[:12]
        return f"{', '.join(names[:-1])} and {names[-1]}, {digest}"


def name_ranks(ranks: Iterable[int]) -> str:
    """Returns `rank 3`, `ranks 0, 2 and 5`, `ranks 0 to 7`, or the first of many and how many follow."""
    rank_set = RankSet.of(ranks)
    runs = rank_set.runs
    if not runs:
        return "no rank"
    is_run = len(runs) == 1 and runs[0].step == 1 and len(rank_set) > 2
    *others, last = [_name_run(runs[0])] if is_run else _names(rank_set)
    plural = "" if len(rank_set) == 1 else "s"
    return f"rank{plural} {', '.join(others)} and {last}" if others else f"rank{plural} {last}"


def _names(ranks: RankSet) -> list[str]:
    """Returns the names of a few ranks, or of the first progressions and how many ranks follow."""
    if len(ranks) <= MAX_LISTED:
        return [str(rank) for rank in sorted(ranks)]
    num_others = sum(len(run) for run in ranks.runs[_MAX_NAMED_RUNS:])
    names = [_name_run(run) for run in ranks.runs[:_MAX_NAMED_RUNS]]
    return [*names, f"{num_others} more"] if num_others else names


def _runs(ordered: list[int]) -> Iterator[range]:
    """Yields progressions that cover ascending ranks: all except the last have at least two ranks."""
    begin = 0
    while begin < len(ordered):
        end = begin + 1
        step = ordered[end] - ordered[begin] if end < len(ordered) else 1
        while end < len(ordered) and ordered[end] - ordered[end - 1] == step:
            end += 1
        yield range(ordered[begin], ordered[end - 1] + 1, step)
        begin = end


def _name_run(run: range) -> str:
    if len(run) == 1:
        return str(run.start)
    by = f" by {run.step}" if run.step > 1 else ""
    return f"{run.start} to {run[-1]}{by}"


def _overlap(run: range, other: range) -> bool:
    """Returns whether two progressions share a rank, by the Chinese remainder theorem."""
    common = gcd(run.step, other.step)
    if (other.start - run.start) % common:
        return False
    modulus = other.step // common
    ahead = (other.start - run.start) // common * pow(run.step // common, -1, modulus) % modulus
    period = run.step * modulus
    shared = run.start + ahead * run.step  # the lowest of `run` that is in the endless `other`
    lowest = max(run.start, other.start)
    shared += max(0, -(-(lowest - shared) // period)) * period
    return shared <= min(run[-1], other[-1])


@dataclass(frozen=True, slots=True)
class RankTree:
    """Tree of all ranks, with `fanout` ranks in a block, and as many members in each larger group."""

    world_size: int
    fanout: int = FANOUT

    @property
    def is_flat(self) -> bool:
        """Whether all ranks are in one block, so that each sends to all others itself."""
        return self.world_size <= self.fanout

    @property
    def num_levels(self) -> int:
        """Number of levels above the ranks. The group of the last level is led by rank 0."""
        level = 1
        reach = self.fanout
        while reach < self.world_size:
            level = level + 1
            reach = reach * self.fanout
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
        """Yields the ranks to which this rank forwards a broadcast; each `turn` has other leaders."""
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
        """Returns the position of a rank in the tree of a broadcast: 0 for its origin, others rotated by turn."""
        if rank == origin:
            return 0
        ahead = (rank - origin) % self.world_size - 1
        return 1 + (ahead - turn * _ROTATION) % (self.world_size - 1)

    def _rank(self, label: int, origin: int, turn: int) -> int:
        """Returns the rank at a position of the tree."""
        if label == 0:
            return origin
        return (origin + 1 + (label - 1 + turn * _ROTATION) % (self.world_size - 1)) % self.world_size
