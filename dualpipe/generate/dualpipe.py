"""The published DualPipe: micro-batches enter at both ends and meet (arXiv:2412.19437, section 3.2.1).

The order is that of DeepSeek's published implementation (github.com/deepseek-ai/DualPipe).
"""

from collections import deque
from dataclasses import dataclass, field

from dualpipe.ir import Group, Op, Operation, Schedule


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """The published schedule. Both numbers even, num_micro_batches >= 2 * num_ranks: see `select.check`.

    Direction 0 enters at rank 0, direction 1 at the last rank; ranks r and P-1-r both hold stages r and P-1-r.
    """
    forwards = tuple(range(num_ranks))
    return Schedule(
        kind="dualpipe",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=(forwards, forwards[::-1]),
        ranks=tuple(_rank_groups(rank, num_ranks, num_micro_batches // 2) for rank in range(num_ranks)),
    )


@dataclass(slots=True)
class _Writer:
    """One rank's list as it grows. A flow is a direction as the rank sees it: `near` enters at its own end."""

    rank: int
    num_ranks: int
    groups: list[Group] = field(default_factory=list)
    counts: dict[tuple[Op, int], int] = field(default_factory=dict)
    waiting: deque[Operation] = field(default_factory=deque)

    def take(self, kind: Op, direction: int) -> Operation:
        """The direction's next micro-batch for F, or for a backward of either sort (I counts as B)."""
        counted = Op.FORWARD if kind is Op.FORWARD else Op.BACKWARD
        micro_batch = self.counts.get((counted, direction), 0)
        self.counts[counted, direction] = micro_batch + 1
        stage = self.rank if direction == 0 else self.num_ranks - 1 - self.rank
        return Operation(kind, direction, stage, micro_batch)

    def forward(self, direction: int) -> None:
        self.groups.append((self.take(Op.FORWARD, direction),))

    def backward(self, direction: int) -> None:
        self.groups.append((self.take(Op.BACKWARD, direction),))

    def backward_input(self, direction: int) -> None:
        operation = self.take(Op.BACKWARD_INPUT, direction)
        self.waiting.append(operation)
        self.groups.append((operation,))

    def backward_weight(self) -> None:
        oldest = self.waiting.popleft()
        self.groups.append(
            (Operation(Op.BACKWARD_WEIGHT, oldest.direction, oldest.stage, oldest.micro_batch),),
        )

    def overlapped(self, forward_direction: int, backward_direction: int) -> None:
        self.groups.append((self.take(Op.FORWARD, forward_direction), self.take(Op.BACKWARD, backward_direction)))


def _rank_groups(rank: int, num_ranks: int, num_per_direction: int) -> tuple[Group, ...]:
    from_end = min(rank, num_ranks - 1 - rank)
    to_middle = num_ranks // 2 - 1 - from_end
    near = 0 if rank < num_ranks // 2 else 1
    far = 1 - near
    writer = _Writer(rank=rank, num_ranks=num_ranks)

    for _ in range(2 * to_middle):
        writer.forward(near)
    for _ in range(from_end + 1):
        writer.forward(near)
        writer.forward(far)
    for _ in range(to_middle):
        writer.backward_input(far)
        writer.backward_weight()
        writer.forward(far)
    for index in range(num_per_direction - num_ranks + from_end + 1):
        if index == 0 and to_middle == 0:
            # The two middle ranks wait for each other here: apart, the gradient leaves earlier.
            writer.forward(near)
            writer.backward(far)
        else:
            writer.overlapped(near, far)
        writer.overlapped(far, near)
    for _ in range(to_middle):
        writer.backward(far)
        writer.overlapped(far, near)
    _drain(writer, near, from_end, to_middle)
    return tuple(writer.groups)


def _drain(writer: _Writer, near: int, from_end: int, to_middle: int) -> None:
    """Backwards alone; from the middle on their weight halves are put off to fill the end."""
    num_full = from_end + 1
    for index in range(2 * (from_end + 1)):
        direction = near if index % 2 else 1 - near
        if index < num_full:
            writer.backward(direction)
        else:
            writer.backward_input(direction)
    for _ in range(to_middle):
        writer.backward_weight()
        writer.backward_input(near)
    for _ in range(from_end + 1):
        writer.backward_weight()
