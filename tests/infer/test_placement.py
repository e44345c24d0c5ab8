"""Placements are valid, and as balanced as those of DeepSeek's EPLB, whose rules are written again here."""

import numpy as np
import pytest

from infer.placement import Experts, Loads, PlacementError, PlacementShape, imbalance, place_layer, rank_loads
from tests.refusals import assert_refused

SHAPES = [  # ranks, nodes and redundant experts of 256 experts in 8 groups
    (32, 4, 32),
    (32, 4, 0),
    (64, 8, 64),
    (320, 40, 64),
    (144, 18, 32),
    (8, 1, 32),
    (16, 2, 32),
    (128, 16, 128),
]


def shape_of(ranks: int, nodes: int, redundant: int, experts: int = 256, groups: int = 8) -> PlacementShape:
    return PlacementShape(
        num_experts=experts,
        num_groups=groups,
        num_ranks=ranks,
        num_nodes=nodes,
        num_redundant=redundant,
        policy="hierarchical" if groups % nodes == 0 else "global",
    )


def draw_loads(rng: np.random.Generator, number: int) -> Loads:
    one = np.zeros(256)
    one[rng.integers(256)] = 1e6
    few = np.where(rng.random(256) < 0.05, rng.uniform(1, 100, 256), 0)
    zipf = rng.permutation(1 / np.arange(1, 257) ** rng.uniform(0.3, 1.5))
    grouped = np.repeat(rng.lognormal(0, 1, 8), 32) * rng.uniform(0.9, 1.1, 256)
    kinds = [rng.lognormal(0, rng.uniform(0.2, 2), 256), zipf, grouped, few, one, rng.uniform(1, 2, 256) + one / 1e3]
    kinds += [np.zeros(256), np.full(256, 7.0), rng.integers(0, 1000, 256).astype(float)]
    return kinds[number % len(kinds)]


def eplb_packing(weights: Loads, packs: int) -> Experts:
    """Gives the heaviest object to the lightest pack with room; one object a pack keeps its number."""
    room = len(weights) // packs
    members: list[list[int]] = [[] for _ in range(packs)]
    if room == 1:
        return np.arange(packs)[:, None]
    totals = [0.0] * packs
    for item in np.argsort(-weights, kind="stable").tolist():
        pack = min((pack for pack in range(packs) if len(members[pack]) < room), key=totals.__getitem__)
        members[pack].append(item)
        totals[pack] += weights[item]
    return np.array(members)


def eplb(load_E: Loads, shape: PlacementShape) -> Experts:
    """Computes EPLB's placement (deepseek-ai/EPLB, commit d52c72d): groups to nodes, copies, copies to ranks."""
    nodes = shape.num_nodes if shape.policy == "hierarchical" else 1
    groups = shape.num_groups if shape.policy == "hierarchical" else 1
    size = shape.num_experts // groups
    slots: list[int] = []
    for packed in eplb_packing(load_E.reshape(groups, size).sum(1), nodes):
        experts = [int(group) * size + number for group in packed for number in range(size)]
        copies = dict.fromkeys(experts, 1)
        items = list(experts)
        for _ in range(shape.num_redundant // nodes):
            items.append(max(experts, key=lambda expert: load_E[expert] / copies[expert]))
            copies[items[-1]] += 1
        shares = np.array([load_E[item] / copies[item] for item in items])
        slots += [items[item] for pack in eplb_packing(shares, shape.num_ranks // nodes) for item in pack]
    return np.array(slots)


def test_oracle_gives_the_placement_of_the_readme() -> None:
    """Example of EPLB's README: 12 experts in 4 groups, 4 redundant ones, 8 ranks of 2 nodes."""
    weights = [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
    printed = [
        [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
        [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
    ]
    shape = shape_of(8, 2, 4, experts=12, groups=4)
    for load, expected in zip(weights, printed, strict=True):
        assert eplb(np.array(load, float), shape).tolist() == expected
        assert imbalance(rank_loads(np.array(load, float), place_layer(np.array(load, float), shape), 8)) <= imbalance(
            rank_loads(np.array(load, float), np.array(expected), 8)
        )


@pytest.mark.slow
def test_placements_are_valid_and_balanced_like_those_of_eplb() -> None:
    """100 random, skewed, equal, empty and single loads."""
    rng = np.random.default_rng(1)
    for number in range(100):
        shape = shape_of(*SHAPES[number % len(SHAPES)])
        load_E = draw_loads(rng, number)
        slots_S = place_layer(load_E, shape)
        case = f"load {number}, {shape}"
        assert set(slots_S.tolist()) == set(range(256)), case
        ranks = slots_S.reshape(shape.num_ranks, -1).tolist()
        assert all(len(set(experts)) == len(experts) for experts in ranks), case
        if shape.policy == "hierarchical":
            groups = [set((node // 32).tolist()) for node in slots_S.reshape(shape.num_nodes, -1)]
            assert sum(map(len, groups)) == 8, case
        ours, theirs = (
            imbalance(rank_loads(load_E, slots, shape.num_ranks)) for slots in (slots_S, eplb(load_E, shape))
        )
        assert ours <= 1.05 * theirs, f"{case}: {ours:.3f}, EPLB has {theirs:.3f}"


def test_placement_with_all_experts_on_all_ranks_is_even() -> None:
    load_E = np.random.default_rng(0).lognormal(0, 2, 6)
    slots_S = place_layer(load_E, shape_of(4, 1, 18, experts=6, groups=1))
    assert imbalance(rank_loads(load_E, slots_S, 4)) == pytest.approx(1)


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ((64, 8, 32), ["redundant", "fill 64 ranks", "is 32", "0 or 64"]),
        ((320, 40, 32), ["redundant", "is 32", "nearest valid: 64"]),
        ((8, 1, 2048), ["redundant", "two copies", "is 2048", "nearest valid: 1792"]),
        ((32, 4, 32, 256, 7), ["groups", "divide 256", "is 7", "8"]),
    ],
)
def test_placement_that_cannot_be_is_refused(sizes: tuple[int, ...], parts: list[str]) -> None:
    assert_refused(PlacementError, parts, lambda: shape_of(*sizes))


def test_hierarchical_placement_needs_groups_for_every_node() -> None:
    sizes = {"num_experts": 256, "num_groups": 8, "num_ranks": 320, "num_nodes": 40, "num_redundant": 64}
    assert_refused(PlacementError, ["320", "40 nodes", "policy=global"],
                   lambda: PlacementShape(**sizes, policy="hierarchical"))  # fmt: skip
