"""The contract of every dispatcher, checked on real ranks against loops over tokens.

Shape legend: T tokens, K experts per token, D hidden size, A arrived rows.
"""

import traceback
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, distributed

from comm.all_to_all import AllToAllDispatcher, DispatchError
from comm.config import ParallelismConfig
from comm.lane import InlineLane, Lane, ThreadLane
from comm.layout import Layout
from comm.local import LocalDispatcher
from comm.protocol import Dispatcher
from comm.traffic import Traffic
from tests.ranks import run_ranks

_NUM_EXPERTS = 8
_CASES = ("even", "uneven", "empty_rank", "one_rank", "unused_expert", "no_token")


@dataclass(frozen=True)
class Routing:
    """One rank's part of a case; every rank can make every rank's."""

    ids_TK: Tensor
    rows_TD: Tensor
    weights_TK: Tensor


def _routing(case: str, rank: int, world_size: int, dtype: torch.dtype = torch.float64, size: int = 5) -> Routing:
    """Small integers, so that every sum is exact in every type and order."""
    generator = torch.Generator().manual_seed(100 * _CASES.index(case) + rank)
    num_tokens = {"uneven": 3 + 7 * rank, "empty_rank": 0 if rank == world_size - 1 else 9, "no_token": 0}.get(case, 12)
    chance = torch.rand(num_tokens, _NUM_EXPERTS, generator=generator)
    if case == "one_rank":
        chance[:, 2:] = -1.0  # experts 0 and 1 are on rank 0 in every world tested
    if case == "unused_expert":
        chance[:, 3] = -1.0
    rows_TD = torch.randint(-8, 9, (num_tokens, size), generator=generator).to(dtype)
    weights_TK = torch.randint(-8, 9, (num_tokens, 2), generator=generator).double()
    return Routing(chance.topk(2, -1).indices, rows_TD, weights_TK)


def _copies(case: str, rank: int, world_size: int) -> list[tuple[int, int, int]]:
    """(source rank, token, choice) of each row that reaches `rank`: by expert, then source, then token."""
    num_local = _NUM_EXPERTS // world_size
    found = []
    for source in range(world_size):
        for token, ids in enumerate(_routing(case, source, world_size).ids_TK.tolist()):
            for choice, expert in enumerate(ids):
                if expert // num_local == rank:
                    found.append((expert, source, token, choice))
    return [(source, token, choice) for _, source, token, choice in sorted(found)]


@dataclass(frozen=True)
class Bench:
    """What a law works with on one rank."""

    make: Callable[[Lane], Dispatcher]
    lane: Lane
    rank: int
    world_size: int

    def dispatcher(self) -> Dispatcher:
        return self.make(self.lane)


