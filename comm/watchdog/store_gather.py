"""Gathers nonces and addresses of all ranks through an untrusted store, along the tree of ranks.

Each rank publishes its record. The leader of a block reads the records of its block and publishes one that combines
them, the leader of 64 blocks combines theirs, and so on up to rank 0. Then each rank reads the combined records of the
groups that it is in: one per level. The work of the store grows linearly with the number of ranks.

A record that is not authentic counts as absent. Each rank rewrites its own records until it has those that it needs,
and a leader until the ranks below it have theirs.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Annotated

from torch.distributed.distributed_c10d import Store

from comm.watchdog.addresses import AddressBook, decode_addresses, encode_addresses
from comm.watchdog.job_start import WAITS_PER_LOOK, JobStart, open_records
from comm.watchdog.messages import Addresses
from comm.watchdog.ranks import FANOUT
from comm.watchdog.wire import MessageError, SocketAddress, decode_fields, derive, encode_fields, seal_object

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
        text = json.dumps(encode_fields(self), sort_keys=True)
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
            addresses.append(next((each for each in members if not is_loopback(each[0])), members[0]))
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
        self._published[key] = seal_object(self._key, key, encode_fields(record))
        self._store.set(key, self._published[key])

    def _open(self, keys: Sequence[str]) -> list[Record | None]:
        """Reads records that exist, and returns those that are authentic and well-formed."""
        return [_decode(values) for values in open_records(self._store, self._key, keys)]

    def _absent(self) -> list[int]:
        """Returns the ranks that keep the root's record from appearing, found from the root downwards.

        These are the ranks without a record, or, if all have one, those whose record is not authentic.
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
