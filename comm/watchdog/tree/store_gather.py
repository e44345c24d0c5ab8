"""Gathers a record of every rank through an untrusted store, along the tree of ranks.

Each rank publishes its record. The leader of a block reads the records of its block and publishes one that combines
them, the leader of 64 blocks combines theirs, and so on up to rank 0. Then each rank reads the combined records of the
groups that it is in: one per level. So a rank reads 64 records for each level that it leads, and otherwise one for each
level. The work of the store grows linearly with the number of ranks.

A record that is not authentic counts as absent. Each rank rewrites its own records until it has those that it needs,
and a leader until the ranks below it have theirs.
"""

import time
from collections.abc import Callable, Sequence
from itertools import count
from typing import Any, Protocol, TypeVar

from torch.distributed.distributed_c10d import Store

from comm.watchdog.authentication import open_object, seal_object
from comm.watchdog.decode import MessageError
from comm.watchdog.job_start import WAITS_PER_LOOK, JobStart

Values = dict[str, Any]
Result = TypeVar("Result")

_MAX_NAMED = 1024
_MAX_RECORD_BYTES = 65_536
_READY_SECONDS = 5.0
_FIRST_PAUSE_SECONDS = 0.002
_LONGEST_PAUSE_SECONDS = 0.2


class Gathering(Protocol):
    """What ranks gather: each rank's record, and how a leader combines the records of a group."""

    @property
    def name(self) -> str:
        """First part of the records' keys."""
        ...

    @property
    def own(self) -> Values:
        """This rank's record."""
        ...

    def combine(self, level: int, index: int, records: Sequence[Values]) -> Values:
        """Returns the record of a group.

        Args:
            index: index of the group at its level.
            records: records of its members in order.

        Raises:
            MessageError: if a record has missing or invalid fields.
        """
        ...

    def accept(self, path: Sequence[Values]) -> None:
        """Takes the combined records of this rank's groups, from its block to the root.

        Raises:
            MessageError: if they are malformed, or do not contain this rank's record.
        """
        ...


class StoreGather:
    """Gather of one kind of record, as run by one rank."""

    def __init__(
        self,
        start: JobStart,
        store: Store,
        key: bytes,
        gathering: Gathering,
        check: Callable[[], None],
        published: dict[str, str],
    ) -> None:
        """Stores the arguments; `run` does the work.

        Args:
            start: start of the job, with its deadline.
            key: key that authenticates the records.
            check: called before each look into the store; ends the gather if it raises.
            published: records that this rank has published so far, which receives those of this gather.
        """
        self._start = start
        self._store = store
        self._tree = start.tree
        self._key = key
        self._gathering = gathering
        self._check = check
        self._rank = start.member.rank
        self._published = published

    def run(self) -> None:
        """Publishes this rank's records, and reads those of its groups as soon as they are there.

        Raises:
            AbsentError: if a record is absent at the deadline.
        """
        self.publish()
        self.lead()
        self.read_path()

    def publish(self) -> None:
        """Publishes this rank's record."""
        self._publish(self._leaf(self._rank), self._gathering.own)

    def lead(self) -> None:
        """Combines the records of the groups that this rank leads, from its block upwards."""
        for level in self._tree.led_levels(self._rank):
            index = self._rank // self._tree.fanout**level
            keys = [self._member_key(level, member) for member in self._tree.group(level, index)]
            combined = self._await(keys, lambda records: self._gathering.combine(level, index, records))  # noqa: B023
            self._publish(self._group(level, index), combined)

    def read_path(self) -> None:
        """Reads the combined records of this rank's groups. That of the root appears after all others."""
        path = self._tree.path(self._rank)
        self._await([self._group(level, index) for level, index in enumerate(path, 1)], self._gathering.accept)

    def confirm(self) -> None:
        """Announces that this rank has what it needs, after the ranks below it or some seconds.

        So a record that another process replaces at the end is written again. If an announcement itself is replaced,
        the leader only waits longer.
        """
        keys = [self._ready(rank) for rank in self._tree.children(self._rank)]
        until = time.monotonic() + len(self._tree.led_levels(self._rank)) * _READY_SECONDS
        pause = _FIRST_PAUSE_SECONDS
        while keys and time.monotonic() < until and not self._start.is_terminated:
            if self._store.check(keys):
                keys = [key for key, found in zip(keys, self._open(keys), strict=True) if found is None]
            if keys:
                time.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
                self._rewrite()
        self._publish(self._ready(self._rank), {})

    def blocks(self, indices: Sequence[int]) -> list[Values | None]:
        """Returns the combined records of any blocks, None for one that is not authentic."""
        return self._open([self._group(1, index) for index in indices])

    def _await(self, keys: list[str], use: Callable[[Sequence[Values]], Result]) -> Result:
        """Waits for authentic records that `use` accepts, and returns its result."""
        self._start.begin_wait()
        for look in count():
            if self._tree.is_flat or look % WAITS_PER_LOOK == 0:
                self._rewrite()
                self._check()
            if self._store.check(keys):
                records = self._open(keys)
                whole = [each for each in records if each is not None]
                if len(whole) == len(keys):
                    try:
                        return use(whole)
                    except MessageError:
                        pass  # of an earlier attempt, or a leader has not seen this rank's record yet
            self._start.wait(self._absent, self._store)
        raise AssertionError("unreachable: the wait ends with an error")

    def _rewrite(self) -> None:
        """Writes this rank's records again: other ranks may need them, or another process replaced them."""
        for key, sealed in self._published.items():
            self._store.set(key, sealed)

    def _publish(self, key: str, values: Values) -> None:
        self._published[key] = seal_object(self._key, key, values)
        self._store.set(key, self._published[key])

    def _open(self, keys: Sequence[str]) -> list[Values | None]:
        """Reads records that exist, and returns those that are authentic."""
        found: list[Values | None] = []
        for key, sealed in zip(keys, self._store.multi_get(list(keys)), strict=True):
            try:
                if len(sealed) > _MAX_RECORD_BYTES:
                    raise MessageError("too long")
                found.append(open_object(self._key, key, sealed))
            except MessageError:
                found.append(None)
        return found

    def _absent(self) -> list[int]:
        """Returns the ranks that keep the root's record from appearing.

        They are found from the root downwards, through groups without a record: the ranks without a record, or, if all
        have one, those whose record is not authentic.
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
        """Returns the key of the record of a group's member."""
        return self._leaf(member) if level == 1 else self._group(level - 1, member // self._tree.fanout ** (level - 1))

    def _ready(self, rank: int) -> str:
        return f"watchdog/ready/{rank}"

    def _leaf(self, rank: int) -> str:
        return f"watchdog/{self._gathering.name}/{rank}"

    def _group(self, level: int, index: int) -> str:
        return f"watchdog/{self._gathering.name}/level_{level}/{index}"
