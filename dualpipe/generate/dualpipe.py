"""Generates the published DualPipe (arXiv:2412.19437, 3.2.1), and DualPipeV, of which it is unfolded.

The order of DualPipeV is that of DeepSeek's implementation (github.com/deepseek-ai/DualPipe).
"""

from collections import deque
from dataclasses import dataclass, field, replace

from dualpipe.costs import Costs, pair_time
from dualpipe.ir import Group, Op, Operation, Schedule, ScheduleError, mirrored_placement, v_placement
from dualpipe.registry import SCHEDULES, IdleFormula, ScheduleSpec, SizeLimit


def dualpipe(num_ranks: int, num_micro_batches: int) -> Schedule:
    """Returns the published schedule. Both numbers must be even, and num_micro_batches >= 2 * num_ranks.

    Direction 0 enters at rank 0, direction 1 at the last rank. Ranks r and P-1-r both hold stages r and P-1-r. Each
    half of the ranks runs DualPipeV and exchanges with its mirror image at the turn of the V.
    """
    assert _limit(num_ranks, num_micro_batches) is None
    return replace(mirror(dualpipe_v(num_ranks // 2, num_micro_batches // 2)), kind="dualpipe")


def published_idle(num_ranks: int, costs: Costs) -> float:
    """Returns the idle time of every rank, (P/2 - 1)(F&B + B - 3W) (arXiv:2412.19437, table 2)."""
    backward = costs.backward_input + costs.backward_weight + costs.exchange
    return (num_ranks / 2 - 1) * (pair_time(costs) + backward - 3 * costs.backward_weight)


def _limit(num_ranks: int, num_micro_batches: int) -> SizeLimit | None:
    if num_ranks % 2:
        nearest = tuple(number for number in (num_ranks - 1, num_ranks + 1) if number > 0)
        return SizeLimit(about="num_ranks", rule="needs an even number of pipeline ranks", nearest=nearest)
    too_few = too_few_micro_batches(num_ranks, num_micro_batches)
    if too_few is None and num_micro_batches % 2:
        rule = "needs an even number of micro-batches, half for each direction"
        nearest = (num_micro_batches - 1, num_micro_batches + 1)
        return SizeLimit(about="num_micro_batches", rule=rule, nearest=nearest)
    return too_few


def mirror(schedule: Schedule) -> Schedule:
    """Unfolds a V of h ranks and M micro-batches into 2h ranks and 2M micro-batches of two directions.

    A rank keeps its order: its lower stage (s < h on rank s) runs direction 0, and its upper stage direction 1. The
    mirror image, rank 2h-1-r, does the same with the directions exchanged. Values that the V's last rank passed to
    itself are now sent to its mirror image, so the result must be checked with `validate`.

    Raises:
        ScheduleError: if the schedule is not such a V. The message names the place.
    """
    half = schedule.num_ranks
    _check_shape(schedule)
    # The V's ranks, then their mirror images with directions exchanged.
    turned = [tuple(_unfolded(group, half, 0) for group in groups) for groups in schedule.ranks]
    images = [tuple(_unfolded(group, half, 1) for group in groups) for groups in reversed(schedule.ranks)]
    forwards = tuple(range(2 * half))
    return Schedule(
        kind=schedule.kind,
        num_ranks=2 * half,
        num_micro_batches=2 * schedule.num_micro_batches,
        placement=(forwards, forwards[::-1]),
        ranks=(*turned, *images),
    )


def _unfolded(group: Group, half: int, near: int) -> Group:
    """Returns the group with directions; `near` is the direction of the lower stages."""
    return tuple(Operation(op.kind, near if op.stage < half else 1 - near, op.stage, op.micro_batch) for op in group)


def _check_shape(schedule: Schedule) -> None:
    half = schedule.num_ranks
    name = f"schedule '{schedule.kind}' cannot be mirrored"
    if schedule.num_directions != 1:
        raise ScheduleError(f"placement: {name}: must have one direction, has {schedule.num_directions}")
    if half < 1 or schedule.num_stages != 2 * half:
        raise ScheduleError(f"placement[0]: {name}: must have 2 stages per rank, {2 * half}, has {schedule.num_stages}")
    if len(schedule.ranks) != half:
        raise ScheduleError(f"ranks: {name}: must have num_ranks = {half} entries, has {len(schedule.ranks)}")
    for stage, rank in enumerate(schedule.placement[0]):
        expected = min(stage, 2 * half - 1 - stage)
        if rank != expected:
            raise ScheduleError(
                f"placement[0][{stage}]: {name}: in a V of {half} ranks it must be {expected}, is {rank}"
            )
    for rank, groups in enumerate(schedule.ranks):
        for index, group in enumerate(groups):
            for op in group:
                if op.direction != 0 or not 0 <= op.stage < 2 * half or min(op.stage, 2 * half - 1 - op.stage) != rank:
                    raise ScheduleError(f"rank {rank}: group {index}: {name}: {op} belongs to a stage of another rank")


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
    # Rank r holds stage r on the way down the V, and stage 2P-1-r on the way up.
    down = rank
    up = 2 * num_ranks - 1 - rank
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
    down = rank
    up = 2 * num_ranks - 1 - rank
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


SCHEDULES.register(
    "dualpipe",
    ScheduleSpec(
        name="dualpipe",
        summary="the published DualPipe: micro-batches enter at both ends",
        generate=dualpipe,
        placement=mirrored_placement,
        limit=_limit,
        idle=IdleFormula(text="(P/2-1)(F&B+B-3W)", assumes="F = I >= W and no latency", value=published_idle),
    ),
)
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
            text="(P-1)(F&B+B-3W)/2",
            assumes="F = I >= W, no exchange and no latency",
            value=lambda num_ranks, costs: published_idle(2 * num_ranks, costs) / 2,
        ),
    ),
)
