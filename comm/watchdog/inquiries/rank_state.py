"""Describes the state of a rank for other ranks, in messages that do not grow with the job."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from comm.watchdog.collective_log import Collective, CollectiveLog
from comm.watchdog.decode import (
    MAX_NAME_CHARACTERS,
    MessageError,
    flag_of,
    integer_of,
    list_of,
    object_of,
    printable,
    seconds_of,
    text_of,
)
from comm.watchdog.main_thread import MainThread
from comm.watchdog.tree.rank_set import RankSet

_MAX_WAITS = 8
_MAX_GROUPS = 64
_MAX_LINE_CHARACTERS = 256
_MAX_WAIT_CHARACTERS = 512


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """Collective that a rank waits for, or waited for when it failed."""

    text: str
    group: str
    number: int
    ranks: RankSet
    seconds: float

    @classmethod
    def of(cls, collective: Collective, seconds: float) -> Self:
        """Describes the collective for a message."""
        return cls(
            text=printable(str(collective), _MAX_WAIT_CHARACTERS),
            group=printable(collective.group, MAX_NAME_CHARACTERS),
            number=collective.number,
            ranks=collective.ranks,
            seconds=seconds,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        return cls(
            text=text_of(values, "text", _MAX_WAIT_CHARACTERS),
            group=text_of(values, "group", MAX_NAME_CHARACTERS),
            number=integer_of(values, "number"),
            ranks=RankSet.from_json(values, "ranks", world_size),
            seconds=seconds_of(values, "seconds"),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return {
            "text": self.text,
            "group": self.group,
            "number": self.number,
            "ranks": self.ranks.as_json(),
            "seconds": self.seconds,
        }

    def is_of(self, other: "Wait") -> bool:
        """Returns whether both waits are for the same collective."""
        return (self.group, self.number) == (other.group, other.number)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankState:
    """State of a rank, as it reports it to other watchdogs.

    Attributes:
        waits: collectives that it waits for, the longest wait first.
        started: number of collectives started in each group.
        is_busy: whether its main thread computes; else the thread waits.
        place: line of the program that its main thread executes.
        last: the collective that it started last.
        idle_seconds: time since that start.
    """

    waits: tuple[Wait, ...]
    started: Mapping[str, int]
    is_busy: bool
    place: str
    last: str
    idle_seconds: float

    @classmethod
    def of(cls, log: CollectiveLog, thread: MainThread) -> Self:
        """Builds the state from a rank's log and its main thread."""
        now = time.time()
        waits = [Wait.of(*wait) for wait in (*thread.waits(log), *log.failed())]
        waits = sorted(waits, key=lambda wait: -wait.seconds)[:_MAX_WAITS]
        recent = log.recent()
        started = {printable(name, MAX_NAME_CHARACTERS): each.started for name, each in log.progress().items()}
        # Groups that this rank waits for come first if there are too many, then those started last.
        names = [*(wait.group for wait in waits if wait.group in started), *reversed(started)]
        return cls(
            waits=tuple(waits),
            started={name: started[name] for name in list(dict.fromkeys(names))[:_MAX_GROUPS]},
            is_busy=thread.is_busy(log),
            place=printable(thread.place, _MAX_LINE_CHARACTERS),
            last=printable(str(recent[-1][1]), _MAX_WAIT_CHARACTERS) if recent else "nothing",
            # The wall clock can go backwards.
            idle_seconds=max(0.0, now - recent[-1][0]) if recent else 0.0,
        )

    @classmethod
    def from_json(cls, values: dict[str, Any], world_size: int) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        started = object_of(values.get("started"), "started")
        if len(started) > _MAX_GROUPS:
            raise MessageError(f"started: more than {_MAX_GROUPS} groups")
        waits = [object_of(wait, "waits") for wait in list_of(values, "waits", _MAX_WAITS)]
        return cls(
            waits=tuple(Wait.from_json(wait, world_size) for wait in waits),
            started={group: integer_of(started, group) for group in started},
            is_busy=flag_of(values, "is_busy"),
            place=text_of(values, "place", _MAX_LINE_CHARACTERS),
            last=text_of(values, "last", _MAX_WAIT_CHARACTERS),
            idle_seconds=seconds_of(values, "idle_seconds"),
        )

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return {
            "waits": [wait.as_json() for wait in self.waits],
            "started": dict(self.started),
            "is_busy": self.is_busy,
            "place": self.place,
            "last": self.last,
            "idle_seconds": self.idle_seconds,
        }

    def has_reached(self, wait: Wait) -> bool:
        """Returns whether the rank has started the collective."""
        return self.started.get(wait.group, 0) > wait.number

    @classmethod
    def of_reached(cls, wait: Wait, *, is_waiting: bool) -> Self:
        """Returns what a short reply says: the rank has started the collective, and does not compute."""
        return cls(
            waits=(wait,) if is_waiting else (),
            started={wait.group: wait.number + 1},
            is_busy=False,
            place="",
            last="",
            idle_seconds=0.0,
        )
