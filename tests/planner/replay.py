"""Replays DeepSeek-V3's step from the public trace, without any code of the planner, the simulator or the generators.

The order is that of the published program (deepseek-ai/DualPipe, `dualpipe.py`), the times are those of its public
trace (deepseek-ai/profile-data, `train.json`), and the event loop is this module's.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

Task = tuple[str, int, int, int]
"""Kind (F, B, I or W), direction, stage and micro-batch."""
Orders = Sequence[Sequence[Sequence[Task]]]
"""Groups of every rank."""

# Milliseconds of one layer by pass: products, scores, casts, all else.
ATTENTION = {"F": (1.67, 1.24, 0.50, 0.96), "I": (2.27, 4.25, 1.32, 1.50), "W": (2.39, 0.0, 0.0, 0.0)}
EXPERTS = {"F": (3.30, 0.0, 0.52, 0.78), "I": (3.20, 0.0, 0.97, 1.14), "W": (4.49, 0.0, 0.58, 0.0)}
DISPATCH_F, COMBINE_F, COMBINE_I, DISPATCH_I = 4.35, 5.99, 6.37, 3.41
DENSE_SHARE, HEAD_TFLOP, HEAD_RATE = 0.8, 2 * 4096 * 129_280 * 7168 / 1e12, 650.0
PROJECTION = 2 * 7168**2 / 187_107_328
OPTIMIZER, LATENCY, SMS, TAKEN = 290.0, 0.5, 132, 20
ROWS_ACROSS, LINK, LINK_WITHIN = 3.469, 50.0, 160.0
NUM_DENSE, NUM_LAYERS = 3, 61


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Hardware and recipe of a replay, as factors on the trace.

    Attributes:
        products: on products in FP8, scores and heads excluded.
        head_taken: SMs that do not compute heads, or None for `taken`.
        link: rate of the link between nodes over 50 GB/s.
        within: rate of the link within a node over 160 GB/s.
        rows: rows of a token that cross nodes, and that move within a node.
        saved: milliseconds of a layer's I that are not recomputed, in attention and in experts.
    """

    products: float = 1.0
    casts: float = 1.0
    memory: float = 1.0
    taken: int = TAKEN
    head_taken: int | None = None
    link: float = 1.0
    within: float = 1.0
    rows: tuple[float, float] | None = None
    combine: float = 1.0
    latency: float = 1.0
    saved: tuple[float, float] = (0.0, 0.0)


