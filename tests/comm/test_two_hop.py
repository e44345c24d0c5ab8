"""The two-hop dispatcher keeps laws beyond the contract of every dispatcher.

Shape legend: T tokens, K experts per token, D hidden size, A arrived rows."""

import random
from typing import Literal

import pytest
import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.build import Fp8Dispatcher, build_dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.traffic import ClipCount
from comm.dispatch.two_hop.plan import CountLayout, Hop, PlanCounts, shifts_by_source
from comm.groups import Groups
from comm.lane import InlineLane, ThreadLane
from comm.layout import Layout, Relays
from comm.protocol import Dispatcher
from tests.comm.backends import Setting, make_parts, maker, watching
from tests.ranks import run_ranks

_NUM_EXPERTS = 12


def _routing(rank: int, num_tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rank)
    ids_TK = torch.rand(num_tokens, _NUM_EXPERTS, generator=generator).topk(5, -1).indices
    rows_TD = torch.randn(num_tokens, 24, generator=generator).to(dtype)
    return ids_TK, rows_TD, torch.rand(num_tokens, 5, generator=generator)


def _go_round(dispatcher: Dispatcher, ids_TK: Tensor, rows_TD: Tensor, weights_TK: Tensor) -> tuple[Tensor, ...]:
    """Runs all four exchanges with a nonlinear expert."""
    handle = dispatcher.plan(ids_TK, weights_TK)
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    out_AD = torch.sin(arrived.rows_AD) * arrived.weights_A[:, None].to(rows_TD.dtype)
    combined_TD = dispatcher.combine(out_AD, handle).wait()
    copied_AD = dispatcher.combine_backward(combined_TD, handle).wait()
    grads = dispatcher.dispatch_backward(copied_AD, arrived.weights_A * 3, handle).wait()
    return arrived.rows_AD, arrived.weights_A, combined_TD, copied_AD, *grads


def _vary_chunks(rank: int, world_size: int) -> list[str]:
    """Returns the results that differ from those of one chunk, and by how much."""
    ids_TK, rows_TD, weights_TK = _routing(rank, 17 + rank, torch.bfloat16)
    results = []
    numbers = (1, 2, 5, 40)
    with ThreadLane("comm") as lane:
        for chunks in numbers:
            make = maker(Setting("two_hop", (0, 0, 1, 1), {"chunks": chunks}), _NUM_EXPERTS, watching())
            results += [_go_round(make(each), ids_TK, rows_TD, weights_TK) for each in (lane, InlineLane())]
    return [
        f"{numbers[place // 2]} chunks: result {index} differs by up to {(one.float() - other.float()).abs().max()}"
        for place, result in enumerate(results)
        for index, (one, other) in enumerate(zip(results[0], result, strict=True))
        if not torch.equal(one, other)
    ]


def test_number_of_chunks_changes_no_bit() -> None:
    assert run_ranks(4, _vary_chunks) == [[]] * 4


def _sum_partially(rank: int, world_size: int) -> list[bool]:
    """Returns whether all sums are correctly rounded: with partial sums in the rows' dtype and in float32."""
    ids_TK, _, weights_TK = _routing(rank, 64, torch.bfloat16)
    # Sums of integers below 2^24 are exact in float32, and most need more than bfloat16's 8 bits.
    rows_TD = torch.randint(-255, 256, (64, 24), generator=torch.Generator().manual_seed(rank)).bfloat16()
    found = []
    choices: tuple[Literal["rows", "float32"], ...] = ("rows", "float32")
    for partial_sums in choices:
        setting = Setting("two_hop", (0, 0, 1, 1), {"chunks": 2, "partial_sums": partial_sums})
        dispatcher = maker(setting, _NUM_EXPERTS, watching())(InlineLane())
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        factors = torch.arange(rank * 3, rank * 3 + 3).repeat_interleave(torch.tensor(arrived.counts)) % 2 + 1
        combined_TD = dispatcher.combine(arrived.rows_AD * factors[:, None].bfloat16(), handle).wait()
        exact_TD = rows_TD.double() * (ids_TK % 2 + 1).sum(1, keepdim=True)
        found.append(torch.equal(combined_TD, exact_TD.bfloat16()))
    return found