def _specified_rows(bench: Bench, case: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What must arrive at this rank."""
    parts = [_routing(case, source, bench.world_size, dtype) for source in range(bench.world_size)]
    copies = _copies(case, bench.rank, bench.world_size)
    rows = [parts[source].rows_TD[token] for source, token, _ in copies]
    weights = [parts[source].weights_TK[token, choice] for source, token, choice in copies]
    empty = parts[0].rows_TD.new_zeros(0, parts[0].rows_TD.shape[1])
    return (torch.stack(rows) if rows else empty), torch.tensor([float(weight) for weight in weights]).double()


def law_rows_arrive_as_specified(bench: Bench) -> None:
    dispatcher = bench.dispatcher()
    results = []
    for case in _CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            mine = _routing(case, bench.rank, bench.world_size, dtype)
            handle = dispatcher.plan(mine.ids_TK)
            assert handle.num_tokens == len(mine.rows_TD)
            results.append((case, dtype, dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()))
    for case, dtype, arrived in results:
        rows_AD, weights_A = _specified_rows(bench, case, dtype)
        assert arrived.rows_AD.dtype == dtype
        assert torch.equal(arrived.rows_AD, rows_AD), case
        assert torch.equal(arrived.weights_A, weights_A), case
        num_local = _NUM_EXPERTS // bench.world_size
        ids = [_routing(case, source, bench.world_size).ids_TK.flatten() for source in range(bench.world_size)]
        counts_E = torch.bincount(torch.cat(ids), minlength=_NUM_EXPERTS)
        assert list(arrived.counts) == counts_E[bench.rank * num_local :][:num_local].tolist(), case


def law_combine_sums_each_token_s_experts(bench: Bench) -> None:
    """An expert that multiplies by its number plus one makes token t's sum its row times a known factor."""
    dispatcher = bench.dispatcher()
    num_local = dispatcher.num_local_experts
    results = []
    for case in _CASES:
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            mine = _routing(case, bench.rank, bench.world_size, dtype)
            handle = dispatcher.plan(mine.ids_TK)
            arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
            factors = torch.arange(num_local) + bench.rank * num_local + 1
            factor_A = factors.repeat_interleave(torch.tensor(arrived.counts)).to(dtype)
            combined = dispatcher.combine(arrived.rows_AD * factor_A[:, None], handle).wait()
            results.append((mine, dtype, combined))
    for mine, dtype, combined_TD in results:
        factor_T = (mine.ids_TK + 1).sum(1).to(dtype)
        assert combined_TD.dtype == dtype
        assert torch.equal(combined_TD, mine.rows_TD * factor_T[:, None])


def law_backwards_are_adjoint(bench: Bench) -> None:
    """<dispatch x, y> = <x, dispatch_backward y>, likewise for weights and for combine; summed over ranks, exact."""
    dispatcher = bench.dispatcher()
    totals = []
    for case in _CASES:
        mine = _routing(case, bench.rank, bench.world_size)
        handle = dispatcher.plan(mine.ids_TK)
        arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
        generator = torch.Generator().manual_seed(bench.rank)
        rows_AD = torch.randint(-8, 9, arrived.rows_AD.shape, generator=generator).double()
        weights_A = torch.randint(-8, 9, arrived.weights_A.shape, generator=generator).double()
        rows_TD, weights_TK = dispatcher.dispatch_backward(rows_AD, weights_A, handle).wait()
        combined_TD = dispatcher.combine(rows_AD, handle).wait()
        copied_AD = dispatcher.combine_backward(mine.rows_TD, handle).wait()
        sides = [
            ((arrived.rows_AD * rows_AD).sum(), (mine.rows_TD * rows_TD).sum()),
            ((arrived.weights_A * weights_A).sum(), (mine.weights_TK * weights_TK).sum()),
            ((combined_TD * mine.rows_TD).sum(), (rows_AD * copied_AD).sum()),
        ]
        totals.append(torch.tensor([[float(side) for side in pair] for pair in sides], dtype=torch.float64))
    total = torch.stack(totals)
    distributed.all_reduce(total)
    assert torch.equal(total[..., 0], total[..., 1])
    assert total[0].abs().min() > 0


def law_handles_are_independent_and_reusable(bench: Bench) -> None:
    """All plans, then all dispatches, then everything back in reverse order, then all again: the same results."""
    dispatcher = bench.dispatcher()
    mine = [_routing(case, bench.rank, bench.world_size) for case in _CASES]
    handles = [dispatcher.plan(routing.ids_TK) for routing in mine]
    rounds = []
    for _ in range(2):
        works = [
            dispatcher.dispatch(routing.rows_TD, routing.weights_TK, handle)
            for routing, handle in zip(mine, handles, strict=True)
        ]
        arrived = [work.wait() for work in works]
        pairs = list(zip(arrived, handles, strict=True))[::-1]
        combined = [dispatcher.combine(part.rows_AD, handle) for part, handle in pairs]
        grads = [dispatcher.dispatch_backward(part.rows_AD, part.weights_A, handle) for part, handle in pairs]
        rounds.append((arrived, [work.wait() for work in combined], [work.wait() for work in grads]))
    for case, part, routing, summed, grad in zip(
        _CASES, rounds[0][0], mine, rounds[0][1][::-1], rounds[0][2][::-1], strict=True
    ):
        assert torch.equal(part.rows_AD, _specified_rows(bench, case, torch.float64)[0])
        assert torch.equal(summed, 2 * routing.rows_TD)
        assert torch.equal(grad[0], 2 * routing.rows_TD)
        assert torch.equal(grad[1], routing.weights_TK)
    for first, second in zip(rounds[0][0], rounds[1][0], strict=True):
        assert torch.equal(first.rows_AD, second.rows_AD)
    assert all(torch.equal(first, second) for first, second in zip(rounds[0][1], rounds[1][1], strict=True))


def law_results_are_bitwise_the_same_on_any_lane(bench: Bench) -> None:
    generator = torch.Generator().manual_seed(bench.rank)
    ids_TK = torch.rand(200, _NUM_EXPERTS, generator=generator).topk(4, -1).indices
    rows_TD = torch.randn(200, 33, generator=generator)
    weights_TK = torch.rand(200, 4, generator=generator)
    results = []
    for lane in (bench.lane, InlineLane(), bench.lane):
        dispatcher = bench.make(lane)
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        out_AD = torch.sin(arrived.rows_AD) * arrived.weights_A[:, None]
        combined = dispatcher.combine(out_AD, handle).wait()
        grads = dispatcher.dispatch_backward(out_AD, arrived.weights_A, handle).wait()
        results.append((arrived.rows_AD, combined, *grads))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))
    expected_TD = (torch.sin(rows_TD)[:, None].double() * weights_TK[:, :, None].double()).sum(1)
    torch.testing.assert_close(results[0][1].double(), expected_TD, rtol=1e-5, atol=1e-6)


