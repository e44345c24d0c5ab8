"""Products of few rows equal those of many rows, for every number of rows that has a separate form."""

import pytest
import torch
from torch.nn import functional

from comm.dispatch.local import LocalDispatcher
from kernels.expert_mlp import expert_mlp
from kernels.few_rows import few_rows_experts, few_rows_linear


@pytest.mark.parametrize("num_rows", [1, 4, 5, 129])
@pytest.mark.parametrize(("num_outputs", "dtype"), [(48, torch.float64), (30, torch.float64), (48, torch.bfloat16)])
def test_linear_of_few_rows_is_linear(num_rows: int, num_outputs: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    # Rows of a wider matrix, as a split makes them.
    x_RI = torch.randn(num_rows, 50, generator=generator).to(dtype)[:, 3:43]
    weight_OI = torch.randn(num_outputs, 40, generator=generator).to(dtype)
    out_RO = few_rows_linear(x_RI, weight_OI)
    assert out_RO.is_contiguous()
    torch.testing.assert_close(out_RO, functional.linear(x_RI, weight_OI))


@pytest.mark.parametrize("num_tokens", [1, 7, 40])
def test_experts_of_few_rows_are_those_of_sorted_rows(num_tokens: int) -> None:
    generator = torch.Generator().manual_seed(num_tokens)
    rows_TD, gate_up_EHD, down_EDM, scores_TE = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((num_tokens, 24), (6, 32, 24), (6, 24, 16), (num_tokens, 6))
    )
    # No token chooses the last expert.
    weights_TK, ids_TK = scores_TE[:, :5].topk(3)
    dispatcher = LocalDispatcher(6)
    counts, order = dispatcher.local_order(dispatcher.plan(ids_TK))
    weights_A = order.copy_weights(weights_TK)
    out_AD, _ = expert_mlp(rows_TD, weights_A, gate_up_EHD, down_EDM, counts, order.tokens_A)
    made_TD = few_rows_experts(rows_TD, ids_TK, weights_TK, gate_up_EHD, down_EDM)
    torch.testing.assert_close(made_TD, order.sum_rows(out_AD))
