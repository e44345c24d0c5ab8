"""Draws costs, and schedules with any placement, order and groups that `validate` accepts."""

import random
from dataclasses import replace

from dualpipe.costs import CostModel, StageCosts
from dualpipe.ir import Group, Link, Op, Operation, Schedule, ScheduleError, Value, made_by, message_of, needed_by
from dualpipe.validate import validate

Placement = tuple[tuple[int, ...], ...]


def straight(num_ranks: int) -> Placement:
    """Returns a placement with stage r on rank r."""
    return (tuple(range(num_ranks)),)


def v_shaped(num_ranks: int) -> Placement:
    """Returns a placement with stages r and 2P-1-r on rank r."""
    return ((*range(num_ranks), *reversed(range(num_ranks))),)


def bidirectional(num_ranks: int, num_loops: int = 1) -> Placement:
    """Returns a placement with two directions, in ascending and descending order of ranks."""
    down = tuple(range(num_ranks))
    return (down * num_loops, down[::-1] * num_loops)


def looped(num_ranks: int, num_loops: int) -> Placement:
    """Returns a placement with stage s on rank s mod P, with a link from the last rank to the first."""
    return (tuple(range(num_ranks)) * num_loops,)


def random_costs(draws: random.Random, num_stages: int) -> CostModel:
    """Draws unequal stages; some have no exchange, and links may have latency."""
    stages = tuple(
        StageCosts(
            forward=draws.uniform(0.5, 2),
            backward_input=draws.uniform(0.5, 2),
            backward_weight=draws.uniform(0, 2),
            forward_exchange=draws.choice([0.0, draws.uniform(0, 3)]),
            backward_exchange=draws.choice([0.0, draws.uniform(0, 3)]),
            activation=draws.uniform(0.5, 2),
            offload=draws.uniform(0, 4),
        )
        for _ in range(num_stages)
    )
    return CostModel(stages=stages, latency=draws.choice([0.0, draws.uniform(0, 0.5)]))


def random_schedule(
    placement: Placement,
    num_micro_batches: int,
    seed: int,
    split_share: float = 0.6,
    slices: int = 1,
    link_depth: int = 1,
) -> Schedule:
    """Returns the first valid schedule of those drawn from the seed.

    Operations become ready in one order over all ranks, and a rank groups up to three of its ready ones. Draws with a
    deadlock are dropped: they occur with two sends of a group on one link, and with links of several stages.
    `split_share` is the fraction of split backwards. Each slice counts as a micro-batch.
    """
    form = "" if slices == link_depth == 1 else f" {slices} {link_depth}"
    draws = random.Random(f"{placement} {num_micro_batches} {seed}{form}")
    num_ranks = 1 + max(rank for row in placement for rank in row)
    empty = Schedule(
        kind="random",
        num_ranks=num_ranks,
        num_micro_batches=num_micro_batches,
        placement=placement,
        ranks=((),) * num_ranks,
        slices=slices,
        link_depth=link_depth,
    )
    while True:
        schedule = _Draw(empty, draws, split_share).run()
        if schedule is None:
            continue
        try:
            validate(schedule)
        except ScheduleError as error:
            if "deadlock" not in str(error):
                raise
            continue
        return schedule


def offloaded(schedule: Schedule, seed: int, share: float = 0.6) -> Schedule:
    """Returns a valid training schedule with offloads and reloads of some activations, at random places."""
    draws = random.Random(f"offload {seed}")
    ranks = []
    for groups in schedule.ranks:
        made = list(groups)
        for op in [op for group in groups for op in group if op.kind is Op.FORWARD]:
            if draws.random() < share:
                backwards = (op.with_kind(Op.BACKWARD), op.with_kind(Op.BACKWARD_INPUT))
                first = next(at for at, group in enumerate(made) if op in group) + 1
                last = next(at for at, group in enumerate(made) if any(each in group for each in backwards))
                out, back = sorted(draws.randint(first, last) for _ in range(2))
                made[back:back] = [(op.with_kind(Op.RELOAD),)]
                made[out:out] = [(op.with_kind(Op.OFFLOAD),)]
        ranks.append(tuple(made))
    return replace(schedule, ranks=tuple(ranks))


