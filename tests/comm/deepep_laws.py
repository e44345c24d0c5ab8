"""The laws of a dispatcher as far as DeepEP's types go: rows in bfloat16 or as codes, weights in float32.

Rows and weights are small integers, so that every sum is exact in bfloat16.
Shape legend: T tokens, K experts per token, D hidden size, A arrived rows, B bytes of a row, L local experts.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, distributed

from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.node_cap import NodeCapError
from comm.dispatch.process_group import Observers
from comm.lane import InlineLane, Lane
from comm.protocol import Dispatcher, Label
from tests.comm.contract import CASES, NUM_CHOICES, Bench
from tests.comm.deep_ep_emulation import Emulation

HIDDEN = 256


@dataclass(frozen=True)
class Desk:
    """What a law works with on one rank: a bench of the contract, its device, and what is behind the dispatcher.

    capped: a dispatcher on the bench's lane that verifies so many nodes per token.
    """

    bench: Bench
    device: torch.device
    observers: Observers
    library: Any
    capped: Callable[[int], Dispatcher]

    def open(self, lane: Lane | None = None) -> Dispatcher:
        return self.bench.make(lane or self.bench.lane)

    def ids(self, case: str, place: int | None = None) -> Tensor:
        return self.bench.routing(case, self.bench.place if place is None else place).ids_TK.to(self.device)

    def rows(self, case: str, place: int | None = None) -> Tensor:
        place = self.bench.place if place is None else place
        return self.bench.routing(case, place, torch.bfloat16, HIDDEN).rows_TD.to(self.device)

    def weights(self, case: str, place: int | None = None) -> Tensor:
        place = self.bench.place if place is None else place
        return self.bench.routing(case, place).weights_TK.float().to(self.device)

    def arriving(self, case: str) -> tuple[Tensor, Tensor]:
        """Rows and weights that must arrive here, AD and A."""
        rows = [self.rows(case, source) for source in range(len(self.bench.nodes))]
        weights = [self.weights(case, source) for source in range(len(self.bench.nodes))]
        copies = self.bench.copies(case)
        rows_AD = [rows[source][token : token + 1] for source, token, _ in copies]
        weights_A = [weights[source][token, choice : choice + 1] for source, token, choice in copies]
        return torch.cat([rows[0][:0], *rows_AD]), torch.cat([weights[0].flatten()[:0], *weights_A])

    def integers(self, shape: torch.Size, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(-8, 9, shape, generator=generator).to(self.device)


def law_rows_arrive_as_specified(desk: Desk) -> None:
    """Each copy once, by expert, then source, then token, though DeepEP brings them in another order every time."""
    dispatcher = desk.open()
    assert dispatcher.num_local_experts == desk.bench.num_local
    results = []
    for case in CASES * 2:
        handle = dispatcher.plan(desk.ids(case))
        assert handle.num_tokens == len(desk.rows(case))
        results.append((case, dispatcher.dispatch(desk.rows(case), desk.weights(case), handle)))
    for case, work in results:
        arrived = work.wait()
        rows_AD, weights_A = desk.arriving(case)
        assert torch.equal(arrived.rows_AD, rows_AD), case
        assert torch.equal(arrived.weights_A, weights_A), case
        ids = torch.cat([desk.ids(case, source).flatten() for source in range(len(desk.bench.nodes))])
        counts_E = torch.bincount(ids[ids >= 0], minlength=desk.bench.num_experts)
        first = desk.bench.place * desk.bench.num_local
        assert list(arrived.counts) == counts_E[first : first + desk.bench.num_local].tolist(), case


def law_combine_sums_each_token_s_experts(desk: Desk) -> None:
    dispatcher = desk.open()
    first, num_local = desk.bench.place * desk.bench.num_local, desk.bench.num_local
    factors_L = torch.arange(first, first + num_local, device=desk.device) % 3 + 1
    for case in CASES:
        handle = dispatcher.plan(desk.ids(case))
        arrived = dispatcher.dispatch(desk.rows(case), desk.weights(case), handle).wait()
        factors_A = factors_L.repeat_interleave(torch.tensor(arrived.counts, device=desk.device))
        combined_TD = dispatcher.combine(arrived.rows_AD * factors_A[:, None].bfloat16(), handle).wait()
        factor_T = torch.where(desk.ids(case) < 0, 0, desk.ids(case) % 3 + 1).sum(1)
        assert combined_TD.dtype == torch.bfloat16
        assert torch.equal(combined_TD, desk.rows(case) * factor_T[:, None].bfloat16()), case


def law_backwards_are_adjoint(desk: Desk) -> None:
    """<dispatch x, y> = <x, dispatch_backward y>, likewise for weights and for combine; summed over ranks, exact."""
    dispatcher = desk.open()
    totals = []
    for case in CASES:
        handle = dispatcher.plan(desk.ids(case))
        arrived = dispatcher.dispatch(desk.rows(case), desk.weights(case), handle).wait()
        rows_AD = desk.integers(arrived.rows_AD.shape, desk.bench.place).bfloat16()
        weights_A = desk.integers(arrived.weights_A.shape, desk.bench.place).float()
        rows_TD, weights_TK = dispatcher.dispatch_backward(rows_AD, weights_A, handle).wait()
        combined_TD = dispatcher.combine(rows_AD, handle).wait()
        copied_AD = dispatcher.combine_backward(desk.rows(case), handle).wait()
        assert weights_TK.dtype == torch.float32
        assert not weights_TK[desk.ids(case) < 0].any()
        pairs = [
            (arrived.rows_AD, rows_AD, desk.rows(case), rows_TD),
            (arrived.weights_A, weights_A, desk.weights(case), weights_TK),
            (combined_TD, desk.rows(case), rows_AD, copied_AD),
        ]
        totals.append(torch.stack([(a.double() * b).sum() - (c.double() * d).sum() for a, b, c, d in pairs]))
        totals.append((arrived.rows_AD.double() * rows_AD).sum().expand(3))
    total = torch.stack(totals)
    distributed.all_reduce(total, group=desk.bench.group)
    assert not total[::2].any()
    assert total[1].all()


def law_handles_are_independent_and_reusable(desk: Desk) -> None:
    """All plans, then all dispatches, then everything back in reverse order, then all again: the same results."""
    dispatcher = desk.open()
    handles = {case: dispatcher.plan(desk.ids(case)) for case in CASES}
    for _ in range(2):
        works = {
            case: dispatcher.dispatch(desk.rows(case), desk.weights(case), handle) for case, handle in handles.items()
        }
        arrived = {case: work.wait() for case, work in works.items()}
        back = {
            case: (
                dispatcher.combine(arrived[case].rows_AD, handle),
                dispatcher.dispatch_backward(arrived[case].rows_AD, arrived[case].weights_A, handle),
                dispatcher.combine_backward(desk.rows(case), handle),
            )
            for case, handle in reversed(handles.items())
        }
        for case, (combined, gradients, copied) in back.items():
            served_TK = desk.ids(case) >= 0
            summed_TD = desk.rows(case) * served_TK.sum(1, keepdim=True).bfloat16()
            assert torch.equal(arrived[case].rows_AD, desk.arriving(case)[0])
            assert torch.equal(combined.wait(), summed_TD)
            assert torch.equal(gradients.wait()[0], summed_TD)
            assert torch.equal(gradients.wait()[1], desk.weights(case) * served_TK)
            assert torch.equal(copied.wait(), arrived[case].rows_AD)


def law_results_are_bitwise_the_same_on_any_lane(desk: Desk) -> None:
    """And every time, whatever order rows come in. Three roundings to bfloat16 lie between them and a float64 sum."""
    generator = torch.Generator().manual_seed(desk.bench.place)
    ids_TK = torch.rand(40, desk.bench.num_experts, generator=generator).topk(4, -1).indices.to(desk.device)
    rows_TD = torch.randn(40, HIDDEN, generator=generator).bfloat16().to(desk.device)
    weights_TK = torch.rand(40, 4, generator=generator).to(desk.device)
    results = []
    for lane in (desk.bench.lane, InlineLane(), desk.bench.lane):
        dispatcher = desk.open(lane)
        handle = dispatcher.plan(ids_TK)
        arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
        out_AD = (torch.sin(arrived.rows_AD) * arrived.weights_A[:, None]).bfloat16()
        combined = dispatcher.combine(out_AD, handle).wait()
        gradients = dispatcher.dispatch_backward(out_AD, arrived.weights_A, handle).wait()
        results.append((arrived.rows_AD, arrived.weights_A, combined, *gradients))
    for other in results[1:]:
        assert all(torch.equal(first, second) for first, second in zip(results[0], other, strict=True))
    term_TKD = (torch.sin(rows_TD)[:, None] * weights_TK[:, :, None]).bfloat16().double()
    bound_TD = 3 * 2**-8 * term_TKD.abs().sum(1)
    assert ((results[0][2].double() - term_TKD.sum(1)).abs() <= bound_TD).all()
    assert torch.equal(results[0][4], weights_TK)


def law_inputs_may_be_strided_and_results_carry_no_graph(desk: Desk) -> None:
    dispatcher, case = desk.open(), "uneven"
    handle = dispatcher.plan(desk.ids(case).T.contiguous().T)
    rows_TD = desk.rows(case).T.contiguous().T.requires_grad_()
    weights_TK = desk.weights(case).T.contiguous().T.requires_grad_()
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    wide_AD = torch.cat([arrived.rows_AD, arrived.rows_AD], 1)[:, :HIDDEN].requires_grad_()
    combined_TD = dispatcher.combine(wide_AD, handle).wait()
    ones_AD = torch.ones(1, 1, dtype=torch.bfloat16, device=desk.device).expand_as(wide_AD)
    ones_TD, back_TK = dispatcher.dispatch_backward(ones_AD, arrived.weights_A.requires_grad_(), handle).wait()
    copied_AD = dispatcher.combine_backward(rows_TD, handle).wait()
    assert torch.equal(arrived.rows_AD, desk.arriving(case)[0])
    assert torch.equal(arrived.weights_A, desk.arriving(case)[1])
    assert torch.equal(copied_AD, arrived.rows_AD)
    assert torch.equal(combined_TD, NUM_CHOICES * rows_TD)
    assert torch.equal(ones_TD, torch.full_like(rows_TD, NUM_CHOICES))
    assert torch.equal(back_TK, weights_TK)
    assert not any(part.requires_grad for part in (arrived.rows_AD, combined_TD, ones_TD, back_TK, copied_AD))


def law_codes_travel_bit_by_bit_and_mix_with_full_rows(desk: Desk) -> None:
    """Any bytes, NaN's codes among them; and one plan moves both types of rows, each by a handle of its own."""
    dispatcher = desk.open()
    for case in CASES:
        places = range(len(desk.bench.nodes))
        every = [desk.integers(torch.Size([len(desk.ids(case, place)), HIDDEN + 8]), place) for place in places]
        bytes_TB = (every[desk.bench.place] * 15 % 256).to(torch.uint8)
        handle = dispatcher.plan(desk.ids(case))
        arrived = dispatcher.dispatch(bytes_TB, desk.weights(case), handle).wait()
        summed_TD = dispatcher.combine(desk.arriving(case)[0], handle).wait()
        full_AD = dispatcher.combine_backward(desk.rows(case), handle).wait()
        bytes_AB = dispatcher.combine_backward(bytes_TB, handle).wait()
        expected = [(every[source][token] * 15 % 256).to(torch.uint8) for source, token, _ in desk.bench.copies(case)]
        assert torch.equal(arrived.rows_AD, torch.stack(expected) if expected else bytes_TB[:0]), case
        assert torch.equal(bytes_AB, arrived.rows_AD)
        assert torch.equal(full_AD, desk.arriving(case)[0])
        assert torch.equal(summed_TD, desk.rows(case) * (desk.ids(case) >= 0).sum(1, keepdim=True).bfloat16())


