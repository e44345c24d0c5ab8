"""Exchanges a key and the watchdogs' addresses between all ranks, through an untrusted store.

1. Rank 0 announces the source of the key: every rank has it from the launcher or the user, or it is in a file that the
   announcement names. The announcement is public and contains no secret.
2. Each rank publishes its host and a random nonce, authenticated with that key. Leaders of the tree of ranks combine
   the nonces of their groups into digests, up to one digest of all nonces.
3. All ranks derive the attempt's key from that key and that digest, so each attempt has a new key: a rank accepts a
   digest only if its own nonce is in it. Each rank publishes its address, authenticated with the attempt's key, and
   leaders combine addresses in the same way. These records prove that all ranks have the same key.

Each rank ends with the addresses of its groups: those of its block, and of the leaders above it. Rank 0 has those
of all ranks. The others receive the rest as datagrams, after the start.
"""

import json
import secrets
import time
from contextlib import suppress
from pathlib import Path

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from comm.watchdog.authentication import derive, open_object, seal_object
from comm.watchdog.decode import MessageError, parse_object, text_of
from comm.watchdog.job_key import ADVICE, KEY_VARIABLE, JobKeyError, KeyFile, read_key_file, write_key_file
from comm.watchdog.job_start import JobStart
from comm.watchdog.tree.address_book import AddressBook
from comm.watchdog.tree.gatherings import AddressGathering, NonceGathering, is_loopback
from comm.watchdog.tree.store_gather import StoreGather
from comm.watchdog.watchdog_socket import WatchdogSocket

_ANNOUNCEMENT = "watchdog/key"
_NONCE_BYTES = 16
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

    def _exchange(self, key: bytes) -> tuple[AddressBook, bytes]:
        """Returns the addresses that this rank needs at first, and the attempt's key."""
        self._start.key = key
        tree, rank = self._start.tree, self._member.rank
        published: dict[str, str] = {}
        nonces = NonceGathering(tree, rank, key, self._socket.host, self._nonce)
        self._gather(key, nonces, published).run()
        attempt_key = derive(key, "attempt", nonces.digest)
        # On the machine that MASTER_ADDR names, that name may resolve to the loopback address, which others cannot
        # reach.
        if nonces.remote_host is not None and is_loopback(self._socket.host):
            self._socket.rebind(nonces.remote_host)
        book = AddressBook(tree)
        addresses = AddressGathering(book, rank, (self._socket.host, self._socket.port))
        gather = self._gather(attempt_key, addresses, published)
        addresses.read_blocks = gather.blocks if rank == 0 else None
        gather.run()
        gather.confirm()
        return book, attempt_key

    def _gather(
        self, key: bytes, gathering: NonceGathering | AddressGathering, published: dict[str, str]
    ) -> StoreGather:
        return StoreGather(self._start, self._store, key, gathering, self._check_announcement, published)

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
