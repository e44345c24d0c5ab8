"""Logs the collectives of one rank in order, to explain hangs and to compare ranks."""

import hashlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.watchdog.ranks import MAX_LISTED, RankSet

T = TypeVar("T")

StreamMark = Callable[[], Callable[[], bool]]
"""Marks the current end of the current stream. The returned function says whether the stream has passed the mark."""

_BEHIND_SECONDS = 1.0
_RECENT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, eq=False)
class Collective:
    """One exchange, transfer or reduction, with equal fields on all ranks that take part."""

    group: str  # name of the group; equal on all its ranks and unique
    ranks: RankSet  # global ranks of the group, ascending
    number: int  # number of the collective within the group, from 0
    name: str  # what the collective does
    label: Hashable | None  # its owner if it belongs to a micro-batch; printed by its `str`
    is_phase: bool = False  # True if it also includes computation, so that a rank inside is not necessarily waiting

    def __str__(self) -> str:
        of = f" of {self.label}" if self.label is not None else ""
        return f"{self.name}{of} (number {self.number} of group {self.group})"


@dataclass(frozen=True, slots=True)
class CollectiveProgress:
    """Progress within one group: collectives started, and the number of the last finished one, or -1."""

    started: int
    finished: int


@dataclass(slots=True)
class _Enqueued:
    """Collective that a stream waits for instead of the host."""

    collective: Collective
    since: float
    is_over: Callable[[], bool]


class CollectiveLog:
    """Log of one rank's collectives. Threads of the rank write to it and its watchdog reads it."""

    def __init__(self, num_kept: int = 512) -> None:
        self._mark: StreamMark | None = None
        self._lock = threading.Lock()
        self._recent: deque[tuple[float, Collective]] = deque(maxlen=num_kept)
        self._hashes: dict[str, hashlib._Hash] = {}
        self._started: dict[str, int] = {}
        self._members: dict[str, RankSet] = {}
        self._names: dict[Hashable, str] = {}
        self._finished: dict[str, int] = {}
        self._awaited: dict[Collective, tuple[float, int]] = {}
        self._enqueued: deque[_Enqueued] = deque()
        self._failed: deque[tuple[Collective, float, float]] = deque(maxlen=8)
        self._num_failed = 0

    def follow_streams(self, mark: StreamMark) -> None:
        """Counts a collective as finished when its stream has passed it, as a CUDA host returns earlier."""
        self._mark = mark

    def start(
        self, group: str, ranks: Iterable[int], name: str, label: Hashable | None = None, *, is_phase: bool = False
    ) -> Collective:
        """Logs the start of the group's next collective, in the same order on all ranks of the group."""
        line = f"{name} {label}\n".encode()
        with self._lock:
            number = self._started.get(group, 0)
            if group not in self._members:
                self._members[group] = RankSet.of(ranks)
            collective = Collective(group, self._members[group], number, name, label, is_phase)
            self._started[group] = number + 1
            if group not in self._hashes:
                self._hashes[group] = hashlib.sha256()
            self._hashes[group].update(line)
            self._recent.append((time.time(), collective))
        return collective

    @contextmanager
    def awaiting(self, collective: Collective) -> Iterator[None]:
        """Logs that this rank waits for the others while inside, and a failure if an error leaves it."""
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
        """Logs a collective of a process group, named by `kind` and its ranks, and the wait for it inside."""
        key = kind, group.group_name
        if key not in self._names:
            ranks = RankSet.of(distributed.get_process_group_ranks(group))
            self._names[key] = group_name(kind, ranks)
            self._members.setdefault(self._names[key], ranks)
        return self.awaiting(self.start(self._names[key], (), name))

    def phase(self, kind: str, ranks: Sequence[int], name: str) -> AbstractContextManager[None]:
        """Logs, like `collective`, a phase in which these ranks both compute and wait for each other."""
        key = kind, ranks if isinstance(ranks, range) else tuple(ranks)
        if key not in self._names:
            self._names[key] = group_name(kind, ranks)
        return self.awaiting(self.start(self._names[key], ranks, name, is_phase=True))

    def awaited(self) -> list[tuple[Collective, float]]:
        """Returns the collectives that the rank waits for, with seconds, the longest wait first."""
        now = time.monotonic()
        with self._lock:
            self._finish_enqueued()
            waits = [(collective, now - since) for collective, (since, _) in self._awaited.items()]
            waits += [(enqueued.collective, now - enqueued.since) for enqueued in self._enqueued]
        return sorted(waits, key=lambda wait: -wait[1])

    def is_waiting(self, thread: int) -> bool:
        """Returns whether a thread waits for a collective, or a stream so long that the host may wait for it."""
        now = time.monotonic()
        with self._lock:
            self._finish_enqueued()
            is_behind = bool(self._enqueued) and now - self._enqueued[0].since > _BEHIND_SECONDS
            return is_behind or any(waiting == thread for _, waiting in self._awaited.values())

    def failed(self) -> list[tuple[Collective, float]]:
        """Returns the collectives that failed recently, with the seconds that the rank had waited."""
        now = time.monotonic()
        with self._lock:
            return [(collective, end - since) for collective, since, end in self._failed if now - end < _RECENT_SECONDS]

    @property
    def num_failed(self) -> int:
        """Number of collectives that failed."""
        return self._num_failed

    def progress(self) -> dict[str, CollectiveProgress]:
        """Returns the rank's progress in each of its groups."""
        with self._lock:
            self._finish_enqueued()
            return {
                group: CollectiveProgress(started, self._finished.get(group, -1))
                for group, started in self._started.items()
            }

    def recent(self) -> list[tuple[float, Collective]]:
        """Returns the last collectives and their start times (`time.time`), the oldest first."""
        with self._lock:
            return list(self._recent)

    def order_hashes(self) -> dict[str, str]:
        """Returns a hash of each group's ordered collectives, equal on all ranks that agree on the order."""
        with self._lock:
            return {group: digest.hexdigest() for group, digest in self._hashes.items()}

    def _finish_enqueued(self) -> None:
        """Marks collectives as finished once their streams have passed. One stream may delay another's check."""
        while self._enqueued and self._enqueued[0].is_over():
            self._finish(self._enqueued.popleft().collective)

    def _finish(self, collective: Collective) -> None:
        self._finished[collective.group] = max(collective.number, self._finished.get(collective.group, -1))