class _Draw:
    def __init__(self, empty: Schedule, draws: random.Random, split_share: float) -> None:
        self._draws = draws
        self._split_share = split_share
        self._empty = empty
        self._groups: list[list[Group]] = [[] for _ in empty.ranks]
        self._done: set[Operation] = set()
        self._made: set[Value] = set()
        self._on_link: dict[Link, list[Value]] = {}
        self._left = [self._operations(rank) for rank in range(empty.num_ranks)]

    def run(self) -> Schedule | None:
        """Returns the groups, or None if all ranks wait for each other."""
        ranks = list(range(self._empty.num_ranks))
        while any(self._left):
            self._draws.shuffle(ranks)
            picked = next(((rank, group) for rank in ranks if (group := self._pick(rank))), None)
            if picked is None:
                return None
            self._finish(*picked)
        return replace(self._empty, ranks=tuple(map(tuple, self._groups)))

    def _operations(self, rank: int) -> list[Operation]:
        operations = []
        for direction, stage in self._empty.stages_of(rank):
            for micro_batch in self._empty.micro_batches_of(direction):
                split = self._draws.random() < self._split_share
                backward = (Op.BACKWARD_INPUT, Op.BACKWARD_WEIGHT) if split else (Op.BACKWARD,)
                operations += [Operation(kind, direction, stage, micro_batch) for kind in (Op.FORWARD, *backward)]
        return operations

    def _pick(self, rank: int) -> Group:
        ready = [op for op in self._left[rank] if self._is_ready(op)]
        self._draws.shuffle(ready)
        group: list[Operation] = []
        taken: dict[Link, int] = {}
        size = self._draws.randint(1, 3)
        for op in ready:
            needed = needed_by(op, self._empty.num_stages)
            if (link := self._link_of(needed)) is not None:
                place = taken.get(link, 0)
                if self._on_link[link][place] != needed:
                    continue
                taken[link] = place + 1
            group.append(op)
            if len(group) == size:
                break
        return tuple(group)

    def _is_ready(self, op: Operation) -> bool:
        before = {Op.FORWARD: None, Op.BACKWARD_WEIGHT: Op.BACKWARD_INPUT}.get(op.kind, Op.FORWARD)
        if before is not None and Operation(before, op.direction, op.stage, op.micro_batch) not in self._done:
            return False
        if not self._is_next_slice(op):
            return False
        needed = needed_by(op, self._empty.num_stages)
        if needed is not None and needed not in self._made:
            return False
        # As many messages at a time on a link as it holds, so that the strictest transport can run it.
        link = self._link_of(made_by(op, self._empty.num_stages))
        return link is None or len(self._on_link.get(link, ())) < self._empty.link_depth

    def _is_next_slice(self, op: Operation) -> bool:
        """Returns whether the slice before has run forward, or the slice after it backward."""
        other = op.micro_batch + (-1 if op.kind is Op.FORWARD else 1)
        if op.kind is Op.BACKWARD_WEIGHT or other // self._empty.slices != op.micro_batch // self._empty.slices:
            return True
        kinds = (Op.FORWARD,) if op.kind is Op.FORWARD else (Op.BACKWARD, Op.BACKWARD_INPUT)
        return any(op._replace(kind=kind, micro_batch=other) in self._done for kind in kinds)

    def _finish(self, rank: int, group: Group) -> None:
        self._groups[rank].append(group)
        for op in group:
            self._left[rank].remove(op)
            self._done.add(op)
            needed, made = needed_by(op, self._empty.num_stages), made_by(op, self._empty.num_stages)
            if (link := self._link_of(needed)) is not None:
                assert self._on_link[link].pop(0) == needed
            if made is not None:
                self._made.add(made)
                if (link := self._link_of(made)) is not None:
                    self._on_link.setdefault(link, []).append(made)

    def _link_of(self, value: Value | None) -> Link | None:
        message = None if value is None else message_of(self._empty, value)
        return None if message is None else message.link
