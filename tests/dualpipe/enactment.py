"""A schedule run on numbers, as an oracle: it is correct if all ends and every number is that of one rank alone.

Nothing here is shared with the validator. Ranks are coroutines; what crosses between them is a bare number, which
its receiver takes for what it expects. A link holds one message; its sender stops before the next until the
receiver, who asks on coming to a group, has got the first. Stages are maps x -> a x^2 + b in a finite field, where
a wrong input, a wrong gradient or a wrong pairing of the two shows in the weight gradients.
"""

import random
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from dualpipe.ir import Group, Op, Operation, Schedule

PRIME = 2**61 - 1
Key = tuple[int, int, int]
"""Direction, stage, micro-batch."""


class WrongRunError(Exception):
    """What the run showed to be wrong."""


@dataclass(frozen=True, kw_only=True)
class Enactment:
    """`problem` is None for a correct schedule. `peaks[rank]`: activations kept at once, if it ended."""

    problem: str | None
    peaks: tuple[int, ...]


def enact(schedule: Schedule, *, forward_only: bool = False, seed: int = 0) -> Enactment:
    """Runs the schedule; `seed` decides which ranks run ahead."""
    world = _World(schedule, forward_only)
    try:
        world.run(random.Random(seed))
    except WrongRunError as wrong:
        return Enactment(problem=str(wrong), peaks=())
    return Enactment(problem=None, peaks=tuple(world.peaks))


@dataclass
class _Ticket:
    """The receiver's request; `number` is what came."""

    number: int | None = None


@dataclass
class _Slot:
    """A link: what the sender has put, and the requests that wait."""

    held: int | None = None
    tickets: deque[_Ticket] = field(default_factory=deque)

    def put(self, number: int) -> None:
        assert self.held is None
        self.held = number
        self.hand_over()

    def ask(self) -> _Ticket:
        ticket = _Ticket()
        self.tickets.append(ticket)
        self.hand_over()
        return ticket

    def hand_over(self) -> None:
        if self.held is not None and self.tickets:
            self.tickets.popleft().number, self.held = self.held, None


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
        if any(slot.held is not None or slot.tickets for slot in self.slots.values()):
            raise WrongRunError("a message is left over")
        self.compare()

    def rank(self, rank: int, groups: tuple[Group, ...]) -> Iterator[bool]:
        """Gives True for each step done, False while it waits."""
        own: dict[tuple[str, Key], int] = {}
        for group in groups:
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
                    while slot.held is not None:
                        yield False
                    slot.put(output)
                    yield True

    def holder(self, direction: int, stage: int) -> int:
        return self.schedule.placement[direction][stage]

    def input(self, rank: int, op: Operation, own: dict[tuple[str, Key], int]) -> int | _Ticket:
        """The number at hand, or a request for it."""
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
        return self.slots.setdefault((other, rank, name), _Slot()).ask()

    def outgoing(self, rank: int, op: Operation) -> _Slot | None:
        forward = op.kind is Op.FORWARD
        if op.kind is Op.BACKWARD_WEIGHT or op.stage == (self.last if forward else 0):
            return None
        other = self.holder(op.direction, op.stage + 1 if forward else op.stage - 1)
        name = "output" if forward else "gradient"
        return None if other == rank else self.slots.setdefault((rank, other, name), _Slot())

    def apply(
        self, op: Operation, number: int, before: dict[tuple[str, Key], int], own: dict[tuple[str, Key], int]
    ) -> int | None:
        """What leaves the stage. A member knows what the rank knew before the group, and nothing of other members."""
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
        """Every part of every micro-batch once, with the number that one rank alone finds."""
        expected: dict[tuple[str, Key], int] = {}
        total, directions = self.schedule.num_micro_batches, len(self.schedule.placement)
        for direction in range(directions):
            for micro_batch in range(len(range(direction, total, directions))):
                expected |= alone(direction, micro_batch, self.last + 1, self.forward_only)
        names = {"output": "F", "gradient": "I", "weight": "W"}
        if self.applied != Counter((names[name], key) for name, key in expected):
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
    """One micro-batch's numbers, computed in a row."""
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
