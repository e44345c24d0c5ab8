"""Defines the contract of every dispatcher: laws that hold on the ranks of an expert group.

A law exchanges first and asserts afterwards, because a rank that failed in between would block the others.

Shape legend: T tokens, K experts per token, D hidden size, A arrived rows, E experts.
"""

import traceback

import torch
from torch import Tensor, distributed

from comm.dispatch.local import LocalDispatcher
from tests.comm.contract import CASES, NUM_CHOICES, Bench
from tests.inline_lane import InlineLane


def law_rows_arrive_as_specified(bench: Bench) -> None:
    """Checks that each copy arrives once, by expert, source and token, with its counts and weights."""
    dispatcher = bench.dispatcher()
    assert dispatcher.num_local_experts == bench.num_local
    results = []
    for case in CASES:
        for dtype in bench.row_types:
            mine = bench.mine(case, dtype)
            handle = dispatcher.plan(mine.ids_TK)
            assert handle.num_tokens == len(mine.rows_TD)
            results.append((case, dtype, dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle)))
    for case, dtype, work in results:
        arrived = work.wait()
        rows_AD, weights_A = bench.arriving(case, dtype)
        assert arrived.rows_AD.dtype == dtype
        assert arrived.rows_AD.is_contiguous()
        assert torch.equal(arrived.rows_AD, rows_AD), case
        assert torch.equal(arrived.weights_A, weights_A), case
        ids = torch.cat([bench.routing(case, source).ids_TK.flatten() for source in range(len(bench.nodes))])
        counts_E = torch.bincount(ids[ids >= 0], minlength=bench.num_experts)
        assert list(arrived.counts) == counts_E[bench.place * bench.num_local :][: bench.num_local].tolist(), case


def law_combine_sums_each_token_s_experts(bench: Bench) -> None:
    """Checks sums with experts that multiply rows by known factors."""
    dispatcher = bench.dispatcher()
    results = []
    for case in CASES:
        for dtype in bench.row_types:
            mine = bench.mine(case, dtype)
            handle = dispatcher.plan(mine.ids_TK)
            arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
            combined = dispatcher.combine(_times_expert(bench, arrived.rows_AD, arrived.counts), handle)
            results.append((case, mine, combined))
    for case, mine, work in results:
        combined_TD = work.wait()
        factor_T1 = (_factor(mine.ids_TK) * (mine.ids_TK >= 0)).sum(1, keepdim=True)
        assert combined_TD.dtype == mine.rows_TD.dtype
        assert torch.equal(combined_TD, mine.rows_TD * factor_T1.to(mine.rows_TD.dtype)), case


def law_backwards_are_adjoint(bench: Bench) -> None:
    """Checks <dispatch x, y> = <x, dispatch_backward y> exactly, also for weights and combine."""
    dispatcher = bench.dispatcher()
    totals, dropped = [], []
    for case in CASES:
        mine = bench.mine(case)
        handle = dispatcher.plan(mine.ids_TK)
        arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
        generator = torch.Generator().manual_seed(bench.place)
        rows_AD = torch.randint(-8, 9, arrived.rows_AD.shape, generator=generator).to(arrived.rows_AD)
        weights_A = torch.randint(-8, 9, arrived.weights_A.shape, generator=generator).to(arrived.weights_A)
        rows_TD, weights_TK = dispatcher.dispatch_backward(rows_AD, weights_A, handle).wait()
        combined_TD = dispatcher.combine(rows_AD, handle).wait()
        copied_AD = dispatcher.combine_backward(mine.rows_TD, handle).wait()
        dropped.append(weights_TK[mine.ids_TK < 0])
        sides = [
            (_dot(arrived.rows_AD, rows_AD), _dot(mine.rows_TD, rows_TD)),
            (_dot(arrived.weights_A, weights_A), _dot(mine.weights_TK, weights_TK)),
            (_dot(combined_TD, mine.rows_TD), _dot(rows_AD, copied_AD)),
        ]
        totals.append(torch.tensor(sides, dtype=torch.float64))
    total = torch.stack(totals).to(bench.device)
    distributed.all_reduce(total, group=bench.group)
    assert torch.equal(total[..., 0], total[..., 1])
    assert total[CASES.index("even")].abs().min() > 0
    assert not torch.cat(dropped).any()


def law_handles_are_independent_and_reusable(bench: Bench) -> None:
    """Checks that interleaved and repeated exchanges of several handles give the same results."""
    dispatcher = bench.dispatcher()
    mine = [bench.mine(case) for case in CASES]
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
        CASES, rounds[0][0], mine, rounds[0][1][::-1], rounds[0][2][::-1], strict=True
    ):
        served_TK = routing.ids_TK >= 0
        summed_TD = routing.rows_TD * served_TK.sum(1, keepdim=True)
        assert torch.equal(part.rows_AD, bench.arriving(case)[0])
        assert torch.equal(summed, summed_TD)
        assert torch.equal(grad[0], summed_TD)
        assert torch.equal(grad[1], routing.weights_TK * served_TK)
    for first, second in zip(rounds[0][0], rounds[1][0], strict=True):
        assert torch.equal(first.rows_AD, second.rows_AD)
    assert all(torch.equal(first, second) for first, second in zip(rounds[0][1], rounds[1][1], strict=True))