class LoggedWork(Generic[T]):
    """Communication that has started; the log records the wait for it."""

    def __init__(
        self,
        log: CollectiveLog,
        collective: Collective,
        work: distributed.Work | None,
        result: T,
        sent: Tensor | None = None,
    ) -> None:
        """Takes the result, which is complete after `wait`, and keeps what is sent until then."""
        assert work is not None, "torch returns None for asynchronous work on ranks outside the group"
        self._log = log
        self._collective = collective
        self._work: distributed.Work | None = work
        self._result = result
        self._sent = sent

    def wait(self) -> T:
        """Waits for all parts and returns the result; on CUDA only the current stream waits."""
        if self._work is not None:
            with self._log.awaiting(self._collective):
                self._work.wait()
        self._work = self._sent = None
        return self._result


def cuda_mark(device: torch.device) -> StreamMark:
    """Returns a `StreamMark` for the device's current streams, usable on any thread."""

    def mark() -> Callable[[], bool]:
        with torch.cuda.device(device):
            event = torch.cuda.Event()
            event.record()
        return event.query

    return mark


def group_name(kind: str, ranks: Iterable[int]) -> str:
    """Returns the name of a group of this kind, as in `expert [0, 1]` or `world [0 to 2047]`."""
    if isinstance(ranks, (list, tuple)) and len(ranks) <= MAX_LISTED:
        return f"{kind} {list(ranks)}"  # in their order
    return f"{kind} [{RankSet.of(ranks)}]"
