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

In a gather, each rank publishes its record. The leader of a block reads the records of its block and publishes one that
combines them, the leader of 64 blocks combines theirs, and so on up to rank 0. Then each rank reads the combined
records of the groups that it is in: one per level. The work of the store grows linearly with the number of ranks. A
record that is not authentic counts as absent. Each rank rewrites its own records until it has those that it needs, and
a leader until the ranks below it have theirs.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Annotated, Literal

from torch.distributed import DistError
from torch.distributed.distributed_c10d import Store

from base.decode import encode
from comm.groups import GROUP_TIMEOUT_MARGIN_SECONDS
from comm.watchdog import membership, wire
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.job_start import START, WAITS_PER_LOOK, JobStart, Termination, open_records
from comm.watchdog.membership import KEY_VARIABLE, JobKeyError, Membership
from comm.watchdog.messages import AddressBook, Addresses, WatchdogSocket, decode_addresses, encode_addresses
from comm.watchdog.ranks import FANOUT
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog import Watchdog
from comm.watchdog.wire import MessageError, SocketAddress, decode_fields, derive, seal_object

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

    def _gather(self, key: bytes, name: str, published: dict[str, str]) -> "StoreGather":
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
        self._announced = json.dumps(encode(announcement)).encode()
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
        member_key = self._member.key
        if (announcement.source == "given") != (member_key is not None):
            ranks = ("rank 0", f"rank {self._member.rank}")
            has_key, has_none = ranks if member_key is None else reversed(ranks)
            raise JobKeyError(
                f"{KEY_VARIABLE}: must be set for all ranks or for none, is set on {has_key} and not "
                f"on {has_none}; nearest valid: export it in the script that starts all nodes"
            )
        if member_key is not None:
            wire.open_object(member_key, _ANNOUNCEMENT, announcement.sealed.encode())
            return wire.derive(member_key, "start", announcement.sealed.encode())  # it contains rank 0's nonce
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


_DIGEST_CHARACTERS = 32
_BLOCKS_PER_READ = 64
_READY = "watchdog/ready"
_READY_SECONDS = 5.0
_MAX_NAMED = 1024


@dataclass(frozen=True, slots=True)
class Record:
    """Nonce and address of a rank, or digests of the records of a group's members, an address of each."""

    content: Annotated[str, FANOUT * _DIGEST_CHARACTERS]
    addresses: Addresses

    def digest(self, key: bytes, level: int) -> str:
        """Returns the digest that the record of the group above contains; keys derive from the root's."""
        text = json.dumps(encode(self), sort_keys=True)
        return derive(key, f"record of level {level}", text.encode()).hex()[:_DIGEST_CHARACTERS]