def law_results_are_bitwise_the_same_on_any_lane(bench: Bench) -> None:
    """Checks that results are bitwise equal on any lane and in every run."""
    dtype = torch.float32 if torch.float64 in bench.row_types else bench.row_type
    hidden_size = 33 if bench.hidden_size < 33 else bench.hidden_size
    generator = torch.Generator().manual_seed(bench.place)
    ids_TK = torch.rand(200, bench.num_experts, generator=generator).topk(4, -1).indices.to(bench.device)
    rows_TD = torch.randn(200, hidden_size, generator=generator).to(bench.device, dtype)
    weights_TK = torch.rand(200, 4, generator=generator).to(bench.device)
    results = []
    for lane in (bench.lane, InlineLane(), bench.lane):
        dispatcher = bench.make(lane)
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        out_AD = (torch.sin(arrived.rows_AD) * arrived.weights_A[:, None]).to(dtype)
        combined = dispatcher.combine(out_AD, handle).wait()
        grads = dispatcher.dispatch_backward(out_AD, arrived.weights_A, handle).wait()
        results.append((arrived.rows_AD, arrived.weights_A, combined, *grads))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))
    assert torch.equal(results[0][4], weights_TK)
    # The sum of four terms is rounded at most three times: on the expert's rank, on its node and on the token's rank.
    # In float32 the roundings of the terms may differ with their positions.
    term_TKD = (torch.sin(rows_TD)[:, None] * weights_TK[:, :, None]).to(dtype).double()
    num_roundings = 3 if dtype == torch.bfloat16 else 6
    bound_TD = num_roundings * torch.finfo(dtype).eps / 2 * term_TKD.abs().sum(1)
    assert ((results[0][2].double() - term_TKD.sum(1)).abs() <= bound_TD).all()


def law_outputs_equal_local(bench: Bench) -> None:
    """Checks results against one rank with all experts, in float64 up to the order of summation.

    A dispatcher without float64 is only tested with integers, by the other laws.
    """
    if torch.float64 not in bench.row_types:
        return
    results = []
    for dispatcher in (bench.dispatcher(), LocalDispatcher(bench.num_experts)):
        first = 0 if isinstance(dispatcher, LocalDispatcher) else bench.place * bench.num_local
        for case in CASES:
            generator = torch.Generator().manual_seed(bench.place)
            ids_TK = bench.mine(case).ids_TK
            rows_TD = torch.randn(len(ids_TK), 6, generator=generator, dtype=torch.float64)
            gradient_TD = torch.randn(len(ids_TK), 6, generator=generator, dtype=torch.float64)
            weights_TK = torch.rand(ids_TK.shape, generator=generator, dtype=torch.float64)
            handle = dispatcher.plan(ids_TK, weights_TK)
            arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
            experts = torch.arange(first, first + dispatcher.num_local_experts)
            angle_A1 = experts.repeat_interleave(torch.tensor(arrived.counts))[:, None]
            out_AD = torch.sin(arrived.rows_AD + angle_A1)
            combined_TD = dispatcher.combine(out_AD * arrived.weights_A[:, None], handle).wait()
            copied_AD = dispatcher.combine_backward(gradient_TD, handle).wait()
            back_AD = copied_AD * arrived.weights_A[:, None] * torch.cos(arrived.rows_AD + angle_A1)
            grads = dispatcher.dispatch_backward(back_AD, (copied_AD * out_AD).sum(1), handle).wait()
            results.append((combined_TD, *grads))
    for found, expected in zip(results[: len(CASES)], results[len(CASES) :], strict=True):
        for mine, local in zip(found, expected, strict=True):
            # Sums of K terms of size 1, each rounded to 2^-53.
            assert torch.allclose(mine, local, rtol=1e-14, atol=1e-14)


