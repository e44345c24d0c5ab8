"""Derives the messages between ranks from a schedule."""

from itertools import pairwise
from typing import Literal, NamedTuple, assert_never

from dualpipe.ir import Op, Operation, Schedule

ValueKind = Literal["activation", "gradient", "tokens"]

_LOCAL = (Op.BACKWARD_WEIGHT, Op.OFFLOAD, Op.RELOAD)
"""Kinds of operations that neither need nor make a value of a neighboring stage."""


class Value(NamedTuple):
    """Value that `stage` makes for another one: F's output, its input's gradient, or chosen tokens."""

    kind: ValueKind
    direction: int
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        primes = "'" * self.direction
        return f"{self.kind} {self.stage}.{self.micro_batch}{primes}"


class Link(NamedTuple):
    """One-way FIFO queue between two ranks for one kind of value."""

    source: int
    destination: int
    kind: ValueKind


class Message(NamedTuple):
    """Value that rank `source` sends to rank `destination`. `stage` is the sending stage."""

    kind: ValueKind
    direction: int
    stage: int
    micro_batch: int
    source: int
    destination: int

    @property
    def link(self) -> Link:
        """Link that carries the message."""
        return Link(self.source, self.destination, self.kind)

    @property
    def value(self) -> Value:
        """Value that the message carries."""
        return Value(self.kind, self.direction, self.stage, self.micro_batch)

    def __str__(self) -> str:
        return f"{self.value} from rank {self.source} to rank {self.destination}"


def made_by(operation: Operation, num_stages: int) -> Value | None:
    """Returns the value that the operation makes for a neighboring stage, if any."""
    if operation.kind in _LOCAL:
        return None
    forward = operation.kind is Op.FORWARD
    if operation.stage == (num_stages - 1 if forward else 0):
        return None
    kind: ValueKind = "activation" if forward else "gradient"
    return Value(kind, operation.direction, operation.stage, operation.micro_batch)


def needed_by(operation: Operation, num_stages: int) -> Value | None:
    """Returns the value that the operation needs from a neighboring stage, if any."""
    if operation.kind in _LOCAL:
        return None
    forward = operation.kind is Op.FORWARD
    if operation.stage == (0 if forward else num_stages - 1):
        return None
    if forward:
        return Value("activation", operation.direction, operation.stage - 1, operation.micro_batch)
    return Value("gradient", operation.direction, operation.stage + 1, operation.micro_batch)


def value_made(schedule: Schedule, operation: Operation) -> Value | None:
    """Returns the value that the operation makes for another stage, if any, tokens included."""
    if schedule.cohorts is None or operation.stage != schedule.num_stages - 1:
        return made_by(operation, schedule.num_stages)
    is_read = operation.micro_batch + schedule.cohorts in schedule.micro_batches_of(operation.direction)
    return Value("tokens", operation.direction, operation.stage, operation.micro_batch) if is_read else None


def value_needed(schedule: Schedule, operation: Operation) -> Value | None:
    """Returns the value that the operation needs from another stage, if any, tokens included."""
    source = schedule.token_source(operation)
    if source is None:
        return needed_by(operation, schedule.num_stages)
    return Value("tokens", source.direction, source.stage, source.micro_batch)


def message_of(schedule: Schedule, value: Value) -> Message | None:
    """Returns the message that carries a value to its stage, or None if one rank holds both stages."""
    match value.kind:
        case "activation":
            user = value.stage + 1
        case "gradient":
            user = value.stage - 1
        case "tokens":
            user = 0
        case _ as other:
            assert_never(other)
    source = schedule.rank_of(value.direction, value.stage)
    destination = schedule.rank_of(value.direction, user)
    if source == destination:
        return None
    return Message(value.kind, value.direction, value.stage, value.micro_batch, source, destination)


def linked_pairs(schedule: Schedule) -> list[tuple[int, int]]:
    """Returns the pairs of ranks that exchange messages under a valid schedule, the lower one first."""
    ends = (
        both
        for direction, row in enumerate(schedule.placement)
        if schedule.micro_batches_of(direction)
        for both in (*pairwise(row), *([(row[-1], row[0])] if schedule.cohorts is not None else []))
    )
    return sorted({(min(both), max(both)) for both in ends if both[0] != both[1]})
