"""Generates DualPipeV as published: half of DualPipe with stages in a V (arXiv:2412.19437, 3.2.1).

The order is that of DeepSeek's published implementation (github.com/deepseek-ai/DualPipe).
"""

from collections import deque
from dataclasses import dataclass, field

from dualpipe.ir import Group, Op, Operation, Schedule, v_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec, SizeLimit
from dualpipe.simulate.costs import Costs, pair_time


def dualpipe_v(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns the published schedule: one direction, 2P stages, stages r and 2P-1-r on rank r. M >= 2P."""
    assert too_few_micro_batches(num_ranks, num_micro_batches) is None
    return Schedule(
        kind="dualpipe_v",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=v_placement(num_ranks),
        ranks=tuple(_rank_groups(rank, num_ranks, num_micro_batches) for rank in range(num_ranks)),
    )


def too_few_micro_batches(num_ranks: int, num_micro_batches: int) -> SizeLimit | None:
    """Returns a limit if there are fewer than two micro-batches per rank, else None."""
    least = 2 * num_ranks
    if num_micro_batches >= least:
        return None
    rule = f"on {num_ranks} ranks needs at least {least} micro-batches (2 per rank)"
    return SizeLimit(about="num_micro_batches", rule=rule, nearest=(least,))


@dataclass(slots=True)
class _OrderWriter:
    """Writer of one rank's groups. It counts the micro-batches of each stage (I counts as B)."""

    groups: list[Group] = field(default_factory=list)
    counts: dict[tuple[bool, int], int] = field(default_factory=dict)
    waiting: deque[Operation] = field(default_factory=deque)

    def take(self, kind: Op, stage: int) -> Operation:
        counted = (kind is Op.FORWARD, stage)
        micro_batch = self.counts.get(counted, 0)
        self.counts[counted] = micro_batch + 1
        return Operation(kind, 0, stage, micro_batch)

    def forward(self, stage: int) -> None:
        self.groups.append((self.take(Op.FORWARD, stage),))

    def backward(self, stage: int) -> None:
        self.groups.append((self.take(Op.BACKWARD, stage),))

    def backward_input(self, stage: int) -> None:
        operation = self.take(Op.BACKWARD_INPUT, stage)
        self.waiting.append(operation)
        self.groups.append((operation,))

    def backward_weight(self) -> None:
        oldest = self.waiting.popleft()
        self.groups.append((Operation(Op.BACKWARD_WEIGHT, 0, oldest.stage, oldest.micro_batch),))

    def overlapped(self, forward: int, backward: int) -> None:
        self.groups.append((self.take(Op.FORWARD, forward), self.take(Op.BACKWARD, backward)))


def _rank_groups(rank: int, num_ranks: int, num_micro_batches: int) -> tuple[Group, ...]:
    down, up = rank, 2 * num_ranks - 1 - rank
    to_turn = num_ranks - 1 - rank
    writer = _OrderWriter()

    # 1. Forwards of the lower stage, which fill the pipeline.
    for _ in range(2 * to_turn):
        writer.forward(down)
    # 2. Forwards of both stages.
    for _ in range(rank + 1):
        writer.forward(down)
        writer.forward(up)
    # 3. Split backwards and forwards of the upper stage.
    for _ in range(to_turn):
        writer.backward_input(up)
        writer.backward_weight()
        writer.forward(up)
    # 4. Steady state: overlapped pairs.
    for index in range(num_micro_batches - 2 * num_ranks + rank + 1):
        if index == 0 and to_turn == 0:
            # The rank at the turn does not wait here: without overlap the gradient is sent earlier.
            writer.forward(down)
            writer.backward(up)
        else:
            writer.overlapped(down, up)
        writer.overlapped(up, down)
    # 5. Backwards of the upper stage, then its last forwards, overlapped with backwards of the lower stage.
    for _ in range(to_turn):
        writer.backward(up)
        writer.overlapped(up, down)
    _drain(writer, rank, num_ranks)
    return tuple(writer.groups)


def _drain(writer: _OrderWriter, rank: int, num_ranks: int) -> None:
    """Writes the final backwards. The second half is split, with deferred W that fill the end."""
    down, up = rank, 2 * num_ranks - 1 - rank
    # 6. Backwards of both stages; from the middle on, their W are deferred.
    for index in range(2 * (rank + 1)):
        stage = down if index % 2 else up
        if index <= rank:
            writer.backward(stage)
        else:
            writer.backward_input(stage)
    # 7. Deferred W between the last I of the lower stage.
    for _ in range(num_ranks - 1 - rank):
        writer.backward_weight()
        writer.backward_input(down)
    # 8. The remaining W.
    for _ in range(rank + 1):
        writer.backward_weight()


def _published_idle(num_ranks: int, costs: Costs) -> float:
    backward = costs.backward_input + costs.backward_weight + costs.exchange
    return (num_ranks - 1) * (pair_time(costs) + backward - 3 * costs.backward_weight) / 2


SCHEDULES.register(
    "dualpipe_v",
    ScheduleSpec(
        name="dualpipe_v",
        summary="the published DualPipeV: DualPipe on half the ranks, stages in a V",
        generate=dualpipe_v,
        placement=v_placement,
        chunks=range(2, 3),
        limit=too_few_micro_batches,
        idle=IdleFormula(
            text="(P-1)(F&B+B-3W)/2", assumes="F = I >= W, no exchange and no latency", value=_published_idle
        ),
    ),
)
