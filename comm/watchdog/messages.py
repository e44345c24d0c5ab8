"""Defines the messages between watchdogs, in addition to states and verdicts, and decodes all of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self, get_args

from comm.exit_codes import EXIT_OTHER
from comm.watchdog.decode import MAX_NAME_CHARACTERS, MessageError, flag_of, integer_of, text_of
from comm.watchdog.inquiries.rank_state import RankState
from comm.watchdog.tree.rank_set import RankSet
from comm.watchdog.verdict import Verdict
from comm.watchdog.watchdog_socket import WatchdogMessage

End = Literal["done", "error", "signal"]


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Request for a rank's state, or for whether it has reached a collective.

    Attributes:
        group: group of the collective; None to request the whole state in any case.
        number: number of the collective within the group.
    """

    group: str | None = None
    number: int = 0

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is invalid.
        """
        if "group" not in values:
            return cls()
        return cls(text_of(values, "group", MAX_NAME_CHARACTERS), integer_of(values, "number"))

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return {} if self.group is None else asdict(self)

    def short_reply(self, state: RankState) -> "Reached | None":
        """Returns the short reply of a rank in this state, or None if it must reply its whole state."""
        if self.group is None or state.is_busy or state.started.get(self.group, 0) <= self.number:
            return None
        is_waiting = any((wait.group, wait.number) == (self.group, self.number) for wait in state.waits)
        return Reached(self.group, self.number, is_waiting)


@dataclass(frozen=True, slots=True)
class Reached:
    """Short reply of a rank that has started the collective of a request and does not compute.

    Attributes:
        group: group of the collective.
        number: number of the collective within the group.
        is_waiting: whether the rank still waits for the collective.
    """

    group: str
    number: int
    is_waiting: bool

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        group = text_of(values, "group", MAX_NAME_CHARACTERS)
        return cls(group, integer_of(values, "number"), flag_of(values, "is_waiting"))

    def as_json(self) -> dict[str, Any]:
        """Returns the fields as a dictionary."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Notice:
    """Announcement that the sender holds an inquiry, so that other ranks start none."""


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """Request for addresses; its fields are unchecked."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Addresses:
    """Reply to a request for addresses; its fields are unchecked."""

    values: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Departure:
    """Announcement that the sender leaves the job.

    Attributes:
        end: how it leaves: finished, with an error, or after a signal.
        text: the reason in one line.
    """

    end: End
    text: str

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Decodes the JSON of `as_json`.

        Raises:
            MessageError: if a field is missing or invalid.
        """
        end = text_of(values, "end")
        for known in get_args(End):
            if end == known:
                return cls(known, text_of(values, "text"))
        raise MessageError(f"end: must be one of {get_args(End)}, is {end}")

    def as_json(self) -> dict[str, str]:
        """Returns the fields as a dictionary."""
        return asdict(self)

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict with which all other ranks end if `rank` failed with an error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=RankSet.of((rank,)))


Message = StateRequest | RankState | Verdict | Departure | Reached | Notice | AddressRequest | Addresses


def decode_message(message: WatchdogMessage, world_size: int, origin: int | None = None) -> Message:
    """Decodes the fields of an authentic message.

    Args:
        world_size: number of ranks of the job.
        origin: rank that wrote the message if another rank forwarded it.

    Raises:
        MessageError: if a field is missing or invalid, or the author of a verdict is not its judge.
    """
    values = message.values
    match message.kind:
        case "state_request":
            return StateRequest.from_json(values)
        case "state":
            return RankState.from_json(values, world_size)
        case "departure":
            return Departure.from_json(values)
        case "reached":
            return Reached.from_json(values)
        case "notice":
            return Notice()
        case "address_request":
            return AddressRequest(values)
        case "addresses":
            return Addresses(values)
        case "verdict":
            verdict, author = Verdict.from_json(values, world_size), message.rank if origin is None else origin
            if verdict.judge != author:
                raise MessageError(f"judge: must be the sender, rank {author}, is {verdict.judge}")
            return verdict
