"""The node cap finds tokens over it, keeps the right experts and has exact gradients.

Shape legend: T tokens, K experts per token, E experts, D hidden size, A arrived rows.
"""

import pytest
import torch
from torch import Tensor

from comm.dispatch.node_cap import (
    Clipped,
    ClippingDispatcher,
    NodeCapError,
    Renormalization,
    clip,
    nodes_of_experts,
    touched_nodes,
)
from comm.dispatch.traffic import ClipCount
from comm.lane import ThreadLane
from comm.protocol import Dispatcher, Label
from tests.comm.backends import Setting, maker, watching
from tests.inline_lane import InlineLane
from tests.ranks import run_ranks

_NUM_EXPERTS, _NUM_CHOICES, _HIDDEN = 16, 5, 6
_MEMBER_NODES = (7, 7, 9, 9, 10, 10, 11, 11)
_NODE_OF_E = nodes_of_experts(_NUM_EXPERTS, _MEMBER_NODES)
_NUM_NODES = 4
_NODES = (0, 1, 1, 2)  # of one expert each
_FEW, _MANY = [0, 1], [0, 1, 3]
_LABEL = Label(layer=2, direction=1, micro_batch=5)


def _ids(num_tokens: int, seed: int = 0) -> Tensor:
    """Returns distinct experts, one in seven of them dropped."""
    generator = torch.Generator().manual_seed(seed)
    ids_TK = torch.rand(num_tokens, _NUM_EXPERTS, generator=generator).topk(_NUM_CHOICES, -1).indices
    return ids_TK.masked_fill(torch.rand(ids_TK.shape, generator=generator) < 1 / 7, -1)


def _weights(num_tokens: int, seed: int = 0) -> Tensor:
    """Returns multiples of 1/8, so that nodes often tie and sums are exact."""
    generator = torch.Generator().manual_seed(100 + seed)
    return torch.randint(1, 9, (num_tokens, _NUM_CHOICES), generator=generator).double() / 8


