"""Places copies of experts on ranks so that the busiest rank has little load. No torch here.

The objective and the two policies are those of DeepSeek's EPLB (github.com/deepseek-ai/EPLB): frequent experts get
redundant copies, which share the load of the expert equally. `hierarchical` first gives each node whole groups of
experts, so that a token, which is limited to a few groups, visits few nodes; `global` ignores groups. In contrast to
EPLB, a rank never has two copies of an expert, and swaps improve the greedy packing.

Shape legend: E experts of a layer, S slots of all ranks in their order, R ranks, K slots of a rank.
"""

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from base.decode import decode
from base.ranges import NonNegativeInt, PositiveInt
from base.refusal import RuleError, divisors
from data.corpus import shorten

Policy = Literal["hierarchical", "global"]
Loads = NDArray[np.float64]
Experts = NDArray[np.int64]


_CLOSE = 0.01
"""How far the busiest rank may be above the mean without a search for other numbers of copies."""
_FAR = 0.05
"""How far it may be without a search for numbers that differ much."""
_MOST_STARTS = 4


class PlacementError(RuleError):
    """Experts cannot be placed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlacementShape:
    """Sizes of a deployment. Ranks have equal numbers of slots, and nodes of ranks."""

    num_experts: PositiveInt
    num_groups: PositiveInt
    num_ranks: PositiveInt
    num_nodes: PositiveInt
    num_redundant: NonNegativeInt
    policy: Policy

    @property
    def num_slots(self) -> int:
        """Slots of all ranks."""
        return self.num_experts + self.num_redundant

    def __post_init__(self) -> None:
        experts = self.num_experts
        ranks = self.num_ranks
        if self.num_slots % ranks:
            rule = f"{experts} experts and redundant ones must fill {ranks} ranks equally"
            below = self.num_slots // ranks * ranks - experts
            near = f"{below} or {below + ranks}" if below >= 0 else str(below + ranks)
            raise PlacementError.broken("redundant", rule, self.num_redundant, near)
        if self.policy == "hierarchical" and self.num_groups % self.num_nodes:
            rule = f"{self.num_groups} groups of experts must fill the nodes equally with policy=hierarchical"
            raise PlacementError.broken("ranks", rule, f"{ranks}, which are {self.num_nodes} nodes", "policy=global")
        nodes = self.num_nodes if self.policy == "hierarchical" else 1
        if experts % self.num_groups:
            near = divisors(experts, self.num_groups)
            raise PlacementError.broken("groups", f"must divide {experts} experts", self.num_groups, near)
        if self.num_slots // ranks > experts // nodes:
            rule = f"a rank must not need two copies of one of the {experts // nodes} experts of its node"
            most = ranks * (experts // nodes) - experts
            raise PlacementError.broken("redundant", rule, self.num_redundant, most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The expert of each slot, S, of the layers that are placed.

    Other layers have `default_layer`, or equal loads if nodes have whole groups.
    """

    shape: PlacementShape
    layers: Mapping[int, Experts]

    @classmethod
    def in_order(cls, num_experts: int, num_ranks: int) -> Self:
        """Returns the placement with consecutive experts on each rank; the first ones fill the last slots."""
        shape = PlacementShape(
            num_experts=num_experts,
            num_groups=1,
            num_ranks=num_ranks,
            num_nodes=1,
            num_redundant=-num_experts % num_ranks,
            policy="global",
        )
        return cls(shape=shape, layers={})

    @classmethod
    def read(cls, values: Any, key: str) -> Self:
        """Decodes a placement as `launch.place format=json` writes it; errors name the key."""
        try:
            shape = decode(PlacementShape, {field.name: values[field.name] for field in fields(PlacementShape)})
            rows = {
                int(name.removeprefix("layer_")): np.array(layer["experts"]) for name, layer in values["layers"].items()
            }
        except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError) as error:
            rule = "must be what launch.place format=json writes"
            raise PlacementError.broken(key, rule, f"{type(error).__name__} {error}", "a new placement") from error
        form = (shape.num_ranks, shape.num_slots // shape.num_ranks)
        for layer, experts_RK in rows.items():
            rule = ""
            if experts_RK.shape != form or experts_RK.dtype != np.int64:
                rule = f"must list the experts of {form[0]} ranks with {form[1]} slots"
            elif sorted({*experts_RK.flatten().tolist()}) != [*range(shape.num_experts)]:
                rule = f"must place each of {shape.num_experts} experts"
            elif any(len({*experts_K}) < form[1] for experts_K in experts_RK.tolist()):
                rule = "must not have two copies of an expert on a rank"
            if rule:
                experts = shorten(str(experts_RK.tolist()))
                raise PlacementError.broken(key, f"layer {layer} {rule}", experts, "a new placement")
        return cls(shape=shape, layers={layer: experts_RK.flatten() for layer, experts_RK in rows.items()})

    @property
    def num_local_slots(self) -> int:
        """Slots of a rank."""
        return self.shape.num_slots // self.shape.num_ranks

    def slots(self, layer: int) -> Experts:
        """Returns the experts of each rank's slots of a layer, RK."""
        slots_S = self.layers.get(layer)
        if slots_S is None and self.shape.policy == "hierarchical":
            slots_S = place_layer(np.ones(self.shape.num_experts), self.shape)  # copies stay on the node of their group
        if slots_S is None:
            slots_S = default_layer(self.shape)
        return slots_S.reshape(self.shape.num_ranks, -1)

    def rebalanced(self, loads: Mapping[int, Loads]) -> Self:
        """Returns the placement of the same shape for other loads."""
        return type(self)(shape=self.shape, layers={layer: place_layer(loads[layer], self.shape) for layer in loads})


def place_layer(load_E: Loads, shape: PlacementShape) -> Experts:
    """Returns the expert of each slot of a layer, given the experts' loads.

    Both packings of groups on nodes, greedy and improved, are completed, and the better placement is returned.
    """
    if shape.policy == "global":
        return _place_node(load_E, shape.num_ranks, shape.num_slots).flatten()
    group_size = shape.num_experts // shape.num_groups
    loads = load_E.reshape(shape.num_groups, group_size).sum(1)
    groups = np.arange(shape.num_groups)
    greedy = _pack(loads, groups, shape.num_nodes)
    packings = [greedy, _improved(loads, greedy)]
    placements = [_place_groups(load_E, packing, shape) for packing in packings]
    return min(placements, key=lambda slots_S: imbalance(rank_loads(load_E, slots_S, shape.num_ranks)))


def _place_groups(load_E: Loads, packing: Experts, shape: PlacementShape) -> Experts:
    """Returns the expert of each slot if the nodes have these groups."""
    group_size = shape.num_experts // shape.num_groups
    ranks = shape.num_ranks // shape.num_nodes
    slots = shape.num_slots // shape.num_nodes
    nodes = []
    for groups in packing:
        experts = (groups[:, None] * group_size + np.arange(group_size)).flatten()
        nodes.append(experts[_place_node(load_E[experts], ranks, slots)].flatten())
    return np.concatenate(nodes)


def _place_node(load_E: Loads, num_ranks: int, num_slots: int) -> Experts:
    """Returns the experts of each rank, RK, where every expert may be on every rank.

    If the busiest rank is far above the mean, packings whose last copies are of rare experts are compared too: a few
    large copies alone on their ranks may be better than many small ones that meet.
    """
    num_experts = len(load_E)

    def packing(num_frequent: int) -> Experts:
        copies_E = _count_copies(load_E, num_ranks, num_slots, num_frequent)
        return _pack(load_E / copies_E, np.repeat(np.arange(num_experts), copies_E), num_ranks)

    def highest(packing_RK: Experts) -> float:
        return imbalance(rank_loads(load_E, packing_RK.flatten(), num_ranks))

    greedy = packing(num_slots - num_experts)
    # No placement has a smaller largest copy than the greedy one.
    copies_E = np.bincount(greedy.flat, minlength=num_experts)
    bound = max(1.0, float((load_E / copies_E).max()) * num_ranks / (load_E.sum() or 1.0)) * (1 + _FAR)
    best = _searched(load_E, greedy)
    if highest(best) > bound:
        starts = sorted(map(packing, range(num_slots - num_experts)), key=highest)[:_MOST_STARTS]
        best = min((best, *(_searched(load_E, start) for start in starts)), key=highest)
    return np.sort(best, axis=1)


def _searched(load_E: Loads, packing_RK: Experts) -> Experts:
    """Returns a packing improved by swaps, and by other numbers of copies."""
    while True:
        packing_RK = _improved(load_E / np.bincount(packing_RK.flat, minlength=len(load_E)), packing_RK)
        if (changed_RK := _with_other_copies(load_E, packing_RK)) is None:
            return packing_RK
        packing_RK = changed_RK


def _with_other_copies(load_E: Loads, packing_RK: Experts) -> Experts | None:
    """Returns a packing with one slot of another expert and a less busy busiest rank, if there is one.

    The slot has a copy of an expert with several. It is on the busiest rank, or gets a copy of an expert there.
    """
    num_experts = len(load_E)
    copies_E = np.bincount(packing_RK.flat, minlength=num_experts)
    load_R = (load_E / copies_E)[packing_RK].sum(1)
    busiest = int(load_R.argmax())
    if load_R[busiest] <= load_R.mean() * (1 + _CLOSE):
        return None
    has_RE = np.zeros((len(packing_RK), num_experts))
    has_RE[np.arange(len(packing_RK))[:, None], packing_RK] = 1
    ranks, slots = np.nonzero(copies_E[packing_RK] > 1)
    # Pairs of a slot and its next expert.
    pairs = [
        (rank, slot, expert)
        for rank, slot in zip(ranks, slots, strict=True)
        for expert in (range(num_experts) if rank == busiest else packing_RK[busiest])
        if not has_RE[rank, expert]
    ]
    if not pairs:
        return None
    rank_N, slot_N, next_N = np.array(pairs).T
    last_N = packing_RK[rank_N, slot_N]
    # Loads of the copies that stay where they are change on all ranks: [pairs, R].
    more_N = load_E[last_N] / (copies_E[last_N] - 1) - load_E[last_N] / copies_E[last_N]
    less_N = load_E[next_N] / copies_E[next_N] - load_E[next_N] / (copies_E[next_N] + 1)
    loads_NR = load_R + more_N[:, None] * has_RE.T[last_N] - less_N[:, None] * has_RE.T[next_N]
    pair = np.arange(len(rank_N))
    loads_NR[pair, rank_N] += load_E[next_N] / (copies_E[next_N] + 1) - load_E[last_N] / (copies_E[last_N] - 1)
    highest_N = loads_NR.max(1)
    best = int(highest_N.argmin())
    if not highest_N[best] < load_R[busiest] * (1 - 1e-9):
        return None
    changed_RK = packing_RK.copy()
    changed_RK[rank_N[best], slot_N[best]] = next_N[best]
    return changed_RK


def _count_copies(load_E: Loads, most: int, num_slots: int, num_frequent: int) -> Experts:
    """Returns how often each expert is placed, at most `most` times.

    Each of `num_frequent` redundant copies goes to the expert with the most load in a copy, which makes the largest
    copy as small as possible. Others go to the experts with the least load.
    """
    copies_E = np.ones(len(load_E), np.int64)
    waiting = [(-load, 1, expert) for expert, load in enumerate(load_E.tolist()) if most > 1]
    heapq.heapify(waiting)
    for _ in range(num_frequent):
        _, copies, expert = heapq.heappop(waiting)
        copies_E[expert] = copies + 1
        if copies + 1 < most:
            heapq.heappush(waiting, (-float(load_E[expert]) / (copies + 1), copies + 1, expert))
    order = np.argsort(load_E, kind="stable")
    while left := num_slots - int(copies_E.sum()):
        copies_E[order[copies_E[order] < most][:left]] += 1
    return copies_E


def _pack(share_E: Loads, items: Experts, num_ranks: int) -> Experts:
    """Returns the items of each rank, RK: the heaviest goes to the least loaded rank that may have it."""
    room = len(items) // num_ranks
    ranks: list[list[int]] = [[] for _ in range(num_ranks)]
    loads = [0.0] * num_ranks
    for item in items[np.argsort(-share_E[items], kind="stable")].tolist():
        share = float(share_E[item])
        allowed = [rank for rank in range(num_ranks) if len(ranks[rank]) < room and item not in ranks[rank]]
        rank = min(allowed, key=loads.__getitem__) if allowed else _free_rank(item, ranks, loads, share_E)
        ranks[rank].append(item)
        loads[rank] += share
    return np.array(ranks)


def _free_rank(item: int, ranks: Sequence[list[int]], loads: list[float], share_E: Loads) -> int:
    """Returns a full rank after one of its items has moved to a rank with room, where the item already is.

    Such a rank exists, because an item has at most as many copies as there are ranks.
    """
    room = max(map(len, ranks))
    open_rank = next(rank for rank, items in enumerate(ranks) if len(items) < room)
    full_ranks = (rank for rank, items in enumerate(ranks) if len(items) == room and item not in items)
    full = min(full_ranks, key=loads.__getitem__)
    moved = max((other for other in ranks[full] if other not in ranks[open_rank]), key=share_E.__getitem__)
    ranks[full].remove(moved)
    ranks[open_rank].append(moved)
    loads[full] -= float(share_E[moved])
    loads[open_rank] += float(share_E[moved])
    return full


def _improved(share_E: Loads, packing_RK: Experts) -> Experts:
    """Returns a packing after swaps with the busiest rank, while they make its busiest rank less busy."""
    items_RK = packing_RK.copy()
    num_ranks = len(items_RK)
    shares_RK = share_E[items_RK]
    load_R = shares_RK.sum(1)
    has_RE = np.zeros((num_ranks, len(share_E)), bool)
    has_RE[np.arange(num_ranks)[:, None], items_RK] = True
    for _ in range(4 * items_RK.size):
        busiest = int(load_R.argmax())
        # Load that moves to each other rank by a swap of slot a here with slot b there: [a, R, b].
        moved = shares_RK[busiest][:, None, None] - shares_RK
        allowed = ~has_RE[:, items_RK[busiest]].T[:, :, None] & ~has_RE[busiest][items_RK]
        higher = np.maximum(load_R[busiest] - moved, load_R[:, None] + moved)
        higher[~allowed] = np.inf
        best = int(higher.argmin())
        here, rank, there = np.unravel_index(best, higher.shape)
        if not higher.flat[best] < load_R[busiest] * (1 - 1e-9):
            break
        ranks = np.array([busiest, rank])
        slots = np.array([here, there])
        items = items_RK[ranks, slots]
        has_RE[ranks, items] = False
        has_RE[ranks[::-1], items] = True
        items_RK[ranks, slots] = items[::-1]
        shares_RK = share_E[items_RK]
        load_R = shares_RK.sum(1)
    return items_RK


def default_layer(shape: PlacementShape) -> Experts:
    """Returns the expert of each slot as servers start: all in order, then the first ones again."""
    return np.arange(shape.num_slots) % shape.num_experts


def rank_loads(load_E: Loads, slots_S: Experts, num_ranks: int) -> Loads:
    """Returns the load of each rank, if the copies of an expert share its load equally."""
    copies_E = np.bincount(slots_S, minlength=len(load_E))
    shares: Loads = (load_E / copies_E)[slots_S].reshape(num_ranks, -1).sum(1)
    return shares


def imbalance(load_R: Loads) -> float:
    """Returns the largest load divided by the mean, 1 if there is none."""
    return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0
