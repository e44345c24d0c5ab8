"""Starts a job on one rank: opens the store, handles SIGTERM, and reports ranks that do not join."""

import json
import signal
import socket
import time
from collections.abc import Callable, Collection, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

from torch.distributed import DistError, FileStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from base.decode import encode
from comm.exits import EXIT_HANG, EXIT_LOST
from comm.watchdog import wire
from comm.watchdog.membership import Membership
from comm.watchdog.ranks import RankSet, RankTree, name_ranks
from comm.watchdog.verdict import MAX_CULPRITS, Verdict

START = "start of the job"
_VERDICT = "watchdog/verdict"
_RECEIVED = "watchdog/verdict_received"
_UNSIGNED = "watchdog/verdict_without_key"
_LINGER_SECONDS = 2.0
_FIRST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.5
_LONGEST_CONFIRM_PAUSE_SECONDS = 0.2
_MAX_RECORD_BYTES = 65_536
_MAX_LOOKS_PER_SECOND = 20_000
_STAGGER_SECONDS = 0.5
WAITS_PER_LOOK = 4  # A rank of a large job looks for what is rarely there, such as a verdict, only each fourth time
# Wait after SIGTERM: ranks of a preempted job still join, so that all can agree on it; a lost rank never joins.
_PREEMPTED_START_SECONDS = 3.0


class AbsentError(RuntimeError):
    """Raised if ranks did not join the job. This rank ends with the verdict."""

    def __init__(self, verdict: Verdict) -> None:
        super().__init__(verdict.text)
        self.verdict = verdict


class Termination:
    """Record of SIGTERM and its time. After `install`, an instance is the signal's handler."""

    def __init__(self) -> None:
        self._plain = signal.getsignal(signal.SIGTERM)
        self._since: float | None = None

    def install(self, wakeup_file: int) -> Callable[[], None]:
        """Handles SIGTERM, which also writes a byte to the file; returns what restores the earlier handler."""
        signal.signal(signal.SIGTERM, self)
        plain_file = signal.set_wakeup_fd(wakeup_file, warn_on_full_buffer=False)

        def restore() -> None:
            signal.set_wakeup_fd(plain_file)
            signal.signal(signal.SIGTERM, self._plain)

        return restore

    def __call__(self, number: int, frame: FrameType | None) -> Any:
        """Records the signal and calls the earlier handler."""
        self._since = self._since or time.monotonic()
        if callable(self._plain):
            self._plain(number, frame)

    @property
    def is_only_handler(self) -> bool:
        """Whether there was no earlier handler."""
        return not callable(self._plain)

    @property
    def is_overdue(self) -> bool:
        """Whether SIGTERM arrived so long ago that absent ranks will not join."""
        patience = 0.0 if self.is_only_handler else _PREEMPTED_START_SECONDS
        return self._since is not None and time.monotonic() - self._since >= patience