def law_quantised_rows_are_what_the_wrapper_makes_of_them(desk: Desk) -> None:
    """Integers up to 8 are codes as they are, so FP8 changes nothing and all of its path shows."""
    dispatcher = Fp8Dispatcher(desk.open())
    for case in ("uneven", "dropped"):
        handle = dispatcher.plan(desk.ids(case))
        arrived = dispatcher.dispatch(desk.rows(case), desk.weights(case), handle).wait()
        assert torch.equal(arrived.rows_AD, desk.arriving(case)[0])
        assert torch.equal(dispatcher.combine_backward(desk.rows(case), handle).wait(), arrived.rows_AD)


def law_one_layout_serves_a_plan(desk: Desk) -> None:
    """DeepEP exchanges counts, and the host waits for them, once for a plan."""
    if not isinstance(desk.library, Emulation):
        return
    dispatcher = desk.open()
    desk.library.calls.clear()
    handle = dispatcher.plan(desk.ids("even"))
    arrived = dispatcher.dispatch(desk.rows("even"), desk.weights("even"), handle).wait()
    dispatcher.combine(arrived.rows_AD, handle).wait()
    dispatcher.combine_backward(desk.rows("even"), handle).wait()
    dispatcher.dispatch_backward(arrived.rows_AD, arrived.weights_A, handle).wait()
    assert desk.library.calls == ["dispatch", "combine", "cached dispatch", "combine"]


