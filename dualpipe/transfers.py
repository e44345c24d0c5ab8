"""What ranks send each other, read off a schedule: who makes a value, who needs it, in which order."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dualpipe.ir import Op, Operation, Schedule

ValueKind = Literal["activation", "gradient"]


class Value(NamedTuple):
    """What crosses from a stage to its neighbor: F's output, or the gradient of the stage's input.

    `stage` is the one that made it.
    """

    kind: ValueKind
    direction: int
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        primes = "'" * self.direction
        return f"{self.kind} {self.stage}.{self.micro_batch}{primes}"


class Link(NamedTuple):
    """A one-way queue between two ranks; its messages are received in the order in which they are sent."""

    source: int
    destination: int
    kind: ValueKind


class Message(NamedTuple):
    """One value on its way from rank `source` to rank `destination`. `stage` is the sending one."""

    kind: ValueKind
    direction: int
    stage: int
    micro_batch: int
    source: int
    destination: int

    @property
    def link(self) -> Link:
        """The queue that carries it."""
        return Link(self.source, self.destination, self.kind)

    @property
    def value(self) -> Value:
        """What it carries."""
        return Value(self.kind, self.direction, self.stage, self.micro_batch)

    def __str__(self) -> str:
        return f"{self.value} from rank {self.source} to rank {self.destination}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTransfers:
    """A rank's messages, by group: `receives[g]` before group g may run, `sends[g]` once it has run."""

    receives: tuple[tuple[Message, ...], ...]
    sends: tuple[tuple[Message, ...], ...]

    @property
    def all_receives(self) -> tuple[Message, ...]:
        """Every message that arrives, in program order."""
        return tuple(message for messages in self.receives for message in messages)

    @property
    def all_sends(self) -> tuple[Message, ...]:
        """Every message that leaves, in program order."""
        return tuple(message for messages in self.sends for message in messages)


def made_by(operation: Operation, num_stages: int) -> Value | None:
    """Returns what a neighbouring stage waits for from the operation, if any does. B and I make the gradient."""
    if operation.kind is Op.BACKWARD_WEIGHT:
        return None
    forward = operation.kind is Op.FORWARD
    if operation.stage == (num_stages - 1 if forward else 0):
        return None
    kind: ValueKind = "activation" if forward else "gradient"
    return Value(kind, operation.direction, operation.stage, operation.micro_batch)


def needed_by(operation: Operation, num_stages: int) -> Value | None:
    """Returns what the operation waits for from a neighbouring stage, if anything."""
    if operation.kind is Op.BACKWARD_WEIGHT:
        return None
    forward = operation.kind is Op.FORWARD
    if operation.stage == (0 if forward else num_stages - 1):
        return None
    if forward:
        return Value("activation", operation.direction, operation.stage - 1, operation.micro_batch)
    return Value("gradient", operation.direction, operation.stage + 1, operation.micro_batch)


def message_of(schedule: Schedule, value: Value) -> Message | None:
    """Returns the message that carries a value to the stage that needs it, or None where the same rank holds both."""
    neighbor = value.stage + 1 if value.kind == "activation" else value.stage - 1
    source = schedule.rank_of(value.direction, value.stage)
    destination = schedule.rank_of(value.direction, neighbor)
    if source == destination:
        return None
    return Message(value.kind, value.direction, value.stage, value.micro_batch, source, destination)


def transfers(schedule: Schedule) -> tuple[RankTransfers, ...]:
    """Returns each rank's messages. Within a group they follow the order of its members."""
    num_stages = schedule.num_stages
    return tuple(
        RankTransfers(
            receives=tuple(_messages(schedule, (needed_by(op, num_stages) for op in group)) for group in groups),
            sends=tuple(_messages(schedule, (made_by(op, num_stages) for op in group)) for group in groups),
        )
        for groups in schedule.ranks
    )


def _messages(schedule: Schedule, values: Iterable[Value | None]) -> tuple[Message, ...]:
    found = (message_of(schedule, value) for value in values if value is not None)
    return tuple(message for message in found if message is not None)