def law_inputs_may_be_strided_and_results_carry_no_graph(bench: Bench) -> None:
    """Checks ids, rows and weights with any strides, with and without gradients."""
    dispatcher = bench.dispatcher()
    mine = bench.mine("uneven")
    handle = dispatcher.plan(mine.ids_TK.T.contiguous().T)
    rows_TD = mine.rows_TD.T.contiguous().T.requires_grad_()
    weights_TK = mine.weights_TK.T.contiguous().T.requires_grad_()
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    wide_AD = torch.cat([arrived.rows_AD, arrived.rows_AD], 1)[:, : rows_TD.shape[1]].requires_grad_()
    combined_TD = dispatcher.combine(wide_AD, handle).wait()
    ones_AD = torch.ones(1, 1, dtype=bench.row_type, device=bench.device).expand_as(wide_AD)
    given_A = arrived.weights_A.clone().requires_grad_()
    ones_TD, back_TK = dispatcher.dispatch_backward(ones_AD, given_A, handle).wait()
    copied_AD = dispatcher.combine_backward(rows_TD, handle).wait()
    rows_AD, weights_A = bench.arriving("uneven")
    assert torch.equal(arrived.rows_AD, rows_AD)
    assert torch.equal(arrived.weights_A, weights_A)
    assert torch.equal(copied_AD, rows_AD)
    assert torch.equal(combined_TD, NUM_CHOICES * mine.rows_TD)
    assert torch.equal(ones_TD, torch.full_like(mine.rows_TD, NUM_CHOICES))
    assert torch.equal(back_TK, mine.weights_TK)
    results = (arrived.rows_AD, arrived.weights_A, combined_TD, ones_TD, back_TK, copied_AD)
    assert not any(part.requires_grad for part in results)


def law_rows_sent_again_arrive_like_the_first_time(bench: Bench) -> None:
    """Checks rows and opaque bytes after other exchanges of their handle; weights and counts are not sent again."""
    dispatcher = bench.dispatcher()
    width = bench.hidden_size + 8
    results = []
    for case in CASES:
        for dtype in bench.row_types:
            mine, codes = bench.mine(case, dtype), bench.mine(case, torch.int8, width)
            handle = dispatcher.plan(mine.ids_TK)
            arrived = dispatcher.dispatch(mine.rows_TD, mine.weights_TK, handle).wait()
            combined = dispatcher.combine(arrived.rows_AD, handle)
            again = dispatcher.dispatch_again(mine.rows_TD.detach().requires_grad_(), handle)
            bytes_again = dispatcher.dispatch_again(codes.rows_TD.view(torch.uint8), handle)
            combined.wait()
            results.append((case, dtype, arrived, again.wait(), bytes_again.wait()))
    for case, dtype, arrived, again_AD, bytes_AB in results:
        assert again_AD.dtype == dtype
        assert not again_AD.requires_grad
        assert again_AD.is_contiguous()
        assert torch.equal(again_AD, arrived.rows_AD), case
        assert torch.equal(bytes_AB.view(torch.int8), bench.arriving(case, torch.int8, width)[0]), case


def law_rows_of_bytes_travel_as_they_are(bench: Bench) -> None:
    """Checks opaque payloads that are wider than a row by two scales and contain codes of NaN."""
    dispatcher = bench.dispatcher()
    width = bench.hidden_size + 8
    results = []
    for case in CASES:
        mine = bench.mine(case, torch.int8, width)
        handle = dispatcher.plan(mine.ids_TK)
        bytes_TD = mine.rows_TD.view(torch.uint8)
        arrived = dispatcher.dispatch(bytes_TD, mine.weights_TK, handle).wait()
        results.append((case, arrived, dispatcher.combine_backward(bytes_TD, handle).wait()))
    for case, arrived, copied_AD in results:
        rows_AD, weights_A = bench.arriving(case, torch.int8, width)
        assert torch.equal(arrived.rows_AD.view(torch.int8), rows_AD)
        assert torch.equal(arrived.weights_A, weights_A)
        assert torch.equal(copied_AD, arrived.rows_AD)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _factor(experts: Tensor) -> Tensor:
    """Returns a factor so small that sums of products stay below 256, where bfloat16 is exact."""
    return experts % 10 + 1


def _times_expert(bench: Bench, rows_AD: Tensor, counts: tuple[int, ...]) -> Tensor:
    factors = _factor(torch.arange(bench.num_local) + bench.place * bench.num_local)
    return rows_AD * factors.repeat_interleave(torch.tensor(counts)).to(rows_AD)[:, None]


LAWS = {
    law.__name__.removeprefix("law_"): law
    for law in (
        law_rows_arrive_as_specified,
        law_combine_sums_each_token_s_experts,
        law_backwards_are_adjoint,
        law_handles_are_independent_and_reusable,
        law_results_are_bitwise_the_same_on_any_lane,
        law_outputs_equal_local,
        law_inputs_may_be_strided_and_results_carry_no_graph,
        law_rows_of_bytes_travel_as_they_are,
        law_rows_sent_again_arrive_like_the_first_time,
    )
}


def check_laws(bench: Bench) -> dict[str, str]:
    failures = {}
    for name, law in LAWS.items():
        try:
            law(bench)
        except AssertionError:
            failures[name] = f"place {bench.place}: {traceback.format_exc()}"
    return failures
