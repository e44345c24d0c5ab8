"""Plain readings of the kernels' formulas in float64 under ordinary autograd, and how near a kernel must come to them.

Shape legend: A rows, D hidden size, M intermediate size, E experts, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

BF16_STEP = 2.0**-8
"""Half the distance of neighboring bf16 numbers, relative to them: what one rounding may change."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns standard normal numbers, equal for every type except for rounding."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def strided(x: Tensor) -> Tensor:
    """Returns the same numbers as every second column of a wider tensor, whose first column is skipped."""
    wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
    wide[..., 1::2] = x
    return wide[..., 1::2]


def near(actual: Tensor, expected: Tensor, roundings: float, sums: float = 0.0, largest: float = 0.0) -> None:
    """Asserts the same shape, and values as close as the type of `actual` allows.

    Args:
        expected: float64.
        roundings: to the type, one after the other, of each number.
        sums: roundings of numbers as large as the largest, that were summed before.
        largest: largest magnitude of the summed numbers, if they may cancel; by default that of `expected`.
    """
    assert actual.shape == expected.shape
    unit = {torch.bfloat16: BF16_STEP, torch.float32: 2.0**-22, torch.float64: 2.0**-50}[actual.dtype]
    largest = max(largest, float(expected.abs().max()) if expected.numel() else 0.0)
    # A kernel's own sums are in float32 at least: their rounding is of the largest number's size.
    floor = largest * max(sums * unit, 2.0**-48 if actual.dtype == torch.float64 else 2.0**-19)
    torch.testing.assert_close(actual.double(), expected.double(), rtol=roundings * unit, atol=floor + 1e-300)


def rms_norm(x: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    """Computes x / sqrt(mean(x^2) + eps) * weight."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight_D


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes gate * sigmoid(gate) * up."""
    return gate / (1 + (-gate).exp()) * up


def expert_rows(
    rows_AD: Tensor, weights_A: Tensor, gate_up_EHD: Tensor, down_EDM: Tensor, counts: Sequence[int]
) -> Tensor:
    """Computes weight * down(swiglu(gate(row), up(row))), row by row, AD."""
    experts, width = [expert for expert, count in enumerate(counts) for _ in range(count)], down_EDM.shape[2]
    made = []
    for row_D, weight, expert in zip(rows_AD, weights_A, experts, strict=True):
        gate_M, up_M = gate_up_EHD[expert, :width] @ row_D, gate_up_EHD[expert, width:] @ row_D
        made.append(weight * (down_EDM[expert] @ swiglu(gate_M, up_M)))
    return torch.stack(made) if made else rows_AD.new_zeros(rows_AD.shape)


def cross_entropies(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Computes log(sum(exp(logits))) - logit of the target for each row, 0 if the target is negative, N."""
    chosen_N = logits_NV.gather(1, targets_N.clamp(min=0)[:, None])[:, 0]
    return torch.where(targets_N < 0, 0.0, logits_NV.logsumexp(1) - chosen_N)