class JobStart:
    """Wait for other ranks at the start of a job, until a deadline; `note` is added to a verdict's text."""

    def __init__(self, member: Membership, deadline_seconds: float, termination: Termination) -> None:
        self.member = member
        self.tree = RankTree(member.world_size, member.fanout)
        self.key: bytes | None = None
        self.note = ""
        self._deadline_seconds = deadline_seconds
        self._until = time.monotonic() + deadline_seconds
        self._termination = termination
        self._pause = _FIRST_PAUSE_SECONDS
        self._num_waits = 0
        # Ranks that lead no group look into the store so seldom that it has time for those that do.
        looks = 0.0 if self.tree.led_levels(member.rank) else member.world_size / _MAX_LOOKS_PER_SECOND
        self._longest_pause = max(_LONGEST_PAUSE_SECONDS, looks)

    def open_store(self) -> Store:
        """Opens the job's store, or waits for the rank that opens it; raises `AbsentError` at the deadline."""
        member = self.member
        if member.store_file is not None:
            store = FileStore(str(member.store_file), -1)
            store.set_timeout(self._left())
            return store
        is_store_rank = member.rank == member.store_rank
        while not is_store_rank and not self._is_open():
            self.wait(lambda: [member.store_rank or 0])
        try:
            return TCPStore(
                host_name=member.host,
                port=member.port,
                world_size=member.world_size,
                is_master=is_store_rank,
                timeout=self._left(),
                wait_for_workers=False,
                multi_tenant=True,
                master_listen_fd=_listen(member.host, member.port) if is_store_rank and member.is_one_machine else None,
            )
        except DistError as error:
            if is_store_rank:
                raise
            raise self.store_error(error) from error

    def begin_wait(self) -> None:
        """Makes the next pauses short again, because something new is awaited."""
        self._pause = _FIRST_PAUSE_SECONDS

    def wait(self, absent: Callable[[], list[int]], store: Store | None = None) -> None:
        """Pauses before the caller checks again which ranks are `absent`.

        Raises AbsentError if the deadline has passed on this or another rank. Once `store` is open, the present ranks
        agree there on a verdict.
        """
        self._num_waits += 1
        if store is not None and (self.tree.is_flat or self._num_waits % WAITS_PER_LOOK == 0):
            self._raise_received(store)
        if not self._termination.is_overdue and time.monotonic() < self._until:
            time.sleep(self._pause)
            self._pause = min(2 * self._pause, self._longest_pause)
            return
        if store is not None and self.key is not None:
            self._await_verdict(store)
        if self._termination.is_overdue:
            error = self._absent(EXIT_LOST, absent(), "lost: not joined when the launcher ended the job")
        else:
            error = self._absent(EXIT_HANG, absent(), f"absent: not joined within {self._deadline_seconds:g} s")
        if store is not None and self.key is None:
            raise AbsentError(self._first_verdict(store, error.verdict))
        if store is not None and self.key is not None:
            self._agree(store, self.key, error.verdict)
        raise error

    def _await_verdict(self, store: Store) -> None:
        """Leaves the search for absent ranks to the ranks at the top of the tree, if there are many ranks."""
        num_levels_below = self.tree.num_levels - len(self.tree.led_levels(self.member.rank))
        until = time.monotonic() + num_levels_below * _STAGGER_SECONDS
        while not self.tree.is_flat and time.monotonic() < until:
            self._raise_received(store)
            time.sleep(_STAGGER_SECONDS / 2)

    def store_error(self, error: DistError) -> AbsentError:
        """Returns an error with the verdict on a store that has ended or no longer responds."""
        code = EXIT_HANG if time.monotonic() >= self._until else EXIT_LOST
        return self._absent(
            code, [self.member.store_rank or 0], f"lost with the job's store: {str(error).splitlines()[0]}"
        )

    def _raise_received(self, store: Store) -> None:
        """Raises the verdict in the store if a rank of this attempt wrote it."""
        if self.key is None or not store.check([_VERDICT]):
            return
        try:
            values = wire.open_object(self.key, _VERDICT, store.get(_VERDICT))
            verdict = wire.decode_fields(Verdict, values, self.member.world_size)
        except wire.MessageError:
            return
        self._confirm_verdict(store, self.key, verdict)
        raise AbsentError(verdict)

    def _first_verdict(self, store: Store, verdict: Verdict) -> Verdict:
        """Returns the first verdict of the ranks that end without a key because rank 0 has announced none.

        It is not authenticated. Only a rank that ends anyway reads it, so another process could only change its text.
        """
        first = store.compare_set(_UNSIGNED, "", json.dumps(encode(verdict)))
        try:
            received = wire.decode_fields(Verdict, wire.parse_object(first), self.member.world_size)
        except wire.MessageError:
            return verdict
        return received if received.code in (EXIT_HANG, EXIT_LOST) else verdict

    def _agree(self, store: Store, key: bytes, verdict: Verdict) -> None:
        """Raises the first authentic verdict in the store, or writes this rank's verdict there."""
        sealed = wire.seal_object(key, _VERDICT, encode(verdict))
        if store.compare_set(_VERDICT, "", sealed).decode(errors="replace") != sealed:
            self._raise_received(store)
            store.set(_VERDICT, sealed)
        self._confirm_verdict(store, key, verdict)

    def _confirm_verdict(self, store: Store, key: bytes, verdict: Verdict) -> None:
        """Confirms that this rank has the verdict. So a rank with the store ends after all others."""
        if self.member.store_rank is not None:
            self.await_confirmations(store, key, _RECEIVED, _LINGER_SECONDS, absent=verdict.culprits)
        name = f"{_RECEIVED}/{self.member.rank}"
        store.set(name, wire.seal_object(key, name, {}))

    def await_confirmations(
        self,
        store: Store,
        key: bytes,
        name: str,
        seconds: float,
        *,
        absent: Collection[int] = (),
        rewrite: Callable[[], None] | None = None,
    ) -> None:
        """Waits until the ranks below this one, except absent ones, have written records under `name`.

        The longest wait is `seconds` for each level that this rank leads. `rewrite` writes records again at each look,
        and lets SIGTERM end the wait.
        """
        keys = [f"{name}/{rank}" for rank in self.tree.children(self.member.rank) if rank not in absent]
        until = time.monotonic() + len(self.tree.led_levels(self.member.rank)) * seconds
        pause = _FIRST_PAUSE_SECONDS
        while keys and time.monotonic() < until and (rewrite is None or not self._termination.is_overdue):
            if store.check(keys):
                records = open_records(store, key, keys)
                keys = [name for name, record in zip(keys, records, strict=True) if record is None]
            if keys:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_CONFIRM_PAUSE_SECONDS)
                if rewrite is not None:
                    rewrite()

    def _is_open(self) -> bool:
        try:
            socket.create_connection((self.member.host, self.member.port), timeout=1.0).close()
        except OSError:
            return False
        return True

    def _left(self) -> timedelta:
        return timedelta(seconds=max(0.1, self._until - time.monotonic()))

    def _absent(self, code: int, absent: list[int], why: str) -> AbsentError:
        present = set(range(self.member.world_size)) - set(absent)
        subject = f"{name_ranks(absent)} {'is' if len(absent) == 1 else 'are'}"
        text = wire.printable(f"{subject} {why}{self.note}; {name_ranks(present)} waited for {START}")
        culprits = RankSet.of(absent).first(MAX_CULPRITS)
        return AbsentError(Verdict(code=code, text=text, judge=self.member.rank, culprits=culprits))


def open_records(store: Store, key: bytes, names: Sequence[str]) -> list[dict[str, Any] | None]:
    """Reads records that exist, and returns those that are authentic, None for others."""
    records: list[dict[str, Any] | None] = []
    for name, sealed in zip(names, store.multi_get(list(names)), strict=True):
        try:
            if len(sealed) > _MAX_RECORD_BYTES:
                raise wire.MessageError("too long")
            records.append(wire.open_object(key, name, sealed))
        except wire.MessageError:
            records.append(None)
    return records


def _listen(host: str, port: int) -> int:
    """Opens a socket that listens on this host's address only: torch would listen on all addresses."""
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, socket.SOCK_STREAM) as opened:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(socket.SOMAXCONN)
        return opened.detach()
