"""Chooses the source of every sequence of a run as a pure function of its position. Imports no torch.

A source's share of the first n sequences is the sum of its weights over them. Its count is that share rounded down or
up, at every position. Counts at multiples of a power of two are found directly. The interval between two of them, in
which even the slowest source has a sequence, is halved until it has one position. So there is no state to save.

`_Phase._round` rounds up as many shares as sequences are missing at a position. For each later position, and for each
earlier one, it must round up enough of certain sources, or there would be more sequences than positions in between.
Both are chains of sets, with whole bounds that fractions satisfy: the shares, cut off at the number of sequences. Two
chains are a totally unimodular system, so a rounding exists. A greedy choice along the first chain of the sources that
come first in the second one finds it.
"""

# Shape legend: N positions, S sources of the mixture, A intervals.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

_LONGEST = 2**40  # sequences of the last phase
_CHUNK_VALUES = 2**14  # counts that are found together, which bounds the memory
_MOST_CHUNK = 2048
_BLOCK = 256  # positions that a short read finds together, because one costs almost as much as a block
_MOST_BLOCKS = 8  # blocks that are remembered: micro-batches of a step share them

Counts = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Places:
    """The sequences at some positions of a run."""

    sources_N: Counts  # number of the source in the mixture
    numbers_N: Counts  # number of earlier sequences of the same source in the run


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Ends:
    """Intervals of positions, and the counts of each source at their ends."""

    left_A: Counts
    right_A: Counts
    low_AS: Counts  # counts at `left_A`
    high_AS: Counts  # counts at `right_A`

    def take(self, chosen: Counts) -> "_Ends":
        """Returns the chosen intervals."""
        return _Ends(
            left_A=self.left_A[chosen],
            right_A=self.right_A[chosen],
            low_AS=self.low_AS[chosen],
            high_AS=self.high_AS[chosen],
        )


class MixOrder:
    """Source of every position of a run. No prefix is more than one sequence off its weights.

    A source whose weight becomes 0 may be read once more, for the part of a sequence that it lacks.
    """

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Prepares the order.

        Args:
            phases: first position of each phase, 0 for the first one, and the weights of all sources in it.
        """
        self._firsts = [first for first, _ in phases]
        lengths = [*np.diff(self._firsts).tolist(), _LONGEST]
        num_sources = len(phases[0][1])
        bits = 62 - num_sources.bit_length()  # of a sequence's fraction: the sum of all sources' fits 64
        rates = [_whole_rates(np.array(weights, dtype=np.float64), 1 << bits) for _, weights in phases]
        counts_S = np.zeros(num_sources, dtype=np.int64)
        lags_S = np.zeros(num_sources, dtype=np.int64)
        self._parts: list[_Phase] = []
        for number, length in enumerate(lengths):
            later = [*zip(rates[number + 1 :], lengths[number + 1 :], strict=True)]
            part = _Phase(rates[number], lags_S, counts_S, bits, length, later)
            self._parts.append(part)
            counts_S = part.counts_after_S
            lags_S = part.lags_after_S
        self._block = lru_cache(_MOST_BLOCKS)(self._find_block)

    def places(self, first: int, count: int) -> Places:
        """Returns the sequences at consecutive positions."""
        if not 0 < count < _BLOCK:
            return self.at(np.arange(first, first + count, dtype=np.int64))
        blocks = [self._block(number) for number in range(first // _BLOCK, (first + count - 1) // _BLOCK + 1)]
        part = slice(first % _BLOCK, first % _BLOCK + count)
        return Places(
            sources_N=np.concatenate([block.sources_N for block in blocks])[part],
            numbers_N=np.concatenate([block.numbers_N for block in blocks])[part],
        )

    def _find_block(self, number: int) -> Places:
        return self.at(np.arange(number * _BLOCK, (number + 1) * _BLOCK, dtype=np.int64))

    def at(self, positions_N: Counts) -> Places:
        """Returns the sequences at any positions."""
        sources_N = np.zeros_like(positions_N)
        numbers_N = np.zeros_like(positions_N)
        phases_N = np.searchsorted(self._firsts, positions_N, side="right") - 1
        for number, part in enumerate(self._parts):
            every = np.flatnonzero(phases_N == number)
            for start in range(0, len(every), part.chunk):
                chosen = every[start : start + part.chunk]
                sources_N[chosen], numbers_N[chosen] = part.at(positions_N[chosen] - self._firsts[number])
        return Places(sources_N=sources_N, numbers_N=numbers_N)

    def counts_before(self, position: int) -> tuple[int, ...]:
        """Returns the number of sequences of each source before a position."""
        number = int(np.searchsorted(self._firsts, position, side="right")) - 1
        counts: list[int] = self._parts[number].counts_at(position - self._firsts[number]).tolist()
        return tuple(counts)


def _whole_rates(weights_S: NDArray[np.float64], one: int) -> Counts:
    """Returns each source's share of a sequence in fractions of which `one` make a sequence."""
    rates_S: Counts = np.floor(weights_S / weights_S.sum() * one).astype(np.int64)
    rates_S[np.argmax(rates_S)] += one - rates_S.sum()
    return rates_S


