"""Exchanges a key and the watchdogs' addresses between all ranks, through an untrusted store.

1. Rank 0 announces the source of the key: every rank has it from the launcher or the user, or it is in a file that the
   announcement names. The announcement is public and contains no secret.
2. Each rank publishes its host and a random nonce, authenticated with that key.
3. All ranks derive the attempt's key from that key and all nonces, so each attempt has a new key. Each rank publishes
   its address, authenticated with the attempt's key. These records prove that all ranks have the same key.

A record that is not authentic, or belongs to an earlier attempt, counts as absent. Each rank rewrites its own records
until it has the records of all other ranks.
"""

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.watchdog.authentication import derive, open_object, seal_object
from comm.watchdog.decode import MessageError, integer_of, parse_object, text_of
from comm.watchdog.job_key import ADVICE, KEY_VARIABLE, JobKeyError, KeyFile, read_key_file, write_key_file
from comm.watchdog.job_start import JobStart
from comm.watchdog.watchdog_socket import SocketAddress, WatchdogSocket

_ANNOUNCEMENT = "watchdog/key"
_NONCE_BYTES = 16
_MAX_HOST_CHARACTERS = 256
_MAX_PATH_CHARACTERS = 4096
_FILE_SECONDS = 10.0
"""Time that a rank waits for a missing key: a file appears late on some shared file systems."""


class _KeyChangedError(Exception):
    """Raised if rank 0 has announced a new key: the previous one belonged to an earlier attempt."""


