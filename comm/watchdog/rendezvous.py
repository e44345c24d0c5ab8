"""How the ranks of a job find each other, and how one that does not come is named. The watch runs from here on."""

import dataclasses
import json
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from comm.exit_codes import EXIT_HANG, EXIT_LOST
from comm.groups import PATIENCE_SECONDS, ClusterError
from comm.operations import OperationLog
from comm.watchdog.mailbox import Mailbox
from comm.watchdog.verdict import Verdict, name_ranks
from comm.watchdog.watchdog import Watch

_START = "start of the job"
_VERDICT = "watch/verdict"
_HEARD = "watch/heard"
_LINGER_SECONDS = 2.0
_LONGEST_PAUSE_SECONDS = 0.5
# After SIGTERM: a job that is to make room starts all the same, to agree on it; one that lost a rank never does.
_LATECOMER_SECONDS = 3.0


class AbsentError(RuntimeError):
    """Ranks that did not come to the start of the job. This rank ends by the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.verdict = verdict


@dataclass(frozen=True, slots=True)
class Seat:
    """A rank's place in the job, as the launcher tells it in the environment.

    `host`, `port`: where the store is. `holder`: the rank that holds it, None where the launcher does.
    """

    rank: int
    world_size: int
    host: str
    port: int
    holder: int | None

    @classmethod
    def of_environment(cls) -> "Seat":
        """From RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.

        Raises:
            ClusterError: one is not set.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if name not in os.environ]
        if missing:
            raise ClusterError(f"cluster: the launcher must set {', '.join(missing)}; start ranks with torchrun")
        rank, world_size, host, port = (os.environ[name] for name in names)
        is_launchers = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return cls(int(rank), int(world_size), host, int(port), None if is_launchers else 0)


class Job:
    """A rank's hold on its job: the store through which process groups are made, and the watch."""

    def __init__(self, store: Store, watch: Watch, restore: Callable[[], None]) -> None:
        self.store = store
        self.watch = watch
        self._restore = restore

    def close(self) -> None:
        """Leaves in peace."""
        self._restore()
        self.watch.close()


def join(
    seat: Seat,
    log: OperationLog,
    deadline_seconds: float,
    last_words: Callable[[Verdict], None],
    start_seconds: float | None = None,
) -> Job:
    """Meets all other ranks and starts the watch. Called by every rank, on its main thread.

    From here on SIGTERM has the watch find out whether a rank was lost. Where none was, the handler that the process
    had before goes on with it; where it had none, the watch ends the process.

    Args:
        seat: of this rank.
        log: of its operations.
        deadline_seconds: for which it waits for others.
        last_words: see `Watch`.
        start_seconds: for which it waits at the start, if not for as long.

    Raises:
        AbsentError: not all came.
    """
    mailbox = Mailbox(seat.rank, seat.host)
    plain_handler = signal.getsignal(signal.SIGTERM)
    is_terminated = _IsTerminated(plain_handler if callable(plain_handler) else None)
    restore = _heed_termination(mailbox.wakeup_file, is_terminated)
    gate = _Gate(seat, deadline_seconds if start_seconds is None else start_seconds, is_terminated)
    with log.phase("world", range(seat.world_size), _START):
        store = gate.open_store()
        gate.meet(store, mailbox)
    store.set_timeout(timedelta(seconds=deadline_seconds + PATIENCE_SECONDS))
    watch = Watch(seat.rank, mailbox, log, deadline_seconds, last_words, ends_by_signal=is_terminated.is_last)
    watch.start()
    return Job(store, watch, restore)


class _IsTerminated:
    """Whether SIGTERM came, and when; told on to the handler that was there before."""

    def __init__(self, onward: Callable[[int, FrameType | None], Any] | None) -> None:
        self.since: float | None = None
        self._onward = onward

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.since = self.since or time.monotonic()
        if self._onward is not None:
            self._onward(number, frame)

    @property
    def is_last(self) -> bool:
        """Whether no handler was there before."""
        return self._onward is None

    @property
    def is_pressing(self) -> bool:
        """Whether it is no use to wait any longer for ranks that are not there."""
        patience = 0.0 if self.is_last else _LATECOMER_SECONDS
        return self.since is not None and time.monotonic() - self.since >= patience


