"""Defines schedules as frozen data, their public JSON form, and the messages that they imply.

Uses only the standard library.
"""

import json
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from typing import Any, Literal, NamedTuple, assert_never


class ScheduleError(ValueError):
    """Raised if a schedule cannot be made, read or run. The message names place, rule and value."""


class MemoryCapError(ScheduleError):
    """Raised if a schedule does not fit a memory cap. `least` is the smallest cap that it fits."""

    def __init__(self, message: str, least: float) -> None:
        super().__init__(f"memory_cap: {message}")
        self.least = least


class Op(StrEnum):
    """Kind of an operation. A full backward is the backward for inputs followed by the one for weights.

    An offload waits until the activation of a micro-batch is in host memory, and frees it on the device. The copy
    starts when the forward has ended. A reload allocates the activation again and starts the copy back.
    """

    FORWARD = "F"
    BACKWARD = "B"
    BACKWARD_INPUT = "I"
    BACKWARD_WEIGHT = "W"
    OFFLOAD = "O"
    RELOAD = "R"

    @property
    def is_copy(self) -> bool:
        """Whether it copies an activation between device and host, and computes nothing."""
        return self in (Op.OFFLOAD, Op.RELOAD)


class Operation(NamedTuple):
    """One operation of one micro-batch (counted in its direction), a tuple as there are up to millions."""

    kind: Op
    direction: int
    stage: int
    micro_batch: int

    def with_kind(self, kind: Op) -> "Operation":
        """Returns the operation of another kind of the same micro-batch and stage."""
        return Operation(kind, self.direction, self.stage, self.micro_batch)

    def __str__(self) -> str:
        """Returns kind, stage and micro-batch, as in `F0.3`; direction 1 has a prime, `F0.3'`."""
        primes = "'" * self.direction
        return f"{self.kind.value}{self.stage}.{self.micro_batch}{primes}"


MOST_LINK_DEPTH = 4
"""Maximum number of messages that a link may hold."""

Group = tuple[Operation, ...]
"""Operations that a rank runs at the same time, overlapped."""

Placement = tuple[tuple[int, ...], ...]
"""For each direction, the rank that holds each stage."""


def straight_placement(num_ranks: int, chunks: int = 1) -> Placement:
    """Returns one direction with stage s on rank s mod P, so a rank holds `chunks` stages."""
    return (tuple(range(num_ranks)) * chunks,)


def v_placement(num_ranks: int, chunks: int = 2) -> Placement:
    """Returns one direction with two stages per rank, r and 2P-1-r: the stages form a V."""
    assert chunks == 2, f"a V has 2 stages per rank, not {chunks}"
    return ((*range(num_ranks), *reversed(range(num_ranks))),)