def law_prediction_agrees_with_an_enumeration(desk: Desk) -> None:
    """Summed over ranks. Between nodes a row goes once to a node, to the sender's index there, and on to its ranks."""
    dispatcher, nodes = desk.open(), desk.bench.nodes
    desk.observers.traffic.take()
    handle = dispatcher.plan(desk.ids("dropped"), label=Label(layer=3, direction=0, micro_batch=1))
    arrived = dispatcher.dispatch(desk.rows("dropped"), desk.weights("dropped"), handle).wait()
    dispatcher.combine(arrived.rows_AD, handle).wait()
    found = desk.observers.traffic.take().layers[3]
    rows = (found.predicted_rows_across_nodes, found.predicted_rows_within_node)
    num_bytes = found.predicted_bytes_across_nodes + found.predicted_bytes_within_node
    planned = (found.num_tokens, found.num_touched_nodes, found.num_least_rows)
    numbers = torch.tensor([*planned, *rows, num_bytes], device=desk.device)
    distributed.all_reduce(numbers, group=desk.bench.group)
    tokens = touched = across = within = 0
    for source, home in enumerate(nodes):
        for ids in desk.ids("dropped", source).tolist():
            ranks = {expert // desk.bench.num_local for expert in ids if expert >= 0}
            tokens, touched = tokens + 1, touched + len({nodes[rank] for rank in ranks})
            across += len({nodes[rank] for rank in ranks} - {home})
            within += sum(rank % nodes.count(home) != source % nodes.count(home) for rank in ranks)
    bytes_per_row = 2 * HIDDEN + 8 * NUM_CHOICES
    rows_both_ways = [2 * across, 2 * across, 2 * within]
    assert numbers.tolist() == [tokens, touched, *rows_both_ways, 2 * (across + within) * bytes_per_row]


def law_the_cap_is_verified_on_all_ranks(desk: Desk) -> None:
    if len(set(desk.bench.nodes)) == 1:
        return
    dispatcher = desk.capped(1)
    home = desk.ids("one_node")
    wide = home.clone()
    if desk.bench.place == 0:
        wide[1] = torch.arange(NUM_CHOICES) * (desk.bench.num_experts // NUM_CHOICES)
    messages = []
    for ids_TK in (home, wide):
        handle = dispatcher.plan(ids_TK)
        try:
            dispatcher.dispatch(desk.rows("one_node"), desk.weights("one_node"), handle).wait()
        except NodeCapError as error:
            messages.append(str(error))
    assert len(messages) == 1
    assert ("token 1 (2 nodes)" if desk.bench.place == 0 else "rank 0 has 1 token") in messages[0]


LAWS: dict[str, Callable[[Desk], None]] = {
    name.removeprefix("law_"): law for name, law in list(globals().items()) if name.startswith("law_")
}
