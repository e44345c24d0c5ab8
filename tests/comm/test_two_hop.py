"""The two-hop dispatcher keeps laws beyond the contract of every dispatcher.

Shape legend: T tokens, K experts per token, D hidden size, A arrived rows."""

from typing import Literal

import pytest
import torch
from torch import Tensor, distributed

from comm.config import ParallelismConfig, TwoHopDispatchConfig
from comm.dispatch.build import Fp8Dispatcher, build_dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.traffic import ClipCount
from comm.groups import Groups
from comm.lane import ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher
from tests.comm.backends import Setting, make_parts, maker, watching
from tests.inline_lane import InlineLane
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
    numbers = (1, 5, 40)
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


@pytest.mark.slow
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
