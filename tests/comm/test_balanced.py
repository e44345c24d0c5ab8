"""Rows of hot experts go to copies on other ranks: results, gradients and counters are those without copies."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, distributed

from comm.balance.rows import Ints, RowPlan
from comm.dispatch.balanced import BalancedDispatcher, SlotLayout
from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import LayerTraffic
from comm.lane import ThreadLane
from comm.protocol import Label
from tests.comm.backends import Setting, maker, watching
from tests.ranks import run_ranks

NODES = (0, 0, 1, 1)
NUM_EXPERTS = 8
NUM_SLOTS = 2
NUM_TOKENS = 40


def plan_evenly(counts_RE: Ints, nodes: Sequence[int], num_slots: int, *, across: bool) -> RowPlan:
    """Copies the hottest experts into every slot; all copies and the expert take equal parts of a source's rows."""
    num_local = counts_RE.shape[1] // len(nodes)
    hottest = (-counts_RE.sum(0)).argsort(kind="stable").tolist()
    slots = []
    for rank, node in enumerate(nodes):
        homes = {expert: expert // num_local for expert in hottest if counts_RE[:, expert].any()}
        able = [e for e, home in homes.items() if home != rank and (across or nodes[home] == node)]
        slots.append((able + [-1] * num_slots)[:num_slots])
    shares = {expert: 1 + sum(expert in row for row in slots) for row in slots for expert in row}
    counts = counts_RE.tolist()
    rows = [[[0 if e < 0 else source[e] // shares[e] for source in counts] for e in row] for row in slots]
    return RowPlan(slots, np.array(rows), [], 0)


@dataclass(frozen=True)
class Passed:
    """What one rank got: sums of its tokens, gradients of rows, weights and experts, rows served, and traffic."""

    combined_TD: Tensor
    rows_TD: Tensor
    weights_TK: Tensor
    experts_LD: Tensor
    num_rows: int
    num_copied_rows: int
    traffic: LayerTraffic


def routing(rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ids of which most are of few experts, rows and weights; all are integers, so that sums are exact."""
    generator = torch.Generator().manual_seed(rank)
    chance_TE = torch.rand(NUM_TOKENS, NUM_EXPERTS, generator=generator)
    chance_TE[:, 1] += 0.8
    chance_TE[:, 6] += 0.5
    ids_TK = chance_TE.topk(2, -1).indices
    ids_TK[torch.rand(ids_TK.shape, generator=generator) < 0.1] = -1
    rows_TD = torch.randint(-8, 9, (NUM_TOKENS, 5), generator=generator).double()
    return ids_TK, rows_TD, torch.randint(-8, 9, ids_TK.shape, generator=generator).double()


def send(rank: int, world_size: int, kind: str, across: bool, balanced: bool) -> Passed:
    setting = Setting(kind, NODES, {"chunks": 2})
    observers = watching()
    group = distributed.group.WORLD
    assert group is not None
    layout = SlotLayout(NUM_EXPERTS, NODES, NUM_SLOTS, 2 if across else None)
    with ThreadLane("comm") as lane:
        num_slots = layout.num_all if balanced else NUM_EXPERTS
        inner = maker(setting, num_slots, observers)(lane)
        ids_TK, rows_TD, weights_TK = routing(rank)
        experts_LD = torch.arange(1.0, 1 + NUM_EXPERTS).double().view(world_size, -1, 1)[rank].repeat(1, 5)
        dispatcher = BalancedDispatcher(
            inner,
            ExchangeGroup("expert", group, setting.layout, observers),
            layout,
            lambda counts_RE: plan_evenly(counts_RE, NODES, NUM_SLOTS, across=across),
            lane,
            observers.traffic,
        )
        used = dispatcher if balanced else inner
        handle = used.plan(ids_TK, weights_TK, Label(3, 0, 0))
        arrived = used.dispatch(rows_TD, weights_TK, handle).wait()
        weights_SD = torch.full((NUM_SLOTS, 5), torch.nan, dtype=torch.float64)
        if balanced:
            dispatcher.copy_weights([experts_LD], [weights_SD], handle).wait()
            assert dispatcher.has_copies(handle)
        all_experts = torch.cat([experts_LD, weights_SD])[: len(arrived.counts)]
        counts = torch.tensor(arrived.counts)
        factors_AD = all_experts.repeat_interleave(counts, 0)
        combined = used.combine(arrived.rows_AD * factors_AD * arrived.weights_A[:, None], handle)
        back_AD = used.combine_backward(rows_TD + 1, handle).wait()
        grad_rows_AD = back_AD * factors_AD * arrived.weights_A[:, None]
        grad_weights_A = (back_AD * factors_AD * arrived.rows_AD).sum(1)
        grads = used.dispatch_backward(grad_rows_AD, grad_weights_A, handle)
        parts = (back_AD * arrived.rows_AD * arrived.weights_A[:, None]).split(arrived.counts)
        gradients = torch.stack([part.sum(0) for part in parts])
        num_local = len(experts_LD)
        gradient_LD = gradients[:num_local].clone()
        if balanced:
            for expert, gradient in dispatcher.return_gradients(gradients[num_local:], handle).wait():
                gradient_LD[expert] += gradient
        num_copied = int(counts[num_local:].sum())
        passed = (combined.wait(), *grads.wait(), gradient_LD, int(counts.sum()), num_copied)
        used.close()
    return Passed(*passed, observers.traffic.take().total)


@pytest.mark.parametrize(("kind", "across"), [("all_to_all", True), ("two_hop", False), ("two_hop", True)])
def test_copies_give_the_results_of_experts(kind: str, across: bool) -> None:
    plain = run_ranks(4, send, kind, across, False)
    balanced = run_ranks(4, send, kind, across, True)
    for rank, (one, other) in enumerate(zip(plain, balanced, strict=True)):
        for name in ("combined_TD", "rows_TD", "weights_TK", "experts_LD"):
            assert torch.equal(getattr(one, name), getattr(other, name)), f"rank {rank}: {name}"
        traffic = other.traffic
        assert traffic.predicted_bytes_across_nodes == traffic.num_bytes_across_nodes
        assert traffic.predicted_bytes_within_node == traffic.num_bytes_within_node
    # Every choice is served once, and the copies take rows off the fullest rank.
    assert sum(one.num_rows for one in plain) == sum(other.num_rows for other in balanced)
    assert sum(other.num_copied_rows for other in balanced) > 20
    assert max(other.num_rows for other in balanced) < max(one.num_rows for one in plain)


def test_copies_across_nodes_keep_each_token_within_the_cap() -> None:
    """Without the cap, copies of one expert of a token would lie on another node than its second expert."""
    layout = SlotLayout(NUM_EXPERTS, NODES, NUM_SLOTS, 1)
    ids_TK = torch.tensor([[0, 1], [0, -1], [-1, 0], [2, 0]])
    none = [[0] * 4] * 2
    plan = RowPlan([[-1, -1], [-1, -1], [-1, 0], [-1, -1]], np.array([none, none, [[0] * 4, [3] * 4], none]), [], 0)
    slots_TK = layout.choose(ids_TK, layout.route(plan, 0))
    # Three rows of expert 0 go to rank 2, whose first slot for copies is its third: 2 * 4 + 2.
    assert slots_TK.tolist() == [[0, 1], [10, -1], [-1, 10], [4, 0]]