class AddressExchange:
    """Exchange of keys and addresses, as run by one rank."""

    def __init__(self, start: JobStart, store: Store, watchdog_socket: WatchdogSocket, folder: Path | None) -> None:
        """Stores the arguments; `run` does the work.

        Args:
            start: start of the job, with its deadline.
            store: store of the job.
            watchdog_socket: socket that `run` opens.
            folder: run folder in which rank 0 writes the file with the key, if it must.
        """
        self._start = start
        self._store = store
        self._socket = watchdog_socket
        self._folder = folder
        self._member = start.member
        self._nonce = secrets.token_bytes(_NONCE_BYTES)
        self._announced = b""
        self._published: dict[str, str] = {}
        self._file: KeyFile | None = None

    def run(self) -> None:
        """Exchanges addresses and opens the socket for messages of all ranks.

        Raises:
            AbsentError: if a rank does not join before the deadline.
            JobKeyError: if the ranks have no common key.
        """
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

    def _exchange(self, key: bytes) -> tuple[list[SocketAddress], bytes]:
        """Returns the addresses of all ranks and the attempt's key."""
        self._start.key = key
        self._published.clear()
        hellos = self._collect(key, "nonce", {"host": self._socket.host, "nonce": self._nonce.hex()})
        hosts = [text_of(each, "host", _MAX_HOST_CHARACTERS) for each in hellos]
        attempt_key = derive(key, "attempt", *(text_of(each, "nonce").encode() for each in hellos))
        # On the machine that MASTER_ADDR names, that name may resolve to the loopback address, which others cannot
        # reach.
        remote = next((host for host in hosts if not _is_loopback(host)), None)
        if remote is not None and _is_loopback(self._socket.host):
            self._socket.rebind(remote)
        own = {"host": self._socket.host, "port": self._socket.port}
        records = self._collect(attempt_key, "address", own)
        addresses = [(text_of(each, "host", _MAX_HOST_CHARACTERS), integer_of(each, "port", 65536)) for each in records]
        return addresses, attempt_key

    def _announce(self) -> None:
        """Announces the source of the key on rank 0, with a new nonce so that each attempt has a new key."""
        if self._member.key is not None:
            sealed = seal_object(self._member.key, _ANNOUNCEMENT, {"nonce": self._nonce.hex()})
            announcement = {"source": "given", "sealed": sealed}
        elif self._folder is not None:
            self._file = write_key_file(self._folder)
            announcement = {"source": "file", "path": str(self._file.path)}
        else:
            raise JobKeyError(
                f"{KEY_VARIABLE}: must be set if ranks have no out_dir, is not set; nearest valid: set out_dir"
            )
        self._announced = json.dumps(announcement).encode()
        self._store.set(_ANNOUNCEMENT, self._announced.decode())

    def _wait_for_key(self) -> bytes:
        """Waits until the key is announced and readable, and returns it.

        Raises:
            JobKeyError: if this rank could not get the key in time.
        """
        since = time.monotonic()
        while True:
            if self._store.check([_ANNOUNCEMENT]):
                if self._member.rank != 0:
                    self._announced = self._store.get(_ANNOUNCEMENT)
                try:
                    return self._announced_key(self._announced)
                except MessageError:
                    pass  # not written by rank 0 of this attempt
                except JobKeyError:
                    if time.monotonic() - since > _FILE_SECONDS:
                        raise
            self._start.wait(lambda: [0], self._store)

    def _announced_key(self, announced: bytes) -> bytes:
        """Returns the key that an announcement names.

        Raises:
            MessageError: if it is not a valid announcement.
            JobKeyError: if this rank does not have the key, or not yet.
        """
        announcement, given = parse_object(announced), self._member.key
        match text_of(announcement, "source"):
            case "given" if given is not None:
                values = open_object(given, _ANNOUNCEMENT, text_of(announcement, "sealed").encode())
                return derive(given, "start", text_of(values, "nonce").encode())
            case "file" if given is None:
                if self._file is not None:
                    return self._file.key
                path = Path(text_of(announcement, "path", _MAX_PATH_CHARACTERS))
                try:
                    return read_key_file(path)
                except FileNotFoundError as error:
                    raise JobKeyError(
                        f"out_dir: rank {self._member.rank} must see the file with the job's key that rank 0 wrote, "
                        f"{str(path)!r} is not there; {ADVICE}"
                    ) from error
            case "given" | "file":
                places = ("rank 0", f"rank {self._member.rank}")
                has_key, has_none = places if given is None else reversed(places)
                raise JobKeyError(
                    f"{KEY_VARIABLE}: must be set for all ranks or for none, is set on {has_key} and not "
                    f"on {has_none}; nearest valid: export it in the script that starts all nodes"
                )
        raise MessageError("source: unknown")

    def _collect(self, key: bytes, name: str, own: Mapping[str, Any]) -> Sequence[dict[str, Any]]:
        """Publishes a record and waits for those of all ranks, which it returns in rank order."""
        store, rank = self._store, self._member.rank
        purposes = [f"watchdog/{name}/{each}" for each in range(self._member.world_size)]
        found: dict[int, dict[str, Any]] = {rank: dict(own)}
        self._published[purposes[rank]] = seal_object(key, purposes[rank], own)
        while True:
            self._publish()
            self._check_announcement()
            pending = [each for each in range(len(purposes)) if each not in found]
            if not pending or store.check([purposes[each] for each in pending]):
                num_bad = 0
                for each, sealed in zip(pending, self._get([purposes[each] for each in pending]), strict=True):
                    try:
                        found[each] = open_object(key, purposes[each], sealed)
                    except MessageError:
                        num_bad += 1
                self._start.note = " (the addresses in the store are not authentic)" if num_bad else ""
                if not num_bad:
                    return [found[each] for each in range(len(purposes))]
            missing = [each for each in pending if each not in found]
            self._start.wait(lambda: self._absent(missing, purposes), store)  # noqa: B023

    def _get(self, keys: list[str]) -> list[bytes]:
        return self._store.multi_get(keys) if keys else []

    def _absent(self, missing: list[int], purposes: Sequence[str]) -> list[int]:
        """Returns the ranks without a record, or, if all have one, the ranks whose record is not authentic."""
        return [each for each in missing if not self._store.check([purposes[each]])] or missing

    def _publish(self) -> None:
        """Rewrites this rank's records: other ranks may need them, or another process replaced them."""
        for purpose, sealed in self._published.items():
            self._store.set(purpose, sealed)

    def _check_announcement(self) -> None:
        """Repeats the announcement on rank 0; on other ranks, raises if there is a new valid one."""
        if self._member.rank == 0:
            self._store.set(_ANNOUNCEMENT, self._announced.decode())
            return
        announced = self._store.get(_ANNOUNCEMENT) if self._store.check([_ANNOUNCEMENT]) else self._announced
        if announced == self._announced:
            return
        with suppress(MessageError, JobKeyError):  # not written by rank 0 of this attempt
            self._announced_key(announced)
            raise _KeyChangedError


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
