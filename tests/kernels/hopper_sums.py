"""Emulates how Hopper's tensor cores accumulate FP8 products, to measure the effect of promotion.

They align 32 products and the running sum to the largest exponent among them, and keep 14 bits of each
(arXiv:2412.19437, section 3.3.2, "increasing accumulation precision"). The emulation truncates the other bits instead
of rounding them, so a sum of numbers of one sign becomes too small, and more so with its length. The paper reports
nearly 2 % at worst for random operands and 4096 products, but not their distribution.

Shape legend: M rows of the left operand, N rows of the right one, K numbers in a row of both, R rows processed at a
time, P products added at once (32).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

PRODUCTS = 32
KEPT_BITS = 14
CHUNK_NUMBERS = 2**20


class AccumulationErrors(NamedTuple):
    """Errors caused by accumulation alone, relative to the root mean square of the results.

    Attributes:
        random: largest error if operands are standard normal.
        same_sign: largest error if they are uniform in [0, 1), so that nothing cancels.
    """

    random: float
    same_sign: float


def accumulate(left_MK: Tensor, right_NK: Tensor, promotion: int | None) -> Tensor:
    """Computes `left right^T` of codes as Hopper's tensor cores accumulate it.

    After every `promotion` products, a multiple of 32, the running sum is added to a float32 sum; None: never.
    """
    missing = -left_MK.shape[1] % PRODUCTS
    left_MK, right_NK = (functional.pad(operand.double(), (0, missing)) for operand in (left_MK, right_NK))
    out_MN = left_MK.new_zeros(len(left_MK), len(right_NK), dtype=torch.float32)
    chunk_rows = max(1, CHUNK_NUMBERS // max(1, len(right_NK) * PRODUCTS))
    for first in range(0, len(left_MK), chunk_rows):
        chunk = slice(first, first + chunk_rows)
        out_MN[chunk] = _accumulate_rows(left_MK[chunk], right_NK, promotion)
    return out_MN


def accumulation_errors(depth: int, promotion: int | None, size: int = 16) -> AccumulationErrors:
    """Measures errors of `accumulate` against exact sums of `depth` products of the same codes."""
    generator = torch.Generator().manual_seed(0)
    random = _error(torch.randn(2, size, depth, generator=generator), promotion)
    return AccumulationErrors(random, _error(torch.rand(2, size, depth, generator=generator), promotion))


def _error(operands: Tensor, promotion: int | None) -> float:
    left, right = ((each / each.abs().amax() * 448).to(torch.float8_e4m3fn) for each in operands)
    exact_MN = left.double() @ right.double().t()
    error_MN = accumulate(left, right, promotion).double() - exact_MN
    return float(error_MN.abs().amax() / exact_MN.square().mean().sqrt())


def _accumulate_rows(left_RK: Tensor, right_NK: Tensor, promotion: int | None) -> Tensor:
    promoted_RN = left_RK.new_zeros(len(left_RK), len(right_NK), dtype=torch.float32)
    running_RN = left_RK.new_zeros(promoted_RN.shape)
    for first in range(0, left_RK.shape[1], PRODUCTS):
        chunk = slice(first, first + PRODUCTS)
        products_RNP = left_RK[:, None, chunk] * right_NK[None, :, chunk]
        unit_RN = _unit(torch.maximum(products_RNP.abs().amax(2), running_RN.abs()))
        aligned_RN = (products_RNP / unit_RN[:, :, None]).trunc().sum(2) + (running_RN / unit_RN).trunc()
        running_RN = aligned_RN * unit_RN
        kept_RN = _unit(running_RN.abs())
        running_RN = (running_RN / kept_RN).trunc() * kept_RN
        if promotion is not None and (first + PRODUCTS) % promotion == 0:
            promoted_RN += running_RN.float()
            running_RN = torch.zeros_like(running_RN)
    return promoted_RN + running_RN.float()


def _unit(magnitudes: Tensor) -> Tensor:
    """Returns for each magnitude the value of the last bit that is kept."""
    return torch.ldexp(torch.ones_like(magnitudes), torch.frexp(magnitudes).exponent - KEPT_BITS)
