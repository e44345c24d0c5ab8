"""Draws costs, and schedules with any placement, order and groups that `validate` accepts."""

import random
from dataclasses import replace

from dualpipe.ir import Group, Link, Op, Operation, Schedule, ScheduleError, Value, made_by, message_of, needed_by
from dualpipe.simulate.costs import CostModel, StageCosts
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


def random_schedule(placement: Placement, num_micro_batches: int, seed: int, split_share: float = 0.6) -> Schedule:
    """Returns the first valid schedule of those drawn from the seed.

    Operations become ready in one order over all ranks, and a rank groups up to three of its ready ones. Draws with a
    deadlock are dropped: they occur with two sends of a group on one link, and with links of several stages.
    `split_share` is the fraction of split backwards.
    """
    draws = random.Random(f"{placement} {num_micro_batches} {seed}")
    while True:
        schedule = _Draw(placement, num_micro_batches, draws, split_share).run()
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
    def __init__(self, placement: Placement, num_micro_batches: int, draws: random.Random, split_share: float) -> None:
        num_ranks = 1 + max(rank for row in placement for rank in row)
        self._draws = draws
        self._split_share = split_share
        self._empty = Schedule(
            kind="random",
            num_ranks=num_ranks,
            num_micro_batches=num_micro_batches,
            placement=placement,
            ranks=((),) * num_ranks,
        )
        self._groups: list[list[Group]] = [[] for _ in range(num_ranks)]
        self._done: set[Operation] = set()
        self._made: set[Value] = set()
        self._on_link: dict[Link, list[Value]] = {}
        self._left = [self._operations(rank) for rank in range(num_ranks)]

    def run(self) -> Schedule | None:
        """Returns the groups, or None if all ranks wait for each other."""
        ranks = list(range(self._empty.num_ranks))
        while any(self._left):
            self._draws.shuffle(ranks)
            picked = next(((rank, group) for rank in ranks if (group := self._pick(rank))), None)
            if picked is None:
                return None
            self._finish(*picked)
        empty = self._empty
        return Schedule(
            kind=empty.kind,
            num_ranks=empty.num_ranks,
            num_micro_batches=empty.num_micro_batches,
            placement=empty.placement,
            ranks=tuple(map(tuple, self._groups)),
        )

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
        needed = needed_by(op, self._empty.num_stages)
        if needed is not None and needed not in self._made:
            return False
        # One message at a time on a link, so that the strictest transport can run it.
        link = self._link_of(made_by(op, self._empty.num_stages))
        return link is None or not self._on_link.get(link)

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
