"""Runs a schedule on numbers as an oracle: correct if all ranks end with the numbers of one rank.

It shares no code with the validator. Ranks are coroutines that exchange bare numbers, and a receiver treats a number as
the message that it expects. A link holds `Schedule.link_depth` messages: the sender blocks before one more until the
receiver, which posts its receives before a group, has the first. Stages are maps x -> a x^2 + b in a finite field,
where a wrong input, a wrong gradient or a wrong pairing of the two changes the weight gradients. A rank's inputs that
are in host memory are not at hand until they are back.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualpipe.ir import Group, Op, Operation, Schedule

PRIME = 2**61 - 1
Key = tuple[int, int, int]
"""Direction, stage and micro-batch."""


class WrongRunError(Exception):
    """Raised if the run shows an error of the schedule."""


@dataclass(frozen=True, kw_only=True)
class Enactment:
    """Result of a run.

    `problem` is None for a correct schedule; `peaks[rank]` is the peak of live activations.
    """

    problem: str | None
    peaks: tuple[int, ...]


def enact(schedule: Schedule, *, forward_only: bool = False, seed: int = 0) -> Enactment:
    """Runs the schedule; `seed` decides the relative speed of ranks."""
    world = _World(schedule, forward_only)
    try:
        world.run(random.Random(seed))
    except WrongRunError as wrong:
        return Enactment(problem=str(wrong), peaks=())
    return Enactment(problem=None, peaks=tuple(world.peaks))


@dataclass
class _Ticket:
    """Posted receive; `number` is the received number."""

    number: int | None = None


@dataclass
class _Slot:
    """Link with the sent numbers, at most `room` of them, and the posted receives."""

    room: int
    held: deque[int] = field(default_factory=deque)
    tickets: deque[_Ticket] = field(default_factory=deque)

    def put(self, number: int) -> None:
        assert len(self.held) < self.room
        self.held.append(number)
        self.hand_over()

    def ask(self) -> _Ticket:
        ticket = _Ticket()
        self.tickets.append(ticket)
        self.hand_over()
        return ticket

    def hand_over(self) -> None:
        if self.held and self.tickets:
            self.tickets.popleft().number = self.held.popleft()


class _World:
    def __init__(self, schedule: Schedule, forward_only: bool) -> None:
        self.schedule = schedule
        self.forward_only = forward_only
        self.last = len(schedule.placement[0]) - 1
        self.slots: dict[tuple[int, int, str], _Slot] = {}
        self.results: dict[tuple[str, Key], int] = {}
        self.applied: Counter[tuple[str, Key]] = Counter()
        self.peaks = [0] * len(schedule.ranks)

    def run(self, draws: random.Random) -> None:
        alive = {rank: self.rank(rank, groups) for rank, groups in enumerate(self.schedule.ranks)}
        waiting = 0
        while alive and waiting <= 2 * len(self.schedule.ranks):
            order = list(alive)
            draws.shuffle(order)
            waiting += 1
            for rank in order:
                for _ in range(draws.randint(1, 4)):
                    moved = next(alive[rank], None)
                    if moved is None:
                        del alive[rank]
                    if moved is not False:
                        waiting = 0
                    if not moved:
                        break
        if alive:
            raise WrongRunError(f"ranks {sorted(alive)} wait for ever")
        if any(slot.held or slot.tickets for slot in self.slots.values()):
            raise WrongRunError("a message is left over")
        self.compare()

    def rank(self, rank: int, groups: tuple[Group, ...]) -> Iterator[bool]:
        """Yields True for each completed step and False while the rank waits."""
        own: dict[tuple[str, Key], int] = {}
        host: dict[Key, int] = {}
        for group in groups:
            if any(op.kind.value in "OR" for op in group):
                self.move(rank, group, own, host)
                yield True
                continue
            inputs: list[int | _Ticket] = [self.input(rank, op, own) for op in group]
            numbers = []
            for entry in inputs:
                if isinstance(entry, int):
                    numbers.append(entry)
                    continue
                while entry.number is None:
                    yield False
                numbers.append(entry.number)
            yield True
            before = dict(own)
            outputs = [self.apply(op, number, before, own) for op, number in zip(group, numbers, strict=True)]
            saved = {key for name, key in (*before, *own) if name == "input"}
            self.peaks[rank] = max(self.peaks[rank], len(saved))
            if self.forward_only:
                own = {(name, key): number for (name, key), number in own.items() if name == "output"}
            for op, output in zip(group, outputs, strict=True):
                slot = self.outgoing(rank, op)
                if slot is not None and output is not None:
                    while len(slot.held) == slot.room:
                        yield False
                    slot.put(output)
                    yield True

    def move(self, rank: int, group: Group, own: dict[tuple[str, Key], int], host: dict[Key, int]) -> None:
        """Moves an input between the rank's two memories."""
        if len(group) > 1:
            raise WrongRunError(f"{group} does not only move an input")
        op = group[0]
        key = (op.direction, op.stage, op.micro_batch)
        self.applied[op.kind.value, key] += 1
        if self.applied["I", key]:
            raise WrongRunError(f"{op} is after the backward for inputs")
        if op.kind is Op.OFFLOAD:
            host[key] = _known(own, "input", key, op)
            del own["input", key]
            return
        if key not in host:
            raise WrongRunError(f"{op} finds no input in host memory")
        own["input", key] = host.pop(key)
        self.peaks[rank] = max(self.peaks[rank], sum(name == "input" for name, _ in own))

    def holder(self, direction: int, stage: int) -> int:
        return self.schedule.placement[direction][stage]

    def input(self, rank: int, op: Operation, own: dict[tuple[str, Key], int]) -> int | _Ticket:
        """Returns the available number, or posts a receive for it."""
        if self.holder(op.direction, op.stage) != rank:
            raise WrongRunError(f"rank {rank} has no weights for {op}")
        key = (op.direction, op.stage, op.micro_batch)
        if op.kind is Op.BACKWARD_WEIGHT:
            return 0
        forward = op.kind is Op.FORWARD
        if op.stage == (0 if forward else self.last):
            return first_input(key) if forward else loss_gradient(key, _known(own, "output", key, op))
        beyond = op.stage - 1 if forward else op.stage + 1
        other = self.holder(op.direction, beyond)
        name = "output" if forward else "gradient"
        if other == rank:
            return _known(own, name, (op.direction, beyond, op.micro_batch), op)
        return self.slots.setdefault((other, rank, name), _Slot(self.schedule.link_depth)).ask()

    def outgoing(self, rank: int, op: Operation) -> _Slot | None:
        forward = op.kind is Op.FORWARD
        if op.kind is Op.BACKWARD_WEIGHT or op.stage == (self.last if forward else 0):
            return None
        other = self.holder(op.direction, op.stage + 1 if forward else op.stage - 1)
        name = "output" if forward else "gradient"
        return None if other == rank else self.slots.setdefault((rank, other, name), _Slot(self.schedule.link_depth))

    def apply(
        self, op: Operation, number: int, before: dict[tuple[str, Key], int], own: dict[tuple[str, Key], int]
    ) -> int | None:
        """Returns the output of an operation. It may only use values from before its group."""
        key = (op.direction, op.stage, op.micro_batch)
        output = None
        gradient = number
        if op.kind is Op.FORWARD:
            output = stage_output(op.stage, number)
            own["input", key] = number
            own["output", key] = output
            self.results["output", key] = output
            self.applied["F", key] += 1
        if op.kind in (Op.BACKWARD, Op.BACKWARD_INPUT):
            output = input_gradient(op.stage, _known(before, "input", key, op), number)
            own["gradient", key] = output
            own["held", key] = number
            self.results["gradient", key] = output
            self.applied["I", key] += 1
        if op.kind is Op.BACKWARD_WEIGHT:
            gradient = _known(before, "held", key, op)
        if op.kind in (Op.BACKWARD, Op.BACKWARD_WEIGHT):
            self.results["weight", key] = weight_gradient(_known(before, "input", key, op), gradient)
            self.applied["W", key] += 1
            for name in ("input", "held"):
                own.pop((name, key), None)
        return output

    def compare(self) -> None:
        """Checks that every operation ran once and that all numbers equal those of one rank."""
        expected: dict[tuple[str, Key], int] = {}
        total, directions = self.schedule.num_micro_batches, len(self.schedule.placement)
        for direction in range(directions):
            for micro_batch in range(len(range(direction, total, directions))):
                expected |= alone(direction, micro_batch, self.last + 1, self.forward_only)
        names = {"output": "F", "gradient": "I", "weight": "W"}
        copied = {key for name, key in self.applied if name in "OR"}
        operations = [(names[name], key) for name, key in expected] + [(name, key) for key in copied for name in "OR"]
        if self.applied != Counter(operations):
            raise WrongRunError("not everything is applied once")
        if self.results != expected:
            raise WrongRunError("a number differs from that of one rank alone")