def law_inputs_may_be_strided_and_results_carry_no_graph(bench: Bench) -> None:
    dispatcher = bench.dispatcher()
    mine = _routing("uneven", bench.rank, bench.world_size)
    handle = dispatcher.plan(mine.ids_TK.T.contiguous().T)
    rows_TD = mine.rows_TD.T.contiguous().T.requires_grad_()
    arrived = dispatcher.dispatch(rows_TD, mine.weights_TK.requires_grad_(), handle).wait()
    wide_AD = torch.cat([arrived.rows_AD, arrived.rows_AD], 1)[:, : rows_TD.shape[1]].requires_grad_()
    combined_TD = dispatcher.combine(wide_AD, handle).wait()
    ones_AD = torch.ones(1, 1, dtype=torch.float64).expand_as(wide_AD)
    ones_TD = dispatcher.dispatch_backward(ones_AD, arrived.weights_A, handle).wait()[0]
    assert torch.equal(arrived.rows_AD, _specified_rows(bench, "uneven", torch.float64)[0])
    assert torch.equal(combined_TD, 2 * mine.rows_TD)
    assert torch.equal(ones_TD, torch.full_like(mine.rows_TD, 2))
    assert not any(part.requires_grad for part in (arrived.rows_AD, arrived.weights_A, combined_TD, ones_TD))


_LAWS = {
    law.__name__.removeprefix("law_"): law
    for law in (
        law_rows_arrive_as_specified,
        law_combine_sums_each_token_s_experts,
        law_backwards_are_adjoint,
        law_handles_are_independent_and_reusable,
        law_results_are_bitwise_the_same_on_any_lane,
        law_inputs_may_be_strided_and_results_carry_no_graph,
    )
}


def _layout(world_size: int) -> Layout:
    return Layout(ParallelismConfig(pipeline=1, data=world_size, expert=world_size), ranks_per_node=2)


def _check_laws(rank: int, world_size: int, backend: str) -> dict[str, str]:
    """Failures by law."""
    group = distributed.new_group()

    def make(lane: Lane) -> Dispatcher:
        if backend == "local":
            return LocalDispatcher(_NUM_EXPERTS)
        return AllToAllDispatcher(group, _NUM_EXPERTS, _layout(world_size), lane, None)

    failures = {}
    with ThreadLane("comm") as lane:
        for name, law in _LAWS.items():
            try:
                law(Bench(make, lane, rank, world_size))
            except AssertionError:
                failures[name] = f"rank {rank}: {traceback.format_exc()}"
    return failures


