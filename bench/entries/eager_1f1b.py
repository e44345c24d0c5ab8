"""1F1B with up to two more forwards first, so that gradients arrive before a rank needs them."""

from dataclasses import replace

from dualpipe.ir import Group, Op, Operation, Schedule
from dualpipe.registry import SCHEDULES

PLAIN = SCHEDULES.get("1f1b")


def eager_1f1b(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns 1F1B with at most P + 2 live activations."""

    def groups(rank: int) -> tuple[Group, ...]:
        later = num_ranks - 1 - rank
        ahead = min(later + min(later, 2), num_micro_batches)
        forwards: list[Group] = [(Operation(Op.FORWARD, 0, rank, index),) for index in range(num_micro_batches)]
        backwards: list[Group] = [(Operation(Op.BACKWARD, 0, rank, index),) for index in range(num_micro_batches)]
        pairs = zip(forwards[ahead:], backwards, strict=False)
        return (*forwards[:ahead], *(group for pair in pairs for group in pair), *backwards[len(forwards) - ahead :])

    plain = PLAIN.generate(num_ranks, num_micro_batches)
    return replace(plain, kind="eager_1f1b", ranks=tuple(groups(rank) for rank in range(num_ranks)))


SCHEDULES.register(
    "eager_1f1b",
    replace(
        PLAIN, name="eager_1f1b", summary="1F1B with two more forwards first", generate=eager_1f1b, takes_slices=False
    ),
)
