"""Describes sets of ranks by arithmetic progressions: a few numbers for a group of any size."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import gcd
from typing import Any, Self

from comm.watchdog.decode import MessageError, integer_of

MAX_RUNS = 32
"""Most progressions in a message. They describe any group of up to 64 ranks, and every group of a mesh."""
MAX_LISTED = 16
_MAX_NAMED_RUNS = 8


@dataclass(frozen=True, slots=True)
class RankSet:
    """Set of ranks as ascending, disjoint progressions.

    Attributes:
        runs: the progressions, by first rank.
    """

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
    def from_json(cls, values: dict[str, Any], key: str, world_size: int) -> Self:
        """Decodes a field that `as_json` returned.

        Raises:
            MessageError: if the field is missing, or is anything but at most `MAX_RUNS` disjoint progressions of ranks.
        """
        rows = values.get(key)
        if not isinstance(rows, list) or len(rows) > MAX_RUNS:
            raise MessageError(f"{key}: not a list of at most {MAX_RUNS} progressions")
        runs: list[range] = []
        for row in rows:
            if not isinstance(row, list) or len(row) != 3:
                raise MessageError(f"{key}: not a progression: first, count and step")
            first = integer_of({key: row[0]}, key, world_size)
            count, step = (integer_of({key: number}, key, world_size + 1) for number in row[1:])
            if not count or not step or first + (count - 1) * step >= world_size:
                raise MessageError(f"{key}: a progression is empty or leaves the job's ranks")
            run = range(first, first + (count - 1) * step + 1, step)
            if any(_overlap(run, other) for other in runs):
                raise MessageError(f"{key}: a rank is listed twice")
            runs.append(run)
        return cls(tuple(sorted(runs, key=lambda run: run.start)))

    def as_json(self) -> list[list[int]]:
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
        if len(self) <= MAX_LISTED:
            return ", ".join(map(str, sorted(self)))
        text = ", ".join(map(_name_run, self.runs[:_MAX_NAMED_RUNS]))
        if len(self.runs) <= _MAX_NAMED_RUNS:
            return text
        # The hash keeps the names of different groups different.
        digest = hashlib.sha256(repr(self.runs).encode()).hexdigest()[:12]
        return f"{text} and {sum(len(run) for run in self.runs[_MAX_NAMED_RUNS:])} more, {digest}"


def name_ranks(ranks: Iterable[int]) -> str:
    """Returns `rank 3`, `ranks 0, 2 and 5`, `ranks 0 to 7`, or the first of many and how many follow."""
    found = RankSet.of(ranks)
    if not found.runs:
        return "no rank"
    if len(found) == 1:
        return f"rank {found.runs[0].start}"
    if len(found.runs) == 1 and found.runs[0].step == 1 and len(found) > 2:
        return f"ranks {_name_run(found.runs[0])}"
    if len(found) <= MAX_LISTED:
        *others, last = map(str, sorted(found))
    elif len(found.runs) <= _MAX_NAMED_RUNS:
        *others, last = map(_name_run, found.runs)
    else:
        others = list(map(_name_run, found.runs[:_MAX_NAMED_RUNS]))
        last = f"{sum(len(run) for run in found.runs[_MAX_NAMED_RUNS:])} more"
    return f"ranks {', '.join(others)} and {last}" if others else f"ranks {last}"


def _runs(ordered: list[int]) -> Iterator[range]:
    """Yields progressions that cover ascending ranks: all except the last have at least two ranks."""
    place = 0
    while place < len(ordered):
        end = place + 1
        step = ordered[end] - ordered[place] if end < len(ordered) else 1
        while end < len(ordered) and ordered[end] - ordered[end - 1] == step:
            end += 1
        yield range(ordered[place], ordered[end - 1] + 1, step)
        place = end


def _name_run(run: range) -> str:
    if len(run) == 1:
        return str(run.start)
    by = f" by {run.step}" if run.step > 1 else ""
    return f"{run.start} to {run[-1]}{by}"


def _overlap(one: range, other: range) -> bool:
    """Returns whether two progressions share a rank, by the Chinese remainder theorem."""
    common = gcd(one.step, other.step)
    if (other.start - one.start) % common:
        return False
    modulus = other.step // common
    ahead = (other.start - one.start) // common * pow(one.step // common, -1, modulus) % modulus
    period = one.step * modulus
    shared = one.start + ahead * one.step  # the lowest of `one` that is in the endless `other`
    lowest = max(one.start, other.start)
    shared += max(0, -(-(lowest - shared) // period)) * period
    return shared <= min(one[-1], other[-1])