class _Phase:
    """Positions with the same weights, counted from the first of them, as are the counts inside."""

    def __init__(
        self,
        rates_S: Counts,
        lags_S: Counts,
        counts_S: Counts,
        bits: int,
        length: int,
        later: Sequence[tuple[Counts, int]],
    ) -> None:
        """Finds the counts at the end of the phase.

        Args:
            rates_S: share of each source in a sequence, in fractions of 2^bits.
            lags_S: fractions that each source lacks at the first position, between -1 and 1 sequences.
            counts_S: sequences of each source before the phase.
            bits: see `rates_S`.
            length: positions of the phase.
            later: rates and lengths of the phases after it.
        """
        self._rates_S = rates_S
        self._lags_S = lags_S
        self._counts_S = counts_S
        self._bits = bits
        self._length = length
        self.chunk = min(_CHUNK_VALUES // len(rates_S) + 1, _MOST_CHUNK)
        is_unfinished_S = (rates_S == 0) & (lags_S & ((1 << bits) - 1) > 0)  # in this phase, at an unknown position
        slowest = 1 if is_unfinished_S.any() else int(rates_S[rates_S > 0].min())
        self._spacing = min(1 << (bits + 1 - slowest.bit_length()), length)
        self._end_S = self._round(np.array([length]), 0, 2 * _LONGEST, later)[0]
        self.counts_after_S = counts_S + self._end_S
        # Wraps around, except for what remains.
        self.lags_after_S = lags_S + rates_S * length - (self._end_S << bits)

    def _round(
        self,
        middle_A: Counts,
        low_AS: Counts | int,
        high_AS: Counts | int,
        later: Sequence[tuple[Counts, int]] = (),
    ) -> Counts:
        """Returns the counts at positions, between those at an earlier and at a later position of each."""
        scale = 1 << self._bits
        middle_A1 = middle_A[:, None]
        # The product wraps around, but not in the bits of its fraction.
        part_AS = (self._lags_S + middle_A1 * self._rates_S) & (scale - 1)
        share_AS = self._lags_S + middle_A1 * self._rates_S.astype(np.float64)
        whole_AS = np.rint((share_AS - part_AS) / scale).astype(np.int64)
        counts_AS: Counts = np.maximum(whole_AS, low_AS)
        is_free_AS = np.minimum(whole_AS + (part_AS > 0), high_AS) > counts_AS
        missing_A = middle_A - counts_AS.sum(axis=1)
        # Free sources in the order in which they must have their next sequence. If shares of n sequences come before
        # one, it cannot be among the first n to be chosen.
        rates_S = np.maximum(self._rates_S, 1)
        due_AS = -((part_AS - scale) // rates_S)
        if later:
            due_AS[0] = [self._due(source, int(part), later) for source, part in enumerate(part_AS[0])]
        order_AS = np.argsort(due_AS, axis=1, kind="stable")
        ordered_AS = np.take_along_axis(np.where(is_free_AS, part_AS, 0), order_AS, axis=1)
        before_AS = np.empty_like(order_AS)
        np.put_along_axis(before_AS, order_AS, (np.cumsum(ordered_AS, axis=1) - ordered_AS) >> self._bits, axis=1)
        # Of those that can be chosen, the one that could have had its sequence for the longest time.
        age_AS = np.where(is_free_AS, np.minimum(-(-part_AS // rates_S), middle_A1), -1)
        for number in range(int(missing_A.max())):
            rows = np.flatnonzero(missing_A > number)
            oldest = np.argmax(np.where(before_AS[rows] <= number, age_AS[rows], -1), axis=1)
            counts_AS[rows, oldest] += 1
            age_AS[rows, oldest] = -1
        return counts_AS

    def _due(self, source: int, part: int, later: Sequence[tuple[Counts, int]]) -> int:
        """Returns when a source must have its next sequence, from the end of this phase on."""
        missing = (1 << self._bits) - part
        begin = 0
        for rates_S, length in later:
            rate = int(rates_S[source])
            if missing <= rate * length:
                return begin - (-missing // rate)
            missing -= rate * length
            begin += length
        return 2 * _LONGEST

    def at(self, positions_N: Counts) -> tuple[Counts, Counts]:
        """Returns the source of each position, and the number of its earlier sequences."""
        unique_N, back_N = np.unique(positions_N, return_inverse=True)
        ends = self._narrow(unique_N)
        sources = np.argmax(ends.high_AS - ends.low_AS, axis=1)
        numbers = ends.low_AS[np.arange(len(unique_N)), sources] + self._counts_S[sources]
        return sources[back_N], numbers[back_N]

    def counts_at(self, position: int) -> Counts:
        """Returns the counts of all sources before a position of this phase."""
        return self._counts_S + (self._narrow(np.array([position - 1])).high_AS[0] if position else 0)

    def _narrow(self, positions_N: Counts) -> _Ends:
        """Returns the intervals of one position each. The positions are sorted, and each occurs once."""
        last = self._length // self._spacing - 1
        blocks_A, holds_N = np.unique(np.minimum(positions_N // self._spacing, last), return_inverse=True)
        left_A = blocks_A * self._spacing
        right_A = np.where(blocks_A == last, self._length, left_A + self._spacing)
        ends = _Ends(left_A=left_A, right_A=right_A, low_AS=self._mark(left_A), high_AS=self._mark(right_A))
        while (ends.right_A - ends.left_A).max() > 1:
            middle_A = (ends.left_A + ends.right_A) // 2
            counts_AS = ends.low_AS.copy()
            wide = np.flatnonzero(middle_A > ends.left_A)
            counts_AS[wide] = self._round(middle_A[wide], ends.low_AS[wide], ends.high_AS[wide])
            # Two halves for each interval, of which those that hold a position stay; one position is a right half.
            halves = _Ends(
                left_A=np.stack([ends.left_A, middle_A], axis=1).reshape(-1),
                right_A=np.stack([middle_A, ends.right_A], axis=1).reshape(-1),
                low_AS=np.stack([ends.low_AS, counts_AS], axis=1).reshape(-1, counts_AS.shape[1]),
                high_AS=np.stack([counts_AS, ends.high_AS], axis=1).reshape(-1, counts_AS.shape[1]),
            )
            used, holds_N = np.unique(2 * holds_N + (positions_N >= middle_A[holds_N]), return_inverse=True)
            ends = halves.take(used)
        return ends.take(holds_N)

    def _mark(self, positions_A: Counts) -> Counts:
        """Returns the counts at multiples of the spacing, or at the ends of the phase."""
        counts_AS = self._round(positions_A, 0, 2 * _LONGEST)
        counts_AS[positions_A == 0] = 0
        counts_AS[positions_A == self._length] = self._end_S
        return counts_AS