@pytest.fixture(
    scope="module",
    params=[("local", 1), ("all_to_all", 1), ("all_to_all", 2), ("all_to_all", 4)],
    ids=lambda param: f"{param[0]}-{param[1]}",
)
def failures(request: pytest.FixtureRequest) -> list[dict[str, str]]:
    backend, world_size = request.param
    return run_ranks(world_size, _check_laws, backend)


@pytest.mark.parametrize("law", list(_LAWS))
def test_dispatcher_keeps_the_law(law: str, failures: list[dict[str, str]]) -> None:
    broken = [rank_failures[law] for rank_failures in failures if law in rank_failures]
    assert not broken, "\n".join(broken)


def _count_traffic(rank: int, world_size: int) -> tuple[object, object, str]:
    traffic = Traffic()
    group = distributed.new_group()
    mine = _routing("uneven", rank, world_size, torch.bfloat16)
    with ThreadLane("comm") as lane:
        dispatcher = AllToAllDispatcher(group, _NUM_EXPERTS, _layout(world_size), lane, traffic)
        handle = dispatcher.plan(mine.ids_TK)
        arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
        there = traffic.take()
        dispatcher.combine(arrived.rows_AD, handle).wait()
        back = traffic.take()
        message = ""
        try:
            AllToAllDispatcher(group, 6, _layout(world_size), lane, None)
        except DispatchError as error:
            message = str(error)
    return there, back, message


def test_traffic_counts_rows_bytes_and_nodes_as_enumerated() -> None:
    world_size, num_local = 4, 2
    results = run_ranks(world_size, _count_traffic)
    sent = torch.zeros(world_size, world_size, dtype=torch.int64)
    for rank in range(world_size):
        ids_TK = _routing("uneven", rank, world_size).ids_TK
        for expert in ids_TK.flatten().tolist():
            sent[rank, expert // num_local] += 1
        touched = sum(len({expert // num_local // 2 for expert in ids}) for ids in ids_TK.tolist())
        there = results[rank][0]
        assert (there.num_tokens, there.num_touched_nodes) == (len(ids_TK), touched)
        assert there.nodes_per_token == touched / len(ids_TK)
    for rank in range(world_size):
        for snapshot, rows, bytes_per_row in (
            (results[rank][0], sent[rank], 5 * 2 + 8),
            (results[rank][1], sent[:, rank], 5 * 2),
        ):
            within, across = int(rows[rank ^ 1]), int(rows[2 - rank // 2 * 2 :][:2].sum())
            assert snapshot.num_rows_kept == rows[rank]
            assert (snapshot.num_rows_within_node, snapshot.num_rows_across_nodes) == (within, across)
            assert snapshot.num_bytes_within_node == within * bytes_per_row
            assert snapshot.num_bytes_across_nodes == across * bytes_per_row
        assert results[rank][1].num_tokens == 0
        assert "must divide 6 routed experts, got 4 ranks" in results[rank][2]


def _fail_in_flight(rank: int, world_size: int) -> str:
    with ThreadLane("comm") as lane:
        dispatcher = AllToAllDispatcher(distributed.new_group(), _NUM_EXPERTS, _layout(world_size), lane, None)
        handle = dispatcher.plan(torch.tensor([[0, _NUM_EXPERTS]]))
        work = dispatcher.dispatch(torch.ones(1, 4), torch.ones(1, 2), handle)
        try:
            work.wait()
        except (RuntimeError, IndexError) as error:
            return str(error)
    return ""


def test_dispatch_raises_in_wait_what_went_wrong_on_the_lane() -> None:
    assert "index" in run_ranks(1, _fail_in_flight)[0]
