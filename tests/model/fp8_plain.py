"""The formulas of a model in FP8 in float64, over operands that went through FP8 and back.

Each function quantizes float32 numbers and returns the values of the codes. Shape legend: A rows, K
inputs, N outputs, D normalized size, M intermediate size, H = 2 M.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.quantize.layout import GRADIENTS_MIN_AMAX, ROWS_MIN_AMAX, Quantized
from kernels.quantize.reference import (
    dequantize_1x128,
    dequantize_128x128,
    pack_e5m6,
    quantize_1x128,
    quantize_128x128,
    quantize_columns,
    unpack_e5m6,
)
from tests.model.against_plain import assert_near

TOLERANCE = 3e-3
"""Tolerance for a whole tensor if a model computes in float32. Float32 rounds far less, but may move a number across a
rounding tie: one of thousands of codes then differs, by up to a sixteenth. Any other rule of rounding (no codes, other
tiles, other scales) changes all numbers by hundredths."""


def expect(made: Tensor | None, exact: Tensor, what: str) -> None:
    """Asserts closeness as for codes under the same rule."""
    assert made is not None, what
    assert_near(made.detach(), exact, TOLERANCE, what)


@dataclass(frozen=True, slots=True)
class InFp8:
    """Numbers after quantization. `power_of_two` is the rule of scales for which the recipe allows both."""

    power_of_two: bool

    def rows(self, values_AK: Tensor, *, rounds: bool = False) -> Tensor:
        """Returns an input, quantized in tiles of 128 columns.

        `rounds`: whether scales are powers of two independent of the rule.
        """
        return self._by_rows(values_AK, ROWS_MIN_AMAX, rounds)

    def gradient(self, values_AN: Tensor, *, rounds: bool = False) -> Tensor:
        """Returns an output's gradient, quantized, which may be small."""
        return self._by_rows(values_AN, GRADIENTS_MIN_AMAX, rounds)

    def weight(self, weight: Tensor) -> Tensor:
        """Returns a weight quantized in blocks of 128 x 128, NK or ENK."""
        return dequantize_128x128(
            quantize_128x128(weight.detach().float(), power_of_two=self.power_of_two), torch.float64
        )

    def columns(
        self, values_AK: Tensor, counts: Sequence[int], *, rounds: bool = False, is_gradient: bool = False
    ) -> list[Tensor]:
        """Returns rows quantized in tiles of 128 rows of a group, for each group."""
        min_amax = GRADIENTS_MIN_AMAX if is_gradient else ROWS_MIN_AMAX
        codes = quantize_columns(values_AK.float(), counts, power_of_two=rounds or self.power_of_two, min_amax=min_amax)
        values_PK = dequantize_1x128(Quantized(*codes), torch.float64).t()
        padded = values_PK.split([-(-count // 128) * 128 for count in counts])
        return [rows_PK[:count] for rows_PK, count in zip(padded, counts, strict=True)]

    def weight_gradient(self, grad_AN: Tensor, rows_AK: Tensor, *, rounds: bool = False) -> Tensor:
        """Returns the weight gradient of a map, NK, from both operands in tiles of 128 rows."""
        counts = (len(grad_AN),)
        (grad,), (rows,) = self.columns(grad_AN, counts, is_gradient=True), self.columns(rows_AK, counts, rounds=rounds)
        return grad.t() @ rows

    def _by_rows(self, values: Tensor, min_amax: float, rounds: bool) -> Tensor:
        codes = quantize_1x128(values.detach().float(), power_of_two=rounds or self.power_of_two, min_amax=min_amax)
        return dequantize_1x128(codes, torch.float64)


def in_12_bits(values_AK: Tensor) -> Tensor:
    """Numbers as E5M6 has them."""
    return unpack_e5m6(pack_e5m6(values_AK.float()), values_AK.shape[1], torch.float64)


@dataclass(frozen=True, slots=True)
class Normed:
    """A norm of which the backward knows the codes alone: kept_AD, and the inverse root mean squares."""

    kept_AD: Tensor
    inverse_A1: Tensor
    weight_D: Tensor

    @classmethod
    def of(cls, codes: InFp8, x_AD: Tensor, weight_D: Tensor, eps: float) -> "Normed":
        """Computes x over its root mean square, times the weight."""
        inverse_A1 = (x_AD.double().square().mean(1, keepdim=True) + eps).rsqrt()
        return cls(codes.rows(x_AD.double() * inverse_A1 * weight_D.double()), inverse_A1, weight_D.detach().double())

    def backward(self, grad_AD: Tensor) -> tuple[Tensor, Tensor]:
        """Returns gradients of x and of the weight; if the weight is 0, x over its root mean square counts as 0."""
        hat_AD = torch.where(self.weight_D == 0, 0.0, self.kept_AD / self.weight_D)
        mean_A1 = (grad_AD * self.kept_AD).mean(1, keepdim=True)
        return self.inverse_A1 * (grad_AD * self.weight_D - hat_AD * mean_A1), (grad_AD * hat_AD).sum(0)


@dataclass(frozen=True, slots=True)
class Gate:
    """Function silu(gate) * up, times a weight for each row, of hidden values AH."""

    hidden_AH: Tensor
    weights_A: Tensor | None = None

    @property
    def unweighted_AM(self) -> Tensor:
        """Output before the weight is applied."""
        gate_AM, up_AM = self.hidden_AH.chunk(2, 1)
        return gate_AM * gate_AM.sigmoid() * up_AM

    @property
    def out_AM(self) -> Tensor:
        """Input of the next map."""
        return self.unweighted_AM if self.weights_A is None else self.unweighted_AM * self.weights_A[:, None]

    def backward(self, grad_AM: Tensor) -> Tensor:
        """Returns the gradient of hidden values, AH."""
        gate_AM, up_AM = self.hidden_AH.chunk(2, 1)
        grad_AM = grad_AM if self.weights_A is None else grad_AM * self.weights_A[:, None]
        share_AM = gate_AM.sigmoid()
        slope_AM = share_AM * (1 + gate_AM * (1 - share_AM))
        return torch.cat([grad_AM * up_AM * slope_AM, grad_AM * gate_AM * share_AM], 1)