def published_orders(num_ranks: int, num_micro_batches: int) -> Orders:
    return [_published_order(rank, num_ranks, num_micro_batches // 2) for rank in range(num_ranks)]


def _published_order(rank: int, num_ranks: int, each: int) -> list[list[Task]]:
    half, own, flip = num_ranks // 2, min(rank, num_ranks - 1 - rank), int(rank >= num_ranks // 2)
    groups: list[list[Task]] = []
    done = {(kind, phase): 0 for kind in "FB" for phase in (0, 1)}
    deferred: list[Task] = []

    def take(kind: str, phase: int, *, splits: bool = False) -> Task:
        direction = phase ^ flip
        stage = rank if direction == 0 else num_ranks - 1 - rank
        task = ("I" if splits else kind, direction, stage, done[kind, phase])
        done[kind, phase] += 1
        if splits:
            deferred.append(("W", *task[1:]))
        return task

    def weights() -> None:
        groups.append([deferred.pop(0)])

    groups += [[take("F", 0)] for _ in range(2 * (half - own - 1))]
    for _ in range(own + 1):
        groups += [[take("F", 0)], [take("F", 1)]]
    for _ in range(half - own - 1):
        groups.append([take("B", 1, splits=True)])
        weights()
        groups.append([take("F", 1)])
    for step in range(each - num_ranks + own + 1):
        if step == 0 and own == half - 1:
            groups += [[take("F", 0)], [take("B", 1)]]
        else:
            groups.append([take("F", 0), take("B", 1)])
        groups.append([take("F", 1), take("B", 0)])
    for _ in range(half - own - 1):
        groups += [[take("B", 1)], [take("F", 1), take("B", 0)]]
    splits = False
    for step in range(own + 1):
        splits = splits or (step == (own + 1) // 2 and own % 2 == 1)
        groups.append([take("B", 1, splits=splits)])
        splits = splits or (step == (own + 1) // 2 and own % 2 == 0)
        groups.append([take("B", 0, splits=splits)])
    for _ in range(half - own - 1):
        weights()
        groups.append([take("B", 0, splits=True)])
    while deferred:
        weights()
    return groups


def step_seconds(machine: Machine, cut: Sequence[int], orders: Orders) -> float:
    """Returns the time of a step with the optimizer.

    Args:
        cut: layers of each stage; the last one also has the MTP module and both heads.
        orders: groups of each rank; stage s of direction 0 is on rank s, of direction 1 on its mirror.
    """
    starts = [sum(cut[:stage]) for stage in range(len(cut))]
    costs = [
        _stage(machine, [start + layer < NUM_DENSE for layer in range(size)], is_last=stage == len(cut) - 1)
        for stage, (start, size) in enumerate(zip(starts, cut, strict=True))
    ]
    return (_makespan(orders, costs, machine) + OPTIMIZER) / 1e3


def _stage(machine: Machine, is_dense: Sequence[bool], *, is_last: bool) -> dict[str, tuple[float, float]]:
    """Returns the milliseconds of computation and of exchange of each pass of a stage."""
    exchange = dict(zip("FI", _exchange(machine), strict=True))
    costs = {}
    for kind in "FIW":
        attention = _layer(machine, ATTENTION[kind]) - machine.saved[0] * (kind == "I")
        experts = _layer(machine, EXPERTS[kind]) - machine.saved[1] * (kind == "I")
        moe = attention + experts
        compute = sum(attention + DENSE_SHARE * experts if dense else moe for dense in is_dense)
        exchanges = sum(not dense for dense in is_dense) + is_last
        if is_last:
            projection = PROJECTION * ATTENTION[kind][0] * machine.products * _slowed(machine.taken)
            head_taken = machine.taken if machine.head_taken is None else machine.head_taken
            compute += moe + projection + 2 * 1e3 * HEAD_TFLOP / HEAD_RATE * _slowed(head_taken)
        costs[kind] = (compute, exchanges * exchange.get(kind, 0.0))
    compute, exchanged = (costs["I"][part] + costs["W"][part] for part in (0, 1))
    return {**costs, "B": (compute, exchanged)}


def _slowed(taken: int) -> float:
    return (SMS - TAKEN) / (SMS - taken)


def _layer(machine: Machine, kernels: tuple[float, float, float, float]) -> float:
    products, scores, casts, other = kernels
    waiting = (casts * machine.casts + other) * machine.memory
    return (products * machine.products + scores + waiting) * _slowed(machine.taken)


def _exchange(machine: Machine) -> tuple[float, float]:
    """Returns the milliseconds of one layer's exchange in F and in I."""
    across, within = machine.rows or count_rows(limit=4, once=True)
    # Both links work at the same time.
    factor = max(across / ROWS_ACROSS / machine.link, within / ROWS_ACROSS * LINK / LINK_WITHIN / machine.within)
    combine = machine.combine
    return factor * (DISPATCH_F + combine * COMBINE_F), factor * (DISPATCH_I + combine * COMBINE_I)


@cache
def count_rows(*, limit: int, once: bool, tokens: int = 1500) -> tuple[float, float]:
    """Counts rows across nodes and within nodes: 256 experts, 8 of them for a token, on 64 ranks of 8 nodes.

    Args:
        once: whether a token is sent to a node once and forwarded there.
    """
    draw, across, within = random.Random(1), 0, 0
    for token in range(tokens):
        scores = [draw.random() for _ in range(256)]
        best_two = {node: sum(sorted(scores[32 * node : 32 * node + 32])[-2:]) for node in range(8)}
        allowed = sorted(best_two, key=best_two.__getitem__)[8 - limit :]
        experts = sorted((e for e in range(256) if e // 32 in allowed), key=scores.__getitem__)[-8:]
        home, lane = token // 8 % 8, token % 8
        targets = [(expert // 32, expert // 4 % 8) for expert in experts]
        if once:
            across += len({node for node, _ in targets} - {home})
            within += len({target for target in targets if target[1] != lane})
        else:
            across += sum(node != home for node, _ in targets)
            within += sum(node == home and rank != lane for node, rank in targets)
    return across / tokens, within / tokens


def _makespan(orders: Orders, costs: Sequence[dict[str, tuple[float, float]]], machine: Machine) -> float:
    """Runs each rank's groups in order, each when all values that it needs have arrived."""
    num_ranks, last = len(orders), len(costs) - 1
    ends: dict[Task, float] = {}
    clock, place = [0.0] * num_ranks, [0] * num_ranks
    alone = 1 - machine.taken / SMS
    latency = LATENCY * machine.latency

    def arrival(task: Task) -> float | None:
        kind, direction, stage, micro_batch = task
        if kind == "F":
            return 0.0 if stage == 0 else _later(ends.get(("F", direction, stage - 1, micro_batch)), latency)
        if kind == "W":
            return ends.get(("I", direction, stage, micro_batch))
        if stage == last:
            return ends.get(("F", direction, stage, micro_batch))
        after = [ends.get((kind, direction, stage + 1, micro_batch)) for kind in "BI"]
        return _later(next((end for end in after if end is not None), None), latency)

    moved = True
    while moved:
        moved = False
        for rank, groups in enumerate(orders):
            while place[rank] < len(groups):
                group = groups[place[rank]]
                ready = [arrival(task) for task in group]
                known = [time for time in ready if time is not None]
                if len(known) < len(ready):
                    break
                clock[rank] = max(clock[rank], *known) + _duration([costs[task[2]][task[0]] for task in group], alone)
                ends.update(dict.fromkeys(group, clock[rank]))
                place[rank] += 1
                moved = True
    assert place == [len(groups) for groups in orders], "the order has a deadlock"
    return max(clock)


def _later(time: float | None, latency: float) -> float | None:
    return None if time is None else time + latency


def _duration(members: Sequence[tuple[float, float]], alone: float) -> float:
    """Returns the time of a group: overlapped, or one operation with the whole device and an exposed exchange."""
    if len(members) == 1:
        return alone * members[0][0] + members[0][1]
    compute, exchange = sum(each[0] for each in members), sum(each[1] for each in members)
    return max(compute, exchange, *(sum(each) for each in members))


def without_heads(machine: Machine) -> Machine:
    return replace(machine, head_taken=TAKEN)
