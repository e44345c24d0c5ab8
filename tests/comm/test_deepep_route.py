"""Rows received in any order are sorted into expert order."""

from types import SimpleNamespace

import torch

from comm.dispatch.deepep.buffer import DeepEPRoute


def test_route_sorts_received_rows_by_expert_source_and_token() -> None:
    """Three rows of sources 7, 2 and 5 with two choices each; experts 0 and 1 are local."""
    handle = SimpleNamespace(
        num_recv_tokens_per_expert_list=[2, 2], recv_src_metadata=torch.tensor([[7, 0], [2, 0], [5, 0]])
    )
    route = DeepEPRoute.of(handle, torch.tensor([[1, 0], [-1, 1], [0, -1]]), 8)
    assert route.counts == (2, 2)
    assert route.order.tokens_A.tolist() == [2, 0, 1, 0]
    assert route.order.places_TK.tolist() == [[3, 1], [-1, 2], [0, -1]]
    rows_RD = torch.tensor([[10.0], [20.0], [30.0]])
    assert route.copy_rows(rows_RD).flatten().tolist() == [30, 10, 20, 10]
    assert route.order.sum_rows(torch.tensor([[1.0], [2.0], [4.0], [8.0]])).flatten().tolist() == [10, 4, 1]
    weights_RK = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert route.order.copy_weights(weights_RK).tolist() == [5, 2, 4, 1]
    assert route.order.restore_weights(torch.tensor([5.0, 2.0, 4.0, 1.0])).tolist() == [[1, 2], [0, 4], [5, 0]]