def mirrored_placement(num_ranks: int, chunks: int = 1) -> Placement:
    """Returns two directions: stage s on rank s mod P, and for direction 1 on the mirror rank of that."""
    forwards = tuple(range(num_ranks)) * chunks
    return (forwards, forwards[::-1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Ordered groups of operations of each pipeline rank.

    Attributes:
        num_micro_batches: number of micro-batches, of both directions together.
        placement: `placement[direction][stage]` is the rank that holds the stage for that direction.
        ranks: `ranks[rank]` holds the rank's groups in order.
        cohorts: None in a schedule that trains. In one that decodes, the number of cohorts of each direction:
            micro-batch m is round m // cohorts of cohort m % cohorts, and its first stage needs the tokens that the
            last stage chose in the cohort's previous round.
        slices: number of consecutive micro-batches that hold the same sequences, cut along the tokens: micro-batch m
            is slice m % slices. In every stage, F of a slice follows F of the slice before it, and its backward
            follows the backward of the slice after it, because later tokens attend to earlier ones.
        link_depth: number of messages that a link holds: a rank posts as many receives before it needs the first.
    """

    kind: str
    num_ranks: int
    num_micro_batches: int
    placement: Placement
    ranks: tuple[tuple[Group, ...], ...]
    cohorts: int | None = None
    slices: int = 1
    link_depth: int = 1

    def __repr__(self) -> str:
        ways = "both directions" if self.num_directions > 1 else "one direction"
        sizes = f"{self.num_ranks} ranks, {self.num_micro_batches} micro-batches, {self.num_stages} stages"
        return f"Schedule({self.kind}, {sizes}, {ways})"

    @property
    def num_stages(self) -> int:
        """Number of stages."""
        return len(self.placement[0])

    @property
    def num_directions(self) -> int:
        """Number of directions: 2 if micro-batches enter at both ends, else 1."""
        return len(self.placement)

    def rank_of(self, direction: int, stage: int) -> int:
        """Returns the rank that runs `stage` for the micro-batches of `direction`."""
        return self.placement[direction][stage]

    def token_source(self, op: Operation) -> Operation | None:
        """Returns the operation that chooses the tokens that an operation reads from the schedule, or None."""
        if self.cohorts is None or op.stage or op.kind is not Op.FORWARD or op.micro_batch < self.cohorts:
            return None
        return op._replace(stage=self.num_stages - 1, micro_batch=op.micro_batch - self.cohorts)

    @property
    def has_offload(self) -> bool:
        """Whether any activation is offloaded to host memory."""
        return any(op.kind is Op.OFFLOAD for groups in self.ranks for group in groups for op in group)

    def stages_of(self, rank: int) -> tuple[tuple[int, int], ...]:
        """Returns the rank's (direction, stage) pairs, in that order."""
        return tuple(
            (direction, stage)
            for direction, row in enumerate(self.placement)
            for stage, holder in enumerate(row)
            if holder == rank
        )

    def micro_batches_of(self, direction: int) -> range:
        """Returns the direction's micro-batches. If their total is odd, direction 0 has one more."""
        share, rest = divmod(self.num_micro_batches // self.slices, self.num_directions)
        return range((share + (direction < rest)) * self.slices)

    def mirrored_slice(self, micro_batch: int) -> int:
        """Returns the slice of the same sequence that is as far from its end as this one is from its start."""
        return micro_batch - 2 * (micro_batch % self.slices) + self.slices - 1


_COUNTS = ("slices", "link_depth")
"""Keys of the JSON form that are left out if they are 1."""


def to_json(schedule: Schedule) -> str:
    """Returns the schedule's public JSON form in one line. Equal schedules give equal text."""
    record: dict[str, Any] = {
        "kind": schedule.kind,
        "num_ranks": schedule.num_ranks,
        "num_micro_batches": schedule.num_micro_batches,
        "num_stages": schedule.num_stages,
        "placement": schedule.placement,
        "ranks": schedule.ranks,
    }
    if schedule.cohorts is not None:
        record["cohorts"] = schedule.cohorts
    record |= {key: value for key in _COUNTS if (value := getattr(schedule, key)) != 1}
    return json.dumps(record)


def from_json(text: str) -> Schedule:
    """Decodes the JSON of `to_json`. The result is well formed; `validate` checks that it is valid.

    Raises:
        ScheduleError: if the text does not have that form. The message names the place, as in `ranks[2][5][0]`.
    """
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also for numbers of thousands of digits
        raise ScheduleError(f"schedule: not JSON: {error}") from error
    record = _read_object(record)
    placement = tuple(
        tuple(_integer(rank, f"placement[{direction}][{stage}]") for stage, rank in enumerate(row))
        for direction, row in enumerate(_rows(record["placement"], "placement"))
    )
    ranks = tuple(
        tuple([_read_group(group, rank, index) for index, group in enumerate(groups)])
        for rank, groups in enumerate(_rows(record["ranks"], "ranks"))
    )
    schedule = Schedule(
        kind=record["kind"],
        num_ranks=_integer(record["num_ranks"], "num_ranks"),
        num_micro_batches=_integer(record["num_micro_batches"], "num_micro_batches"),
        placement=placement,
        ranks=ranks,
        cohorts=_integer(record["cohorts"], "cohorts") if "cohorts" in record else None,
        **{key: _integer(record.get(key, 1), key) for key in _COUNTS},
    )
    _check_sizes(schedule, _integer(record["num_stages"], "num_stages"))
    return schedule


def _read_object(record: Any) -> dict[str, Any]:
    keys = {"kind", "num_ranks", "num_micro_batches", "num_stages", "placement", "ranks"}
    if not isinstance(record, dict):
        raise ScheduleError(f"schedule: must be an object, is {_format_value(record)}")
    if wrong := keys.symmetric_difference(record) - {"cohorts", *_COUNTS}:
        verb = "is missing" if wrong <= keys else "is unknown"
        name = min(wrong & keys if wrong <= keys else wrong - keys)
        raise ScheduleError(f"schedule: the key {name!r} {verb}; nearest valid: {', '.join(sorted(keys))}")
    if not isinstance(record["kind"], str):
        raise ScheduleError(f"kind: must be a string, is {_format_value(record['kind'])}")
    return record


def _rows(value: Any, path: str) -> list[list[Any]]:
    for index, row in enumerate(_list(value, path)):
        _list(row, f"{path}[{index}]")
    return list(value)


def _list(value: Any, path: str) -> list[Any]:
    if not isinstance(value, list):
        raise ScheduleError(f"{path}: must be a list, is {_format_value(value)}")
    return value


def _integer(value: Any, path: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ScheduleError(f"{path}: must be an integer of at least 0, is {_format_value(value)}")
    return value


def _read_group(value: Any, rank: int, index: int) -> Group:
    # The names of places are made only for errors, because a large schedule has hundreds of thousands of operations.
    if not isinstance(value, list):
        raise ScheduleError(f"ranks[{rank}][{index}]: must be a list, is {_format_value(value)}")
    return tuple([_read_operation(fields, rank, index, member) for member, fields in enumerate(value)])


_OPS = {op.value: op for op in Op}


def _read_operation(value: Any, *path: int) -> Operation:
    if type(value) is list and len(value) == 4:
        letter, direction, stage, micro_batch = value
        kind = _OPS.get(letter) if type(letter) is str else None
        are_integers = type(direction) is int and type(stage) is int and type(micro_batch) is int
        if kind is not None and are_integers and direction >= 0 and stage >= 0 and micro_batch >= 0:
            return Operation(kind, direction, stage, micro_batch)
    raise ScheduleError(_problem_of(value, "ranks" + "".join(f"[{number}]" for number in path)))


def _problem_of(value: Any, path: str) -> str:
    if not isinstance(value, list):
        return f"{path}: must be a list, is {_format_value(value)}"
    if len(value) != 4:
        return f"{path}: must be [kind, direction, stage, micro_batch], is {_format_value(value)}"
    if not isinstance(value[0], str) or value[0] not in _OPS:
        return f"{path}: the kind must be one of {' '.join(_OPS)}, is {_format_value(value[0])}"
    wrong = next(field for field in value[1:] if type(field) is not int or field < 0)
    return f"{path}: must be an integer of at least 0, is {_format_value(wrong)}"


def _check_sizes(schedule: Schedule, num_stages: int) -> None:
    if not schedule.placement:
        raise ScheduleError("placement: must have a row for each direction, has none")
    for direction, row in enumerate(schedule.placement):
        if len(row) != num_stages:
            raise ScheduleError(f"placement[{direction}]: must have num_stages = {num_stages} entries, has {len(row)}")
    if len(schedule.ranks) != schedule.num_ranks:
        raise ScheduleError(f"ranks: must have num_ranks = {schedule.num_ranks} entries, has {len(schedule.ranks)}")
    for key in _COUNTS:
        if not getattr(schedule, key):
            raise ScheduleError(f"{key}: must be at least 1, is 0; nearest valid: 1")


def _format_value(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


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
