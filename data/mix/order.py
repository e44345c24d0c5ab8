"""Chooses the source of every sequence of a run as a pure function of its position. Imports no torch.

The counts of all sources at a position are found by halving an interval of positions until it has one position. At
each midpoint, every source gets its share rounded down or up, largest remainder first, between its counts at both ends.
So any position costs a logarithm of the run's length, and there is no state to save.
"""

# Shape legend: N positions, S sources of the mixture, K sources that a phase reads, F fastest of them, A intervals.

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

_LONGEST = 2**40  # sequences of the last phase
_SLOW_SHARE = 0.25  # share of the slowest sources whose sum is limited
_FASTEST = 8  # sources whose next positions are looked ahead to
_MOST_CHUNK = 1024  # positions that are found together, which bounds the memory
_CHUNK_VALUES = 2**17  # values of constraints that are compared together
_REMEMBERED = 2**13  # positions of the interval at which the next search begins
_NEAR = 1e-6  # distance from a whole number within which a share counts as whole, above the error of its product

Counts = NDArray[np.int64]
Shares = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Ends:
    """Intervals of positions, and the counts of each source at their ends."""

    left_A: Counts
    right_A: Counts
    low_AK: Counts  # counts at `left_A`
    high_AK: Counts  # counts at `right_A`

    def take(self, chosen: NDArray[np.int64]) -> "_Ends":
        """Returns the chosen intervals."""
        return _Ends(
            left_A=self.left_A[chosen],
            right_A=self.right_A[chosen],
            low_AK=self.low_AK[chosen],
            high_AK=self.high_AK[chosen],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Phase:
    """Positions with the same weights, counted from the first of them, as are the counts."""

    rates_K: Shares  # share of each source, above 0; they add up to 1
    lags_K: Shares  # sequences that each source lacks at the first position, between -1 and 1

    @cached_property
    def _fastest_first(self) -> Counts:
        order: Counts = np.argsort(-self.rates_K, kind="stable")
        return order

    @cached_property
    def _slow(self) -> Counts:
        """The slowest sources, slowest first, that together have at most a quarter of the positions."""
        slow = self._fastest_first[::-1]
        return slow[np.cumsum(self.rates_K[slow]) <= _SLOW_SHARE]

    def halve(self, ends: _Ends, middle_A: Counts) -> Counts:
        """Returns the counts at positions between the ends, one within each interval."""
        shares_AK = self._shares(middle_A)
        down_AK = np.floor(shares_AK + _NEAR).astype(np.int64)
        low_AK = np.maximum(ends.low_AK, down_AK)
        high_AK = np.minimum(ends.high_AK, np.ceil(shares_AK - _NEAR).astype(np.int64))
        is_free_AK = high_AK > low_AK
        scores_AK = np.where(is_free_AK, shares_AK - down_AK, -np.inf)
        if (ends.right_A - ends.left_A).max() > 2:  # else both neighbors of the position are ends
            self._add_due(scores_AK, ends, middle_A, down_AK, low_AK)
            self._remove_early(scores_AK, ends, middle_A, down_AK, high_AK)
        missing_A = middle_A - low_AK.sum(axis=1)
        chosen_AK = is_free_AK & (_ranks(scores_AK) < missing_A[:, None])
        rows = self._limit_groups(scores_AK, chosen_AK, shares_AK - low_AK)
        if rows.size:
            chosen_AK[rows] = is_free_AK[rows] & (_ranks(scores_AK[rows]) < missing_A[rows, None])
        counts_AK: Counts = low_AK + chosen_AK
        for row in np.flatnonzero(counts_AK.sum(axis=1) != middle_A):
            self._balance(counts_AK[row], shares_AK[row], ends.low_AK[row], ends.high_AK[row], int(middle_A[row]))
        return counts_AK

    def _shares(self, positions: NDArray[np.int64]) -> Shares:
        shares: Shares = self.lags_K + positions[..., None] * self.rates_K
        return shares

    def _add_due(self, scores_AK: Shares, ends: _Ends, middle_A: Counts, down_AK: Counts, low_AK: Counts) -> None:
        """Prefers sources that would otherwise be due together, more than there are positions for them."""
        # The position at which each source must have one more than its share rounded down.
        fastest = self._fastest_first[:_FASTEST]  # their sequences compete for single positions
        due_AF = np.ceil((down_AK[:, fastest] + 1 - self.lags_K[fastest]) / self.rates_K[fastest] - _NEAR)
        due_AF = np.clip(due_AF, middle_A[:, None] + 1, ends.right_A[:, None]).astype(np.int64)
        needed_AFK = np.floor(self._shares(due_AF) + _NEAR).astype(np.int64)
        needed_AFK = np.maximum(np.minimum(needed_AFK, ends.high_AK[:, None]) - low_AK[:, None], 0)
        excess_AF = needed_AFK.sum(axis=2) - (due_AF - middle_A[:, None])
        excess_AF[due_AF >= ends.right_A[:, None]] = 0
        self._mark(scores_AK, excess_AF, needed_AFK > 0, 1.0)

    def _remove_early(self, scores_AK: Shares, ends: _Ends, middle_A: Counts, down_AK: Counts, high_AK: Counts) -> None:
        """Defers sources that had too few positions since each of them could have its next sequence."""
        fastest = self._fastest_first[:_FASTEST]  # their sequences compete for single positions
        open_AF = np.floor((down_AK[:, fastest] - self.lags_K[fastest]) / self.rates_K[fastest] + _NEAR)
        open_AF = np.clip(open_AF, ends.left_A[:, None], middle_A[:, None] - 1).astype(np.int64)
        earlier_AFK = np.maximum(np.ceil(self._shares(open_AF) - _NEAR).astype(np.int64), ends.low_AK[:, None])
        done_AFK = np.maximum(high_AK[:, None] - earlier_AFK, 0)
        excess_AF = done_AFK.sum(axis=2) - (middle_A[:, None] - open_AF)
        excess_AF[open_AF <= ends.left_A[:, None]] = 0
        self._mark(scores_AK, excess_AF, done_AFK > 0, -1.0)

    def _limit_groups(self, scores_AK: Shares, chosen_AK: NDArray[np.bool_], missing_AK: Shares) -> NDArray[np.int64]:
        """Keeps the sum of the slowest sources, two of them, three and so on, within one of its share.

        Otherwise several slow sources would be ahead for a long time, and the fast ones would have too few positions.
        Changes the scores of rows whose choice breaks this, and returns these rows.
        """
        slow = self._slow
        shares_AG = np.cumsum(missing_AK[:, slow], axis=1)
        counts_AG = np.cumsum(chosen_AK[:, slow], axis=1)
        is_broken_AG = (counts_AG < np.floor(shares_AG + _NEAR)) | (counts_AG > np.ceil(shares_AG - _NEAR))
        rows = np.flatnonzero(is_broken_AG.any(axis=1))
        scores = scores_AK[rows]
        for number in range(len(slow) if rows.size else 0):
            is_free = np.isfinite(scores)
            is_free[:, ~np.isin(np.arange(scores.shape[1]), slow[: number + 1])] = False
            ranks = _ranks(np.where(is_free, scores, -np.inf))
            shares = shares_AG[rows, number, None]
            is_plain = is_free & (np.abs(scores) < 2)
            scores = np.where(is_plain & (ranks < np.floor(shares + _NEAR)), scores + 100, scores)
            scores = np.where(is_plain & (ranks >= np.ceil(shares - _NEAR)), scores - 100, scores)
        scores_AK[rows] = scores
        return rows

    def _mark(self, scores_AK: Shares, excess_AF: Counts, is_concerned_AFK: NDArray[np.bool_], sign: float) -> None:
        """Moves the scores of as many of the concerned sources as the excess says, fastest constraint first."""
        for number in np.flatnonzero((excess_AF > 0).any(axis=0)):
            rows = np.flatnonzero(excess_AF[:, number] > 0)
            if not rows.size:
                continue
            scores = scores_AK[rows]
            is_concerned = is_concerned_AFK[rows, number] & np.isfinite(scores)
            ranks = _ranks(np.where(is_concerned, sign * scores, -np.inf))
            is_moved = is_concerned & (ranks < excess_AF[rows, number, None])
            scores_AK[rows] = np.where(is_moved & (np.abs(scores) < 2), scores + sign * 100, scores)

    def _balance(self, counts_K: Counts, shares_K: Shares, low_K: Counts, high_K: Counts, total: int) -> None:
        """Changes counts where rounding alone cannot reach the total: by the largest lag within the ends."""
        while missing := total - int(counts_K.sum()):
            lags_K = shares_K - counts_K
            if missing > 0:
                counts_K[np.argmax(np.where(counts_K < high_K, lags_K, -np.inf))] += 1
            else:
                counts_K[np.argmin(np.where(counts_K > low_K, lags_K, np.inf))] -= 1


def _ranks(scores_AK: Shares) -> Counts:
    """Returns the rank of each score in its row, 0 for the largest; ties go to the earlier one."""
    ranks_AK: Counts = np.argsort(np.argsort(-scores_AK, axis=1, kind="stable"), axis=1, kind="stable")
    return ranks_AK


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Places:
    """The sequences at some positions of a run."""

    sources_N: Counts  # number of the source in the mixture
    numbers_N: Counts  # number of earlier sequences of the same source in the run


class MixOrder:
    """Source of every position of a run. No prefix is more than one sequence off its weights."""

    def __init__(self, phases: Sequence[tuple[int, Sequence[float]]]) -> None:
        """Prepares the order.

        Args:
            phases: first position of each phase, 0 for the first one, and the weights of all sources in it.
        """
        self._firsts = [first for first, _ in phases]
        self._parts: list[_Part] = []
        counts_S = np.zeros(len(phases[0][1]), dtype=np.int64)
        lags_S = np.zeros(len(counts_S))
        for (first, weights), last in zip(phases, [*self._firsts[1:], None], strict=True):
            part = _Part(np.array(weights, dtype=np.float64), lags_S, counts_S, None if last is None else last - first)
            self._parts.append(part)
            if last is not None:
                counts_S = part.counts_after
                lags_S = part.lags_after

    def places(self, first: int, count: int) -> Places:
        """Returns the sequences at consecutive positions."""
        return self.at(np.arange(first, first + count, dtype=np.int64))

    def at(self, positions_N: NDArray[np.int64]) -> Places:
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


class _Part:
    """A phase with the counts at its start, and its largest intervals, which end at powers of two."""

    def __init__(self, weights_S: Shares, lags_S: Shares, counts_S: Counts, length: int | None) -> None:
        self._counts_S = counts_S
        # A source that this phase does not read may still lack a part of a sequence.
        self._used_K = np.flatnonzero(weights_S)
        rates_S = weights_S / weights_S.sum()
        self._phase = _Phase(rates_K=rates_S[self._used_K], lags_K=lags_S[self._used_K])
        self.chunk = min(_MOST_CHUNK, _CHUNK_VALUES // (len(self._used_K) * min(len(self._used_K), _FASTEST)) + 1)
        self._ends = self._largest(_LONGEST if length is None else length)
        self._near = self._ends
        if length is not None:
            self.counts_after = self.counts_at(length)
            self.lags_after = lags_S + rates_S * length - (self.counts_after - counts_S)

    def _largest(self, length: int) -> _Ends:
        """Returns the intervals from 0 to 1, 1 to 2, 2 to 4 and so on to the length."""
        marks = [0, *(2**power for power in range(length.bit_length()) if 2**power < length), length]
        counts = [np.zeros(len(self._used_K), dtype=np.int64)]
        high = np.full(len(self._used_K), 2 * _LONGEST)
        right = 2 * length
        for mark in reversed(marks[1:]):
            ends = _Ends(
                left_A=np.array([0]), right_A=np.array([right]), low_AK=counts[0][None], high_AK=np.array(high)[None]
            )
            high = self._phase.halve(ends, np.array([mark]))[0]
            counts.insert(1, high)
            right = mark
        every = np.array(counts)
        return _Ends(left_A=np.array(marks[:-1]), right_A=np.array(marks[1:]), low_AK=every[:-1], high_AK=every[1:])

    def at(self, positions_N: NDArray[np.int64]) -> tuple[Counts, Counts]:
        """Returns the source of each position, and the number of its earlier sequences."""
        unique_N, back_N = np.unique(positions_N, return_inverse=True)
        ends = self._narrow(unique_N)
        sources_K = np.argmax(ends.high_AK - ends.low_AK, axis=1)
        numbers = ends.low_AK[np.arange(len(unique_N)), sources_K]
        sources = self._used_K[sources_K]
        return sources[back_N], (numbers + self._counts_S[sources])[back_N]

    def counts_at(self, position: int) -> Counts:
        """Returns the counts of all sources before a position of this phase."""
        counts_S = self._counts_S.copy()
        if position:
            counts_S[self._used_K] += self._narrow(np.array([position - 1])).high_AK[0]
        return counts_S

    def _narrow(self, positions_N: NDArray[np.int64]) -> _Ends:
        """Returns the intervals of one position each. The positions are sorted, and each occurs once."""
        near = self._near
        is_near = positions_N[0] >= near.left_A[0] and positions_N[-1] < near.right_A[-1]
        ends = near if is_near else self._ends
        holds_N = np.searchsorted(ends.left_A, positions_N, side="right") - 1
        while True:
            used, holds_N = np.unique(holds_N, return_inverse=True)
            ends = ends.take(used)
            if len(used) == 1 and ends.right_A[0] - ends.left_A[0] >= _REMEMBERED:
                self._near = ends
            if (ends.right_A - ends.left_A).max() == 1:
                return ends.take(holds_N)
            is_wide = ends.right_A - ends.left_A > 1
            middle_A = (ends.left_A + ends.right_A) // 2
            wide = np.flatnonzero(is_wide)
            counts_AK = ends.low_AK.copy()
            counts_AK[wide] = self._phase.halve(ends.take(wide), middle_A[wide])
            # Two halves for each interval. Those of one position are kept whole, as the right half.
            middle_A = np.where(is_wide, middle_A, ends.left_A)
            halves = _Ends(
                left_A=np.stack([ends.left_A, middle_A], axis=1).reshape(-1),
                right_A=np.stack([middle_A, ends.right_A], axis=1).reshape(-1),
                low_AK=np.stack([ends.low_AK, counts_AK], axis=1).reshape(-1, counts_AK.shape[1]),
                high_AK=np.stack([counts_AK, ends.high_AK], axis=1).reshape(-1, counts_AK.shape[1]),
            )
            holds_N = 2 * holds_N + (positions_N >= middle_A[holds_N])
            ends = halves
