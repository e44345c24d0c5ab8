"""The decoded counts of all members of a group are consistent with each other.

Shape legend: R ranks, E experts.
"""

import random

import pytest

from comm.dispatch.two_hop.counts import CountLayout, Hop, PlanCounts, shifts_by_source
from comm.relays import Relays

_NUM_LOCAL = 3


def _own_numbers(relays: Relays, tokens: list[list[int]], num_chunks: int) -> list[int]:
    """Returns the counts of a member with these tokens' experts, in the layout's order."""
    num_ranks = len(relays.node_of)
    per_chunk = -(-len(tokens) // num_chunks)
    numbers = []
    for chunk in range(num_chunks):
        part = tokens[chunk * per_chunk : (chunk + 1) * per_chunk]
        ranks = [{expert // _NUM_LOCAL for expert in experts} for experts in part]
        nodes = [{relays.node_of[rank] for rank in touched} for touched in ranks]
        numbers += [sum(rank in touched for touched in ranks) for rank in range(num_ranks)]
        numbers += [sum(node in touched for touched in nodes) for node in range(relays.num_nodes)]
    flat = [expert for experts in tokens for expert in experts]
    return [*numbers, *(flat.count(expert) for expert in range(num_ranks * _NUM_LOCAL)), 0, 0]


def _plans(nodes: list[int], num_chunks: int, tokens: list[list[list[int]]]) -> list[PlanCounts]:
    relays = Relays(nodes)
    rail_of = {place: rail for rail in relays.rails() for place in rail}
    layouts = [CountLayout(relays, place, rail_of[place], _NUM_LOCAL, num_chunks) for place in range(len(nodes))]
    own = [_own_numbers(relays, tokens[place], num_chunks) for place in range(len(nodes))]
    sent = [
        [[own[place][index] for index in row] for row in layout.send_indices()] for place, layout in enumerate(layouts)
    ]
    return [
        layout.decode([*own[place], *(number for source in sent for number in source[place])])
        for place, layout in enumerate(layouts)
    ]


def _tokens(nodes: list[int], seed: int) -> list[list[list[int]]]:
    generator = random.Random(seed)
    num_experts = len(nodes) * _NUM_LOCAL
    return [
        [generator.sample(range(num_experts), min(4, num_experts)) for _ in range(generator.randrange(12))]
        for _ in nodes
    ]


@pytest.mark.parametrize("num_chunks", [1, 3])
@pytest.mark.parametrize(
    "sizes", [(1,), (3,), (1, 1), (2, 2), (2, 2, 2), (4, 2), (1, 2, 2), (3, 1, 2), (5, 3, 2, 1), (8,) * 8]
)
def test_counts_of_each_member_fit_those_of_the_others(sizes: tuple[int, ...], num_chunks: int) -> None:
    nodes = [node for node, size in enumerate(sizes) for _ in range(size)]
    relays, tokens = Relays(nodes), _tokens(nodes, len(nodes))
    plans = _plans(nodes, num_chunks, tokens)
    for group in relays.rails():
        _assert_fits([plans[place].across for place in group])
    for group in relays.members_of:
        _assert_fits([plans[place].within for place in group])
    for place, plan in enumerate(plans):
        assert len(plan.across) == (num_chunks if len(sizes) > 1 else 0)
        assert len(plan.within) == len(plan.across) + 1
        mine = range(place * _NUM_LOCAL, (place + 1) * _NUM_LOCAL)
        copies = [(source, experts) for source, of in enumerate(tokens) for experts in of if {*mine} & {*experts}]
        assert plan.counts == tuple(sum(expert in experts for of in tokens for experts in of) for expert in mine)
        assert sum(run.num_rows for run in plan.runs) == len(copies)
        assert sum(sum(hop.received) for hop in plan.within) == len(copies)
        touched = [len({relays.node_of[expert // _NUM_LOCAL] for expert in experts}) for experts in tokens[place]]
        home = [any(expert // _NUM_LOCAL in relays.members_of[nodes[place]] for expert in of) for of in tokens[place]]
        assert plan.num_touched_nodes == sum(touched)
        assert plan.min_rows_across_nodes == sum(touched) - sum(home) == sum(sum(hop.sent) for hop in plan.across)


def _assert_fits(hops: list[tuple[Hop, ...]]) -> None:
    """Checks that the rows that one member sends in a message are those that the other expects."""
    for sender, mine in enumerate(hops):
        for receiver, theirs in enumerate(hops):
            assert [hop.sent[receiver] for hop in mine] == [hop.received[sender] for hop in theirs]


def test_counts_carry_tokens_over_the_cap_to_all_members() -> None:
    relays = Relays([0, 0, 1])
    layouts = [CountLayout(relays, place, (0, 1, 2), _NUM_LOCAL, 2) for place in range(3)]
    own = [_own_numbers(relays, [], 2) for _ in range(3)]
    own[1][-2] = 5
    sent = [
        [[own[place][index] for index in row] for row in layout.send_indices()] for place, layout in enumerate(layouts)
    ]
    for place, layout in enumerate(layouts):
        numbers = [*own[place], *(number for source in sent for number in source[place])]
        assert layout.decode(numbers).num_over_R == (0, 5, 0)


def test_runs_move_into_the_order_of_sources_and_chunks() -> None:
    nodes = [0, 0, 1, 1]
    for plan in _plans(nodes, 2, _tokens(nodes, 1)):
        arrived = [(run.source, run.chunk, row) for run in plan.runs for row in range(run.num_rows)]
        shifts = [
            shift
            for run, shift in zip(plan.runs, shifts_by_source(plan.runs), strict=True)
            for _ in range(run.num_rows)
        ]
        moved = sorted(zip((place + shift for place, shift in enumerate(shifts)), arrived, strict=True))
        assert [place for place, _ in moved] == list(range(len(arrived)))
        assert [row for _, row in moved] == sorted(arrived)
