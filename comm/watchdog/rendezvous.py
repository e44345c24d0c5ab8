"""Joins a rank to its job: exchanges a key and the watchdogs' addresses through an untrusted store.

1. Rank 0 announces the source of the key: every rank has it from the launcher or the user, or it is in a file that the
   announcement names. The announcement is public and contains no secret.
2. Each rank publishes its address and a random nonce, authenticated with that key. Leaders of the tree of ranks combine
   the records of their groups into digests, up to one digest of all.
3. All ranks derive the attempt's key from that key and that digest, so each attempt has a new key: a rank accepts a
   digest only if its own nonce is in it. Each rank publishes its address again, authenticated with the attempt's key.
   These records prove that all ranks have the same key.

Each rank ends with the addresses of its groups: those of its block, and of the leaders above it. Rank 0 has those
of all ranks. The others receive the rest as datagrams, after the start.
"""

import json
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Literal

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.groups import GROUP_TIMEOUT_MARGIN_SECONDS
from comm.watchdog import membership, wire
from comm.watchdog.addresses import AddressBook, encode_addresses
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.job_start import START, JobStart, Termination
from comm.watchdog.membership import KEY_VARIABLE, JobKeyError, Membership
from comm.watchdog.store_gather import Record, StoreGather, is_loopback
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.watchdog_socket import WatchdogSocket

_LOOPBACK = "127.0.0.1"
_ANNOUNCEMENT = "watchdog/key"
_NONCE_BYTES = 16
_MAX_PATH_CHARACTERS = 4096
_FILE_SECONDS = 10.0  # time that a rank waits for a missing key: a file appears late on some shared file systems


class Job:
    """Job of a rank: the store for process groups, and the watchdog."""

    def __init__(self, store: Store, watchdog: Watchdog, restore: Callable[[], None]) -> None:
        self.store = store
        self.watchdog = watchdog
        self._restore = restore

    def close(self) -> None:
        """Leaves the job without an error."""
        self._restore()
        self.watchdog.close()


def join(
    member: Membership,
    log: CollectiveLog,
    deadline_seconds: float,
    crash_report: Callable[[Verdict], None],
    start_seconds: float | None = None,
    key_folder: Path | None = None,
) -> Job:
    """Waits for all other ranks and starts the watchdog. Every rank calls it on its main thread.

    After that, SIGTERM makes the watchdog check whether a rank was lost. If none was, the earlier handler of the
    process handles the signal, or, without one, the watchdog ends the process. Raises AbsentError if not all ranks
    joined in `start_seconds`, by default `deadline_seconds`, and JobKeyError if the ranks have no common key. In
    `key_folder` rank 0 writes the file with the job's key, if it must.
    """
    watchdog_socket = WatchdogSocket(member.rank, _LOOPBACK if member.is_one_machine else member.host)
    termination = Termination()
    restore = termination.install(watchdog_socket.wakeup_file)
    start = JobStart(member, deadline_seconds if start_seconds is None else start_seconds, termination)
    with log.phase("world", range(member.world_size), START):
        store = start.open_store()
        AddressExchange(start, store, watchdog_socket, key_folder).run()
    store.set_timeout(timedelta(seconds=deadline_seconds + GROUP_TIMEOUT_MARGIN_SECONDS))
    watchdog = Watchdog(
        member.rank, watchdog_socket, log, deadline_seconds, crash_report, ends_by_signal=termination.is_only_handler
    )
    watchdog.start()
    return Job(store, watchdog, restore)


@dataclass(frozen=True, slots=True)
class _Announcement:
    """Source of the job's key: a nonce, sealed with a given key, or the path of a file with the key."""

    source: Literal["given", "file"]
    sealed: wire.Text = ""
    path: Annotated[str, _MAX_PATH_CHARACTERS] = ""


class _KeyChangedError(Exception):
    """Raised if rank 0 has announced a new key: the previous one belonged to an earlier attempt."""