def _kept_nodes(ids: list[int], weights: list[float], max_nodes: int) -> set[int]:
    """Computes the kept nodes by definition, token by token."""
    sums: dict[int, float] = {}
    for expert, weight in zip(ids, weights, strict=True):
        if expert >= 0:
            sums[expert // 4] = sums.get(expert // 4, 0.0) + weight
    return set(sorted(sums, key=lambda node: (-sums[node], node))[:max_nodes])


def test_touched_nodes_equal_sets_of_nodes() -> None:
    ids_TK = _ids(300)
    ids_TK[7] = -1
    touched_TN = touched_nodes(ids_TK, _NODE_OF_E, _NUM_NODES)
    sets = [{expert // 4 for expert in ids if expert >= 0} for ids in ids_TK.tolist()]
    assert [set(row.nonzero().flatten().tolist()) for row in touched_TN] == sets
    assert touched_nodes(ids_TK[:0], _NODE_OF_E, _NUM_NODES).shape == (0, _NUM_NODES)


def test_error_names_rank_exchange_tokens_and_valid_values() -> None:
    touched_T = torch.tensor([1, 4, 4, 2, 6, 5, 3])
    assert str(NodeCapError.of(3, Label(5, 1, 2), touched_T, 4)) == (
        "rank 3: dispatch of layer 5, direction 1, micro-batch 2: tokens 4 (6 nodes), 5 (5 nodes) touch more than "
        "dispatch.max_nodes=4 nodes; nearest valid: dispatch.max_nodes=6, or dispatch.node_cap=clip"
    )
    assert str(NodeCapError.of(0, None, touched_T, 5)).startswith("rank 0: dispatch: token 4 (6 nodes) touches more")
    assert "7 (2 nodes) and 12 more touch" in str(NodeCapError.of(0, None, torch.full((20,), 2), 1))


@pytest.mark.covering(1)
@pytest.mark.parametrize("max_nodes", [1, 2, 4])
@pytest.mark.parametrize("weighted", [True, False])
def test_clip_keeps_the_best_nodes_by_sum_of_weights_and_the_lower_of_equals(max_nodes: int, weighted: bool) -> None:
    ids_TK, weights_TK = _ids(400), _weights(400)
    clipped = clip(ids_TK, weights_TK if weighted else None, _NODE_OF_E, _NUM_NODES, max_nodes)
    counted = weights_TK if weighted else torch.ones_like(weights_TK)
    for token, (ids, weights) in enumerate(zip(ids_TK.tolist(), counted.tolist(), strict=True)):
        kept = _kept_nodes(ids, weights, max_nodes)
        assert clipped.ids_TK[token].tolist() == [expert if expert // 4 in kept else -1 for expert in ids]
        over = len({expert // 4 for expert in ids if expert >= 0}) > max_nodes
        assert bool(clipped.over_T[token]) == over
    assert clipped.over_T.any() == (max_nodes < 4)


def test_clip_and_touched_nodes_never_synchronize_with_the_host() -> None:
    """Uses meta tensors: an operation that needs a value would raise."""
    ids_TK, weights_TK = _ids(9).to("meta"), _weights(9).to("meta")
    node_of_E = _NODE_OF_E.to("meta")
    clipped = clip(ids_TK, weights_TK, node_of_E, _NUM_NODES, 2)
    renormalization = Renormalization(ids_TK >= 0, clipped.ids_TK >= 0, clipped.over_T)
    assert touched_nodes(ids_TK, node_of_E, _NUM_NODES).shape == (9, _NUM_NODES)
    assert renormalization.backward(renormalization.forward(weights_TK), weights_TK).shape == weights_TK.shape


def _renormalization(ids_TK: Tensor, clipped: Clipped) -> Renormalization:
    return Renormalization(ids_TK >= 0, clipped.ids_TK >= 0, clipped.over_T)


def test_renormalized_weights_keep_their_sum_and_other_tokens_stay_bitwise_equal() -> None:
    ids_TK = _ids(400)
    weights_TK = torch.rand(400, _NUM_CHOICES, generator=torch.Generator().manual_seed(1))
    ids_TK[0] = torch.tensor([0, 1, 4, 5, 6])
    weights_TK[0] = torch.inf  # 0 / 0 is NaN
    clipped = clip(ids_TK, weights_TK, _NODE_OF_E, _NUM_NODES, 2)
    made_TK = _renormalization(ids_TK, clipped).forward(weights_TK)
    over_T = clipped.over_T
    assert not over_T[0]
    assert 50 < over_T.sum() < 350
    assert torch.equal(made_TK[~over_T], weights_TK[~over_T])
    sums_T = torch.where(ids_TK >= 0, weights_TK, 0).double().sum(1)
    torch.testing.assert_close(torch.where(clipped.ids_TK >= 0, made_TK, 0).double().sum(1), sums_T, rtol=1e-6, atol=0)
    assert (made_TK > weights_TK)[over_T[:, None] & (clipped.ids_TK >= 0)].all()


def _reference_weights(weights_TK: Tensor, ids_TK: Tensor, clipped: Clipped) -> Tensor:
    """Computes the weights by definition, differentiable, token by token; 0 for choices that are not sent."""
    rows = []
    for token in range(len(ids_TK)):
        valid_K, kept_K = ids_TK[token] >= 0, clipped.ids_TK[token] >= 0
        kept = weights_TK[token] * kept_K
        rows.append(kept * (weights_TK[token] * valid_K).sum() / kept.sum() if clipped.over_T[token] else kept)
    return torch.stack(rows) if rows else weights_TK * 1


def test_token_whose_kept_weights_sum_to_zero_keeps_them() -> None:
    ids_TK = torch.tensor([[0, 4, 8], [0, 4, 8]])
    weights_TK = torch.zeros(2, 3)
    clipped = clip(ids_TK, weights_TK, _NODE_OF_E, _NUM_NODES, 1)
    own = _renormalization(ids_TK, clipped)
    gradients_TK = torch.tensor([[2.0, 0.0, 0.0], [3.0, 0.0, 0.0]])
    assert clipped.ids_TK.tolist() == [[0, -1, -1], [0, -1, -1]]
    assert torch.equal(own.forward(weights_TK), weights_TK)
    assert torch.equal(own.backward(gradients_TK, weights_TK), gradients_TK)


def _through(
    dispatcher: Dispatcher, first_expert: int, ids_TK: Tensor, rows_TD: Tensor, weights_TK: Tensor, grad_TD: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs experts that multiply by constants; returns the weighted sum and the gradients."""
    handle = dispatcher.plan(ids_TK, weights_TK, Label(1, 0, 0))
    arrived = dispatcher.dispatch(rows_TD, weights_TK, handle).wait()
    factor_E = _factors()[first_expert : first_expert + dispatcher.num_local_experts]
    factor_A1 = factor_E.repeat_interleave(torch.tensor(arrived.counts))[:, None]
    out_TD = dispatcher.combine(arrived.rows_AD * factor_A1 * arrived.weights_A[:, None], handle).wait()
    grad_AD = dispatcher.combine_backward(grad_TD, handle).wait()
    assert torch.equal(dispatcher.dispatch_again(rows_TD, handle).wait(), arrived.rows_AD)
    weights_A = (grad_AD * arrived.rows_AD * factor_A1).sum(1)
    back = dispatcher.dispatch_backward(grad_AD * factor_A1 * arrived.weights_A[:, None], weights_A, handle).wait()
    return out_TD, *back


def _factors() -> Tensor:
    return torch.linspace(0.5, 2.0, _NUM_EXPERTS, dtype=torch.float64)


def _batch(rank: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns ids, rows, weights and output gradients; the last rank has no token."""
    num_tokens = 0 if rank == 3 else 30 + 10 * rank
    generator = torch.Generator().manual_seed(rank)
    rows_TD, grad_TD = torch.randn(2, num_tokens, _HIDDEN, generator=generator, dtype=torch.float64)
    return _ids(num_tokens, rank), rows_TD, _weights(num_tokens, rank), grad_TD


def _expected(
    ids_TK: Tensor, rows_TD: Tensor, weights_TK: Tensor, grad_TD: Tensor, node_of_E: Tensor, max_nodes: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the expected results with autograd over the dense definition."""
    rows_TD, weights_TK = rows_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
    clipped = clip(ids_TK, weights_TK, node_of_E, _NUM_NODES, max_nodes)
    made_TK = _reference_weights(weights_TK, ids_TK, clipped)
    out_TD = rows_TD * (made_TK * _factors()[clipped.ids_TK.clamp(min=0)]).sum(1, keepdim=True)
    grad_rows_TD, grad_weights_TK = torch.autograd.grad(out_TD, (rows_TD, weights_TK), grad_TD)
    return out_TD.detach(), grad_rows_TD, grad_weights_TK


def _clip_on_ranks(rank: int, world_size: int, setting: Setting) -> tuple[tuple[Tensor, ...], int, int]:
    """Returns one rank's results, its clipped tokens, and the nodes that its tokens touch after clipping."""
    observers, count = watching(), ClipCount()
    inner = maker(setting, _NUM_EXPERTS, observers)(InlineLane())
    assert setting.max_nodes is not None
    dispatcher = ClippingDispatcher(inner, _NODE_OF_E, _NUM_NODES, setting.max_nodes, count)
    results = _through(dispatcher, rank * inner.num_local_experts, *_batch(rank))
    return results, count.take()[1], observers.traffic.take().total.num_touched_nodes


@pytest.mark.parametrize(("backend", "max_nodes"), [("all_to_all", 1), ("two_hop", 2)])
def test_clipping_dispatcher_on_ranks_equals_one_rank_and_keeps_the_cap(backend: str, max_nodes: int) -> None:
    """Each rank is a node. The wrapped dispatcher verifies the same cap."""
    ranks = run_ranks(4, _clip_on_ranks, Setting(backend, (0, 1, 2, 3), max_nodes=max_nodes))
    for rank, (results, num_clipped, num_touched) in enumerate(ranks):
        ids_TK, _, weights_TK, _ = batch = _batch(rank)
        clipped = clip(ids_TK, weights_TK, _NODE_OF_E, _NUM_NODES, max_nodes)
        for own, expected in zip(results, _expected(*batch, _NODE_OF_E, max_nodes), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-13)
        assert num_clipped == clipped.over_T.sum()
        assert num_touched == touched_nodes(clipped.ids_TK, _NODE_OF_E, _NUM_NODES).sum()


def _plan_thrice(rank: int, world_size: int, setting: Setting) -> list[str]:
    """Runs three plans with tokens over the cap on no rank, on rank 1, and on ranks 0 and 3."""
    over = {1: {1: [0, 2]}, 2: {0: [1], 3: [0, 1, 2]}}
    ends = []
    with ThreadLane("comm") as lane:
        dispatcher = maker(setting, len(_NODES), watching())(lane)
        for number in range(3):
            tokens = over.get(number, {}).get(rank, [])
            # An id of -1 touches no node; without it these tokens would touch as many as the others.
            ids_TK = torch.tensor([_MANY if token in tokens else [*_FEW, -1] for token in range(3)])
            handle = dispatcher.plan(ids_TK, None, _LABEL)
            try:
                dispatcher.dispatch(torch.ones(3, 4), torch.ones(3, 3), handle).wait()
                ends.append("")
            except NodeCapError as error:
                ends.append(str(error))
    return ends


@pytest.mark.parametrize("backend", ["all_to_all", "two_hop"])
def test_token_over_the_cap_ends_its_plan_on_all_ranks(backend: str) -> None:
    setting = Setting(backend, _NODES, {"chunks": 2}, max_nodes=2)
    first, second, third = zip(*run_ranks(len(_NODES), _plan_thrice, setting), strict=True)
    assert set(first) == {""}
    of = f"dispatch of {_LABEL}: "
    assert second[1] == (
        f"rank 1: {of}tokens 0 (3 nodes), 2 (3 nodes) touch more than dispatch.max_nodes=2 nodes; "
        "nearest valid: dispatch.max_nodes=3, or dispatch.node_cap=clip"
    )
    for rank in (0, 2, 3):
        assert second[rank] == (
            f"rank {rank}: {of}rank 1 has 2 tokens that touch more than dispatch.max_nodes=2 nodes; "
            "its own message names them"
        )
    assert third[0].startswith(f"rank 0: {of}token 1 (3 nodes) touches more")
    assert third[3].startswith(f"rank 3: {of}tokens 0 (3 nodes), 1 (3 nodes), 2 (3 nodes) touch more")
    for rank in (1, 2):
        assert third[rank] == (
            f"rank {rank}: {of}rank 0 has 1 token that touches more than dispatch.max_nodes=2 nodes; "
            "its own message names them, and 1 more rank has some"
        )