class StoreGather:
    """Gather of one kind of record, as run by one rank.

    After `run`, `book` has the addresses of this rank's groups, on rank 0 of all ranks, and `digest` covers the records
    of all ranks. `remote_host` is a host of the job that is no loopback address, if there is one.
    """

    def __init__(
        self,
        start: JobStart,
        store: Store,
        key: bytes,
        name: str,
        record: Record,
        check: Callable[[], None],
        published: dict[str, str],
    ) -> None:
        """Stores the arguments; `run` does the work. The keys of records start with `name`.

        `check` is called before each look into the store, and may raise. `published` receives the records of this
        gather.
        """
        self.book = AddressBook(start.tree)
        self.digest = ""
        self.remote_host: str | None = None
        self._start = start
        self._store = store
        self._tree = start.tree
        self._key = key
        self._name = name
        self._record = record
        self._check = check
        self._rank = start.member.rank
        self._published = published

    def run(self) -> None:
        """Publishes this rank's records, and reads its groups', or raises `AbsentError` at the deadline."""
        self.publish()
        self.lead()
        self.read_path()

    def publish(self) -> None:
        """Publishes the record of this rank."""
        self._publish(self._member_key(1, self._rank), self._record)

    def lead(self) -> None:
        """Combines the records of the groups that this rank leads, from its block upwards."""
        for level in self._tree.led_levels(self._rank):
            index = self._rank // self._tree.fanout**level
            keys = [self._member_key(level, member) for member in self._tree.group(level, index)]
            combined: list[Record] = []
            self._await(keys, lambda records: combined.append(self.combine(level, index, records)))  # noqa: B023
            self._publish(self._group(level, index), combined[0])

    def read_path(self) -> None:
        """Reads the combined records of this rank's groups. That of the root appears after all others."""
        path = self._tree.path(self._rank)
        self._await([self._group(level, index) for level, index in enumerate(path, 1)], self.accept)

    def confirm(self) -> None:
        """Announces that this rank has what it needs, after the ranks below it or some seconds.

        So a record that another process replaces at the end is written again.
        """
        self._start.await_confirmations(self._store, self._key, _READY, _READY_SECONDS, rewrite=self._rewrite)
        self._store.set(name := f"{_READY}/{self._rank}", seal_object(self._key, name, {}))

    def combine(self, level: int, index: int, records: Sequence[Record]) -> Record:
        """Returns the record of group `index` of a level from those of its members in order."""
        addresses = []
        for member, record in zip(self._tree.group(level, index), records, strict=True):
            members = self._addresses(level - 1, member, record)
            # The leader's, unless others reach the host of another member only.
            addresses.append(next((address for address in members if not is_loopback(address[0])), members[0]))
        digests = "".join(record.digest(self._key, level - 1) for record in records)
        return Record(digests, encode_addresses(addresses))

    def accept(self, path: Sequence[Record]) -> None:
        """Follows the digests from this rank's record to the root, or raises MessageError; keeps addresses."""
        digest = self._record.digest(self._key, 0)
        groups: list[list[SocketAddress]] = []
        for level, record in enumerate(path, 1):
            groups.append(self._addresses(level, self._rank, record))
            first = self._rank // self._tree.fanout ** (level - 1) % self._tree.fanout * _DIGEST_CHARACTERS
            is_whole = len(record.content) == len(groups[-1]) * _DIGEST_CHARACTERS
            if not is_whole or record.content[first : first + _DIGEST_CHARACTERS] != digest:
                raise MessageError("content: without this rank's nonce")
            digest = record.digest(self._key, level)
        for level, addresses in enumerate(groups, 1):
            self.book.add(self._tree.group(level, self._rank // self._tree.fanout**level), addresses)
        if self._rank == 0:
            self._add_all()
        self.digest = digest
        self.remote_host = next((host for host, _ in groups[-1] if not is_loopback(host)), None)

    def _add_all(self) -> None:
        """Adds the addresses of all blocks to the book of rank 0, from which the other ranks receive them."""
        missing = self.book.missing_blocks()
        for first in range(0, len(missing), _BLOCKS_PER_READ):
            indices = missing[first : first + _BLOCKS_PER_READ]
            records = self._open([self._group(1, index) for index in indices])
            for index, record in zip(indices, records, strict=True):
                if record is None:
                    raise MessageError(f"level_1/{index}: not authenticated")
                ranks = self._tree.group(1, index)
                self.book.add(ranks, self._addresses(1, ranks.start, record))

    def _addresses(self, level: int, rank: int, record: Record) -> list[SocketAddress]:
        """Returns the addresses in the record of a rank, or of its group at a level."""
        num_ranks = len(self._tree.group(level, rank // self._tree.fanout**level)) if level else 1
        return decode_addresses(record.addresses, num_ranks)

    def _await(self, keys: list[str], use: Callable[[Sequence[Record]], None]) -> None:
        """Waits for authentic records that `use` accepts."""
        self._start.begin_wait()
        for look in count():
            if self._tree.is_flat or look % WAITS_PER_LOOK == 0:
                self._rewrite()
                self._check()
            if self._store.check(keys):
                records = [record for record in self._open(keys) if record is not None]
                if len(records) == len(keys):
                    try:
                        use(records)
                    except MessageError:
                        pass  # of an earlier attempt, or a leader has not seen this rank's record yet
                    else:
                        return
            self._start.wait(self._absent, self._store)

    def _rewrite(self) -> None:
        """Writes this rank's records again: other ranks may need them, or another process replaced them."""
        for key, sealed in self._published.items():
            self._store.set(key, sealed)

    def _publish(self, key: str, record: Record) -> None:
        self._published[key] = seal_object(self._key, key, encode(record))
        self._store.set(key, self._published[key])

    def _open(self, keys: Sequence[str]) -> list[Record | None]:
        """Reads records that exist, and returns those that are authentic and well-formed."""
        return [_decode(values) for values in open_records(self._store, self._key, keys)]

    def _absent(self) -> list[int]:
        """Returns the ranks that keep the root's record from appearing, found from the root downwards.

        These are the ranks without a record, or, if all have one, those without an authentic one.
        """
        missing: list[int] = []
        forged: list[int] = []
        groups = [(self._tree.num_levels, 0)]
        while groups and len(missing) < _MAX_NAMED:
            level, index = groups.pop()
            members = self._tree.group(level, index)
            states = self._states([self._member_key(level, member) for member in members])
            below = [(level - 1, member // self._tree.fanout ** (level - 1)) for member in members]
            incomplete = [group for group, state in zip(below, states, strict=True) if state != "authentic"]
            if level > 1:
                groups += incomplete
            else:
                missing += [rank for rank, state in zip(members, states, strict=True) if state == "absent"]
                forged += [rank for rank, state in zip(members, states, strict=True) if state == "forged"]
            if not incomplete and members.start != self._rank:
                missing.append(members.start)  # its leader has all records, and has not combined them
        self._start.note = " (the addresses in the store are not authentic)" if forged and not missing else ""
        return sorted(set(missing or forged)) or [0]

    def _states(self, keys: list[str]) -> list[str]:
        """Returns for each record whether it is `absent`, `forged` or `authentic`."""
        exists = [True] * len(keys) if self._store.check(keys) else [self._store.check([key]) for key in keys]
        present = [key for key, is_there in zip(keys, exists, strict=True) if is_there]
        opened = dict(zip(present, self._open(present), strict=True)) if present else {}
        return ["absent" if key not in opened else "forged" if opened[key] is None else "authentic" for key in keys]

    def _member_key(self, level: int, member: int) -> str:
        if level == 1:
            return f"watchdog/{self._name}/{member}"
        return self._group(level - 1, member // self._tree.fanout ** (level - 1))

    def _group(self, level: int, index: int) -> str:
        return f"watchdog/{self._name}/level_{level}/{index}"


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches the host."""
    return host == "::1" or host.startswith("127.")


def _decode(values: object) -> Record | None:
    try:
        return None if values is None else decode_fields(Record, values)
    except MessageError:
        return None
