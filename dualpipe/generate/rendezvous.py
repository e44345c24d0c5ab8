"""Follows the transfers of an order while it is built, so that it cannot deadlock.

The model is that of `dualpipe.progress`. Only the order matters, so a rank may be blocked here at a group although the
simulation already started later ones.
"""

from collections import deque
from collections.abc import Iterable


class Rendezvous:
    """Progress of all ranks through the groups chosen so far.

    Ranks form a ring. Link 2r carries activations from rank r to the next rank, link 2r+1 gradients to the one before.
    """

    def __init__(self, num_ranks: int, most_pending: int) -> None:
        """Starts with no groups; `most_pending` bounds a link's messages without a posted receive."""
        self._num_ranks = num_ranks
        self._most_pending = most_pending
        self._pending = [0] * (2 * num_ranks)
        self._posted = [0] * (2 * num_ranks)
        self._sent = [0] * (2 * num_ranks)
        # Groups at which a rank is blocked, and those after them: links to receive from and links to send on.
        self._blocked: list[deque[tuple[list[int], list[int]]]] = [deque() for _ in range(num_ranks)]
        # For the first blocked group of a rank: whether its receives are posted, and its number of sent messages.
        self._has_posted = [False] * num_ranks
        self._num_sent = [0] * num_ranks

    def append(self, rank: int, forwards: tuple[int, int], backwards: tuple[int, int]) -> set[int] | None:
        """Appends a group to a rank unless the ranks would deadlock.

        Args:
            forwards: numbers of activations that the group receives and sends.
            backwards: numbers of gradients that the group receives and sends.

        Returns:
            Ranks that may run groups now which could deadlock before, or None if the group is not appended.
        """
        # Activations come from the previous rank, gradients from the next one.
        following = (rank + 1) % self._num_ranks
        previous = (rank - 1) % self._num_ranks
        receives = [2 * previous] * forwards[0] + [2 * following + 1] * backwards[0]
        sends = [2 * rank] * forwards[1] + [2 * rank + 1] * backwards[1]
        pending = self._after(receives, sends)
        if self._most_pending and not self._is_cautious(rank, sends, pending):
            return None
        # Usual case: nothing is blocked and every receive is posted, so the group runs at once.
        if not any(self._blocked) and self._is_free(sends):
            for link in receives:
                self._posted[link] += 1
            for link in sends:
                self._sent[link] += 1
            self._pending = pending
            return {previous, following}
        # Otherwise run all ranks as far as possible, and undo that if it ends in a circle of waits.
        saved = self._posted.copy(), self._sent.copy(), self._has_posted.copy(), self._num_sent.copy()
        queues = [queue.copy() for queue in self._blocked]
        self._blocked[rank].append((receives, sends))
        moved = self._advance(rank)
        if self._is_deadlock(rank):
            self._posted, self._sent, self._has_posted, self._num_sent = saved
            self._blocked = queues
            return None
        self._pending = pending
        return moved

    def _after(self, receives: Iterable[int], sends: Iterable[int]) -> list[int]:
        pending = self._pending.copy()
        for link in receives:
            pending[link] -= 1
        for link in sends:
            pending[link] += 1
        return pending

    def _is_cautious(self, rank: int, sends: Iterable[int], pending: list[int]) -> bool:
        for link in sends:
            destination = self._destination(link)
            opposite = (
                opposite_link
                for opposite_link in (2 * destination, 2 * destination + 1)
                if self._destination(opposite_link) == rank
            )
            is_crossed = pending[link] > 1 and any(pending[opposite_link] > 1 for opposite_link in opposite)
            if is_crossed or pending[link] > self._most_pending:
                return False
        return True

    def _is_free(self, sends: Iterable[int]) -> bool:
        counts: dict[int, int] = {}
        for link in sends:
            if self._posted[link] < self._sent[link] + counts.get(link, 0):
                return False
            counts[link] = counts.get(link, 0) + 1
        return True

    def _advance(self, rank: int) -> set[int]:
        """Runs the rank, and then every rank that it unblocks, and returns the ranks that may have moved."""
        waiting = [rank]
        moved = set()
        while waiting:
            current = waiting.pop()
            moved.add(current)
            while self._blocked[current]:
                woken = self._run_first(current)
                waiting += woken
                moved.update(woken)
                if self._waits_for(current) is not None:
                    break
        return moved

    def _run_first(self, rank: int) -> list[int]:
        """Runs a rank's first blocked group as far as possible, and returns the ranks that this may unblock."""
        receives, sends = self._blocked[rank][0]
        woken = []
        if not self._has_posted[rank]:
            self._has_posted[rank] = True
            for link in receives:
                self._posted[link] += 1
                woken.append(link // 2)
        # A group starts when all its inputs were sent.
        if any(self._sent[link] < self._posted[link] for link in receives):
            return woken
        for link in sends[self._num_sent[rank] :]:
            if self._posted[link] < self._sent[link]:
                return woken
            self._sent[link] += 1
            self._num_sent[rank] += 1
            woken.append(self._destination(link))
        self._blocked[rank].popleft()
        self._has_posted[rank] = False
        self._num_sent[rank] = 0
        return woken

    def _waits_for(self, rank: int) -> int | None:
        """Returns the rank for which a rank waits in its first blocked group, or None if it can run."""
        if not self._blocked[rank] or not self._has_posted[rank]:
            return None
        receives, sends = self._blocked[rank][0]
        for link in receives:
            if self._sent[link] < self._posted[link]:
                return link // 2
        link = sends[self._num_sent[rank]]
        return self._destination(link) if self._posted[link] < self._sent[link] else None

    def _is_deadlock(self, rank: int) -> bool:
        path: set[int] = set()
        current: int | None = rank
        while current is not None and current not in path:
            path.add(current)
            current = self._waits_for(current)
        return current is not None

    def _destination(self, link: int) -> int:
        return (link // 2 + (-1 if link % 2 else 1)) % self._num_ranks