class AddressExchange:
    """Exchange of keys and addresses, as run by one rank."""

    def __init__(self, start: JobStart, store: Store, watchdog_socket: WatchdogSocket, folder: Path | None) -> None:
        self._start = start
        self._store = store
        self._socket = watchdog_socket
        self._folder = folder
        self._member = start.member
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._announced = b""
        self._file: membership.KeyFile | None = None

    def run(self) -> None:
        """Exchanges addresses and opens the socket for messages of all ranks."""
        try:
            if self._member.rank == 0:
                self._announce()
            while True:
                try:
                    self._socket.open(*self._exchange(self._wait_for_key()))
                except _KeyChangedError:
                    continue
                return
        except DistError as error:
            raise self._start.store_error(error) from error
        finally:
            if self._file is not None:
                self._file.remove()

    def _exchange(self, key: bytes) -> tuple[AddressBook, bytes]:
        self._start.key = key
        published: dict[str, str] = {}
        nonces = self._gather(key, "nonce", published)
        nonces.run()
        # On the machine that MASTER_ADDR names, that name may resolve to the loopback address, which others cannot
        # reach.
        if nonces.remote_host is not None and is_loopback(self._socket.host):
            self._socket.rebind(nonces.remote_host)
        attempt_key = wire.derive(key, "attempt", nonces.digest.encode())
        addresses = self._gather(attempt_key, "address", published)
        addresses.run()
        addresses.confirm()
        return addresses.book, attempt_key

    def _gather(self, key: bytes, name: str, published: dict[str, str]) -> StoreGather:
        record = Record(self._nonce.hex(), encode_addresses([(self._socket.host, self._socket.port)]))
        return StoreGather(self._start, self._store, key, name, record, self._check_announcement, published)

    def _announce(self) -> None:
        """Announces the source of the key on rank 0, with a new nonce so that each attempt has a new key."""
        if self._member.key is not None:
            sealed = wire.seal_object(self._member.key, _ANNOUNCEMENT, {"nonce": self._nonce.hex()})
            announcement = _Announcement("given", sealed=sealed)
        elif self._folder is not None:
            self._file = membership.write_key_file(self._folder)
            announcement = _Announcement("file", path=str(self._file.path))
        else:
            raise JobKeyError(
                f"{KEY_VARIABLE}: must be set if ranks have no out_dir, is not set; nearest valid: set out_dir"
            )
        self._announced = json.dumps(wire.encode_fields(announcement)).encode()
        self._store.set(_ANNOUNCEMENT, self._announced.decode())

    def _wait_for_key(self) -> bytes:
        """Waits until the key is announced and readable, and returns it, or raises `JobKeyError`."""
        since = time.monotonic()
        while True:
            if self._store.check([_ANNOUNCEMENT]):
                if self._member.rank != 0:
                    self._announced = self._store.get(_ANNOUNCEMENT)
                try:
                    return self._announced_key(self._announced)
                except wire.MessageError:
                    pass  # not written by rank 0 of this attempt
                except JobKeyError:
                    if time.monotonic() - since > _FILE_SECONDS:
                        raise
            self._start.wait(lambda: [0], self._store)

    def _announced_key(self, announced: bytes) -> bytes:
        """Returns the announced key; raises MessageError if invalid, JobKeyError if not (yet) on this rank."""
        announcement = wire.decode_fields(_Announcement, wire.parse_object(announced))
        given = self._member.key
        if (announcement.source == "given") != (given is not None):
            ranks = ("rank 0", f"rank {self._member.rank}")
            has_key, has_none = ranks if given is None else reversed(ranks)
            raise JobKeyError(
                f"{KEY_VARIABLE}: must be set for all ranks or for none, is set on {has_key} and not "
                f"on {has_none}; nearest valid: export it in the script that starts all nodes"
            )
        if given is not None:
            wire.open_object(given, _ANNOUNCEMENT, announcement.sealed.encode())
            return wire.derive(given, "start", announcement.sealed.encode())  # it contains rank 0's nonce
        if self._file is not None:
            return self._file.key
        try:
            return membership.read_key_file(Path(announcement.path))
        except FileNotFoundError as error:
            raise JobKeyError(
                f"out_dir: rank {self._member.rank} must see the file with the job's key that rank 0 wrote, "
                f"{announcement.path!r} is not there; {membership.ADVICE}"
            ) from error

    def _check_announcement(self) -> None:
        """Repeats the announcement on rank 0; on other ranks, raises if there is a new valid one."""
        if self._member.rank == 0:
            self._store.set(_ANNOUNCEMENT, self._announced.decode())
            return
        announced = self._store.get(_ANNOUNCEMENT) if self._store.check([_ANNOUNCEMENT]) else self._announced
        if announced == self._announced:
            return
        with suppress(wire.MessageError, JobKeyError):  # not written by rank 0 of this attempt
            self._announced_key(announced)
            raise _KeyChangedError
