"""What one rank does with others, in order: the log by which a hang is explained and ranks are compared."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup

StreamMark = Callable[[], Callable[[], bool]]
"""Marks the end of what was enqueued on the current stream so far; the result says whether that is over."""

_BEHIND_SECONDS = 1.0
_RECENT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Collective:
    """One exchange, transfer or reduction between ranks, the same on all that take part.

    Attributes:
        group: its name, the same on all its ranks and unlike any other group's.
        ranks: the group's, in the world.
        number: of the collective within the group, from 0.
        name: what is done.
        label: whose it is, if it belongs to a micro-batch; printed by its `str`.
        is_phase: several things in one, computation among them: a rank that is inside need not be waiting.
    """

    group: str
    ranks: tuple[int, ...]
    number: int
    name: str
    label: Hashable | None
    is_phase: bool = False

    def __str__(self) -> str:
        of = f" of {self.label}" if self.label is not None else ""
        return f"{self.name}{of} (number {self.number} of group {self.group})"


@dataclass(frozen=True, slots=True)
class CollectiveProgress:
    """How far a rank is within one group: collectives started, and the number of the last that was finished, or -1."""

    started: int
    finished: int


@dataclass(slots=True)
class _Enqueued:
    """A collective whose wait was left to a stream."""

    collective: Collective
    since: float
    is_over: Callable[[], bool]


class CollectiveLog:
    """Owns the record of one rank's collectives. Threads of the rank write to it, its watchdog reads."""

    def __init__(self, num_kept: int = 512) -> None:
        """Starts empty. `num_kept`: collectives that `recent` remembers."""
        self._mark: StreamMark | None = None
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, Collective]] = deque(maxlen=num_kept)
        self._hashes: dict[str, hashlib._Hash] = {}
        self._started: dict[str, int] = {}
        self._finished: dict[str, int] = {}
        self._awaited: dict[Collective, tuple[float, int]] = {}
        self._enqueued: deque[_Enqueued] = deque()
        self._failed: deque[tuple[Collective, float, float]] = deque(maxlen=8)
        self._num_failed = 0

    def follow_streams(self, mark: StreamMark) -> None:
        """Counts a collective as over when its stream is, from now on: the host returns from a wait long before."""
        self._mark = mark

    def start(
        self, group: str, ranks: Sequence[int], name: str, label: Hashable | None = None, is_phase: bool = False
    ) -> Collective:
        """Notes the group's next collective, in the order in which all its ranks must start them."""
        line = f"{name} {label}\n".encode()
        with self._lock:
            number = self._started.get(group, 0)
            collective = Collective(group, tuple(ranks), number, name, label, is_phase)
            self._started[group] = number + 1
            if group not in self._hashes:
                self._hashes[group] = hashlib.sha256()
            self._hashes[group].update(line)
            self._recent.append((time.time(), collective))
        return collective

    @contextmanager
    def awaiting(self, collective: Collective) -> Iterator[None]:
        """Logs that this rank waits for the others while inside; an error that leaves it is a failure."""
        since = time.monotonic()
        with self._lock:
            self._awaited[collective] = since, threading.get_ident()
        try:
            yield
        except BaseException:
            with self._lock:
                del self._awaited[collective]
                self._failed.append((collective, since, time.monotonic()))
                self._num_failed += 1
            raise
        is_over = None if self._mark is None else self._mark()
        with self._lock:
            del self._awaited[collective]
            if is_over is None:
                self._finish(collective)
            else:
                self._enqueued.append(_Enqueued(collective, since, is_over))
                self._finish_enqueued()

    def collective(self, kind: str, group: ProcessGroup, name: str) -> AbstractContextManager[None]:
        """Starts a collective of a process group's ranks, and awaits it while inside.

        Args:
            kind: of the group; with its ranks it makes a name like no other.
            group: of the ranks.
            name: what is done.
        """
        ranks = distributed.get_process_group_ranks(group)
        return self.awaiting(self.start(group_name(kind, ranks), ranks, name))

    def phase(self, kind: str, ranks: Sequence[int], name: str) -> AbstractContextManager[None]:
        """Logs as `collective` does what these ranks do together: they compute as well as wait for each other."""
        return self.awaiting(self.start(group_name(kind, ranks), ranks, name, None, True))

    def awaited(self) -> list[tuple[Collective, float]]:
        """Returns what the rank waits for, and for how many seconds, the longest first."""
        now = time.monotonic()
        with self._lock:
            self._finish_enqueued()
            waits = [(collective, now - since) for collective, (since, _) in self._awaited.items()]
            waits += [(each.collective, now - each.since) for each in self._enqueued]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_waiting(self, thread: int) -> bool:
        """Returns whether a thread waits for a collective, or a stream has for so long that the host may wait too."""
        now = time.monotonic()
        with self._lock:
            self._finish_enqueued()
            is_behind = bool(self._enqueued) and now - self._enqueued[0].since > _BEHIND_SECONDS
            return is_behind or any(waiting == thread for _, waiting in self._awaited.values())

    def failed(self) -> list[tuple[Collective, float]]:
        """Returns what ended in an error a moment ago, and for how many seconds it had been awaited."""
        now = time.monotonic()
        with self._lock:
            return [(collective, end - since) for collective, since, end in self._failed if now - end < _RECENT_SECONDS]

    @property
    def num_failed(self) -> int:
        """Collectives that ended in an error."""
        return self._num_failed

    def progress(self) -> dict[str, CollectiveProgress]:
        """Returns how far the rank is in each of its groups."""
        with self._lock:
            self._finish_enqueued()
            return {
                group: CollectiveProgress(started, self._finished.get(group, -1))
                for group, started in self._started.items()
            }

    def recent(self) -> list[tuple[float, Collective]]:
        """Returns the last collectives and when each was started, in seconds of the wall clock, the oldest first."""
        with self._lock:
            return list(self._recent)

    def order_hashes(self) -> dict[str, str]:
        """Returns by group a hash of its collectives in order, equal on all ranks if they agree on the order."""
        with self._lock:
            return {group: digest.hexdigest() for group, digest in self._hashes.items()}

    def _finish_enqueued(self) -> None:
        """Finishes what is over on its stream; streams are checked in order, so one may hide another for a while."""
        while self._enqueued and self._enqueued[0].is_over():
            self._finish(self._enqueued.popleft().collective)

    def _finish(self, collective: Collective) -> None:
        self._finished[collective.group] = max(collective.number, self._finished.get(collective.group, -1))


def cuda_mark(device: torch.device) -> StreamMark:
    """Returns a marker for the device's current streams, on any thread."""

    def mark() -> Callable[[], bool]:
        with torch.cuda.device(device):
            event = torch.cuda.Event()
            event.record()
        return event.query

    return mark


def group_name(kind: str, ranks: Sequence[int]) -> str:
    """Returns the name of a group of this kind: `expert [0, 1]`."""
    return f"{kind} {list(ranks)}"