def _heed_termination(wakeup_file: int, handler: _IsTerminated) -> Callable[[], None]:
    """Has SIGTERM noted, and told to the watch's thread even while the main thread is deep in a collective."""
    plain_handler = signal.signal(signal.SIGTERM, handler)
    plain_file = signal.set_wakeup_fd(wakeup_file, warn_on_full_buffer=False)

    def restore() -> None:
        signal.set_wakeup_fd(plain_file)
        signal.signal(signal.SIGTERM, plain_handler)

    return restore


class _Gate:
    """The start as one rank sees it, until its deadline."""

    def __init__(self, seat: Seat, deadline_seconds: float, is_terminated: _IsTerminated) -> None:
        self._seat = seat
        self._deadline_seconds = deadline_seconds
        self._until = time.monotonic() + deadline_seconds
        self._is_terminated = is_terminated
        self._pause = 0.01

    def open_store(self) -> Store:
        """Opens it, or waits for the one who does."""
        seat = self._seat
        is_holder = seat.rank == seat.holder
        while not is_holder and not self._is_open():
            self._rest(lambda: [seat.holder or 0])
        try:
            store = TCPStore(
                host_name=seat.host,
                port=seat.port,
                world_size=seat.world_size,
                is_master=is_holder,
                timeout=self._left(),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except DistError as error:
            if is_holder:
                raise
            raise self._store_error(error) from error
        return store

    def meet(self, store: Store, mailbox: Mailbox) -> None:
        """Tells where this rank is and learns where the others are."""
        seat = self._seat
        keys = ["watch/job", *(f"watch/{rank}" for rank in range(seat.world_size))]
        try:
            if seat.rank == 0:
                store.set(keys[0], secrets.token_hex(8))
            store.set(keys[1 + seat.rank], mailbox.address)
            while not store.check(keys):
                if store.check([_VERDICT]):
                    raise self._agreed(store, "")
                self._rest(lambda: [rank for rank, key in enumerate(keys[1:]) if not store.check([key])], store)
            job, *addresses = (value.decode() for value in store.multi_get(keys))
        except DistError as error:
            raise self._store_error(error) from error
        mailbox.open(addresses, job)

    def _is_open(self) -> bool:
        try:
            socket.create_connection((self._seat.host, self._seat.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _left(self) -> timedelta:
        return timedelta(seconds=max(0.1, self._until - time.monotonic()))

    def _rest(self, absent: Callable[[], list[int]], store: Store | None = None) -> None:
        """A pause, unless there is no more time; then all whom the store still reaches end by one verdict."""
        if not self._is_terminated.is_pressing and time.monotonic() < self._until:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, _LONGEST_PAUSE_SECONDS)
            return
        if self._is_terminated.is_pressing:
            error = self._absent(EXIT_LOST, absent(), "lost: not there yet when the launcher ended the job")
        else:
            error = self._absent(EXIT_HANG, absent(), f"absent: not there within {self._deadline_seconds:g} s")
        if store is not None:
            error = self._agreed(store, json.dumps(dataclasses.asdict(error.verdict)))
        raise error

    def _agreed(self, store: Store, verdict: str) -> AbsentError:
        """The first verdict that the store was given, heard by all who are there before its holder leaves."""
        agreed = Verdict.from_json(json.loads(store.compare_set(_VERDICT, "", verdict)))
        num_heard = store.add(_HEARD, 1)
        if self._seat.rank == self._seat.holder:
            until = time.monotonic() + _LINGER_SECONDS
            while num_heard < self._seat.world_size - len(agreed.culprits) and time.monotonic() < until:
                time.sleep(0.05)
                num_heard = store.add(_HEARD, 0)
        return AbsentError(agreed)

    def _store_error(self, error: DistError) -> AbsentError:
        """The store has ended, or stopped to answer."""
        code = EXIT_HANG if time.monotonic() >= self._until else EXIT_LOST
        holder = 0 if self._seat.holder is None else self._seat.holder
        return self._absent(code, [holder], f"lost with the job's store: {str(error).splitlines()[0]}")

    def _absent(self, code: int, absent: list[int], why: str) -> AbsentError:
        present = sorted(set(range(self._seat.world_size)) - set(absent))
        text = (
            f"{name_ranks(absent)} {'is' if len(absent) == 1 else 'are'} {why}; {name_ranks(present)} awaited {_START}"
        )
        return AbsentError(Verdict(code=code, text=text, judge=self._seat.rank, culprits=tuple(absent)))
