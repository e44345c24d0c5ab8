"""Rotary position embedding, interleaved pairs, with YaRN (arXiv:2309.00071; 2412.19437, section 4.3).

Shape legend: T positions, N tokens, P rotated pairs, R rotated values per head.
"""

import math
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor

from model.config import ModelConfig, PlainRope, YarnRope, yarn_temperature


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the radians per position of each pair, [R / 2]: theta^(-2k/R), interpolated by YaRN.

    In float32 each operation is rounded as in the released code, with which weights were trained: thousands of
    positions multiply an error in the last bit.
    """
    size = config.qk_rope_head_dim
    powers = config.rope_theta ** (torch.arange(0, size, 2).to(dtype) / size)
    match config.rope_scaling:
        case PlainRope():
            return 1 / powers
        case YarnRope() as yarn:

            def pair_with(rotations: float) -> float:
                wavelengths = yarn.original_max_position_tokens / (rotations * 2 * math.pi)
                return size * math.log(wavelengths) / (2 * math.log(config.rope_theta))

            low = max(math.floor(pair_with(yarn.beta_fast)), 0)
            high = min(math.ceil(pair_with(yarn.beta_slow)), size - 1)
            pairs = torch.arange(size // 2, dtype=dtype)
            kept = 1 - ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
            return 1 / (yarn.factor * powers) * (1 - kept) + 1 / powers * kept
        case _ as other:
            assert_never(other)


def _temperatures(config: ModelConfig) -> tuple[float, float]:
    """Returns YaRN's temperatures of cos and sin, before the division by that of scores, and of scores."""
    match config.rope_scaling:
        case YarnRope(factor=factor, mscale=mscale, mscale_all_dim=all_dim):
            return yarn_temperature(factor, mscale), yarn_temperature(factor, all_dim)
        case _:
            return 1.0, 1.0


def softmax_scale(config: ModelConfig) -> float:
    """Returns the factor of attention scores: qk_head_dim^-0.5, times YaRN's squared temperature."""
    _, temperature = _temperatures(config)
    return 1 / math.sqrt(config.qk_head_dim) * temperature * temperature


def rotation_table(config: ModelConfig, num_positions: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns cos and sin of every position and pair, [T, R / 2] each, computed in their type."""
    angles = torch.arange(num_positions, dtype=dtype)[:, None] * inverse_frequencies(config, dtype)
    temperature, of_scores = _temperatures(config)
    factor = temperature / of_scores
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_BTHR: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> Tensor:
    """Rotates pairs (x0, x1), (x2, x3), ... by their position's angle; cos and sin may begin with B."""
    wide_BTHR = x_BTHR.to(cos_TP.dtype).contiguous()
    # A slice of a single row counts as contiguous at any offset.
    wide_BTHR = wide_BTHR if _holds_pairs(wide_BTHR) else wide_BTHR.clone(memory_format=torch.contiguous_format)
    pairs = torch.view_as_complex(wide_BTHR.unflatten(-1, (-1, 2)))
    turned = pairs * torch.complex(cos_TP, sin_TP).unsqueeze(-2)
    return torch.view_as_real(turned).flatten(-2).to(x_BTHR.dtype)


def rotate_(x_BTHR: Tensor, cos_TP: Tensor, sin_TP: Tensor) -> None:
    """Applies `rotate` in place; x may be a part of each row of a larger tensor."""
    if x_BTHR.dtype == cos_TP.dtype and _holds_pairs(x_BTHR):
        torch.view_as_complex(x_BTHR.unflatten(-1, (-1, 2))).mul_(torch.complex(cos_TP, sin_TP).unsqueeze(-2))
    else:
        x_BTHR.copy_(rotate(x_BTHR, cos_TP, sin_TP))


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cos and sin of each token's position, NP each."""

    cos_NP: Tensor
    sin_NP: Tensor

    def turn(self, x_NHR: Tensor) -> Tensor:
        """Returns every head of every token rotated by the token's position, with the same shape and type."""
        return rotate(x_NHR[None], self.cos_NP, self.sin_NP)[0]


def _holds_pairs(x: Tensor) -> bool:
    """Whether every pair begins at an even offset of the storage, as complex numbers do."""
    return all(place % 2 == 0 for place in (x.storage_offset(), *x.stride()[:-1]))