def test_partial_sums_in_float32_leave_one_rounding() -> None:
    assert run_ranks(4, _sum_partially) == [[False, True]] * 4


def _share_nodes(rank: int, world_size: int) -> tuple[list[int], list[float], dict[str, str]]:
    """Runs two expert groups of three ranks each on nodes of two ranks: both share the middle node."""
    layout = Layout(ParallelismConfig(pipeline=2, data=3, expert=3), ranks_per_node=2)
    config = TwoHopDispatchConfig(
        kind="two_hop", payload="full", max_nodes=2, node_cap="verify", chunks=2, partial_sums="rows"
    )
    groups, observers = Groups(layout, mirrored=False, timeout_seconds=60.0), watching()
    ids_TK, rows_TD, weights_TK = _routing(rank, 9, torch.float64)
    with ThreadLane("comm") as lane:
        dispatcher = build_dispatcher(config, make_parts(_NUM_EXPERTS, layout, groups.expert, lane, observers))
        found = _go_round(dispatcher, ids_TK, rows_TD, weights_TK)
    local = _go_round(LocalDispatcher(_NUM_EXPERTS), ids_TK, rows_TD, weights_TK)
    pairs = [(found[index], local[index]) for index in (2, 4, 5)]
    far = [
        float((ours - theirs).abs().max())
        for ours, theirs in pairs
        if not torch.allclose(ours, theirs, rtol=1e-14, atol=1e-14)
    ]
    total = observers.traffic.take().total
    return [total.num_rows_across_nodes, total.min_rows_across_nodes], far, observers.log.order_hashes()


def test_expert_groups_may_begin_and_end_within_a_node() -> None:
    results = run_ranks(6, _share_nodes)
    assert [far for _, far, _ in results] == [[]] * 6
    for group in (results[:3], results[3:]):
        crossed, least = (sum(numbers) for numbers in zip(*(rows for rows, _, _ in group), strict=True))
        assert crossed == least > 0
        orders: dict[str, str] = {}
        for _, _, hashes in group:
            for name, order in hashes.items():
                assert orders.setdefault(name, order) == order


def _wrap(rank: int, world_size: int) -> tuple[list[str], bool, float]:
    """Compares wrapped two-hop dispatch with quantization and clipping alone."""
    layout = Layout(ParallelismConfig(pipeline=1, data=4, expert=4), ranks_per_node=2)
    config = TwoHopDispatchConfig(
        kind="two_hop", payload="fp8", max_nodes=1, node_cap="clip", chunks=2, partial_sums="rows"
    )
    observers, group = watching(), distributed.group.WORLD
    assert group is not None
    ids_TK, _, weights_TK = _routing(rank, 9, torch.float32)
    # Integers up to 8 are exact in e4m3, and so are all sums.
    rows_TD = torch.randint(-8, 9, (9, 24), generator=torch.Generator().manual_seed(rank)).float()
    nodes_E = nodes_of_experts(_NUM_EXPERTS, (0, 0, 1, 1))
    clipping = ClippingDispatcher(LocalDispatcher(_NUM_EXPERTS), nodes_E, 2, 1, ClipCount())
    kinds, results = [], []
    with ThreadLane("comm") as lane:
        built = build_dispatcher(config, make_parts(_NUM_EXPERTS, layout, group, lane, observers))
        for dispatcher in (built, Fp8Dispatcher(clipping)):
            kinds.append(type(dispatcher).__name__)
            handle = dispatcher.plan(ids_TK, weights_TK)
            arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
            combined_TD = dispatcher.combine(arrived.rows_AD, handle).wait()
            grads = dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A * 3, handle).wait()
            results.append((combined_TD, *grads))
    same = all(torch.allclose(one, other, rtol=1e-5) for one, other in zip(*results, strict=True))
    return kinds, same, observers.traffic.take().total.nodes_per_token


def test_built_dispatcher_quantizes_and_clips_around_two_hops() -> None:
    for kinds, same, nodes_per_token in run_ranks(4, _wrap):
        assert kinds == ["Fp8Dispatcher", "Fp8Dispatcher"]
        assert same
        assert nodes_per_token == 1


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