def _known(numbers: dict[tuple[str, Key], int], name: str, key: Key, op: Operation) -> int:
    if (name, key) not in numbers:
        raise WrongRunError(f"{op} finds no {name} of {key}")
    return numbers[name, key]


def first_input(key: Key) -> int:
    return 1000003 * (key[0] + 1) + 7919 * (key[2] + 1)


def stage_output(stage: int, x: int) -> int:
    return ((stage + 2) * x * x + stage + 11) % PRIME


def loss_gradient(key: Key, output: int) -> int:
    return (output + 104729 * (key[0] + 1) + key[2]) % PRIME


def input_gradient(stage: int, x: int, gradient: int) -> int:
    return 2 * (stage + 2) * x * gradient % PRIME


def weight_gradient(x: int, gradient: int) -> int:
    return x * x * gradient % PRIME


def alone(direction: int, micro_batch: int, num_stages: int, forward_only: bool) -> dict[tuple[str, Key], int]:
    """Computes the numbers of one micro-batch on one rank."""
    found: dict[tuple[str, Key], int] = {}
    x = first_input((direction, 0, micro_batch))
    inputs = []
    for stage in range(num_stages):
        inputs.append(x)
        x = stage_output(stage, x)
        found["output", (direction, stage, micro_batch)] = x
    if forward_only:
        return found
    gradient = loss_gradient((direction, num_stages - 1, micro_batch), x)
    for stage in reversed(range(num_stages)):
        key = (direction, stage, micro_batch)
        found["weight", key] = weight_gradient(inputs[stage], gradient)
        gradient = input_gradient(stage, inputs[stage], gradient)
        found["gradient", key] = gradient
    return found
