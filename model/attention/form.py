"""Interface of a model's attention to blocks and decoding: the layer, its cache, and rotary positions.

Another form is one file with subclasses of `Attention` and of `ModelConfig`, and an `AttentionForm`. Positions rotate
pairs, with YaRN (arXiv:2309.00071; 2412.19437, section 4.3). Shape legend: S new tokens of each sequence, N new tokens
of all, T positions, C values per token and layer, P rotated pairs, R rotated values per head.
"""

import math
from abc import abstractmethod
from typing import assert_never

import torch
from torch import Tensor, nn

from comm.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from model.attention.cache import CacheView
from model.config import ModelConfig, PlainRope, YarnRope, yarn_temperature
from model.linear import WeightSink
from model.norm import RmsNorm


class Attention(nn.Module):
    """One layer's attention."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        norm: RmsNorm,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Returns x + attention(norm(x)), causal, of the tokens that this rank holds: BTD.

        Args:
            norm: norm of this layer; it belongs to the block, and autograd computes its gradient.
            documents: documents of whole packed sequences, also if a context group shares them.
            context: members that share each sequence. A form that needs whole sequences raises an error if there are
                several.
        """

    @abstractmethod
    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Returns hidden + attention(norm(hidden)) of new tokens, and writes them to the cache: ND."""


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the radians per position of each pair, [R / 2]: theta^(-2k/R), interpolated by YaRN.

    In float32 each operation is rounded as in the released code, with which weights were trained: thousands of
    positions multiply an error in the last bit.
    """
    # Radians per position of pair k, without scaling: theta^(-2k/R).
    size = config.rotated_dim
    powers = config.rope_theta ** (torch.arange(0, size, 2).to(dtype) / size)
    match config.rope_scaling:
        case PlainRope():
            return 1 / powers
        case YarnRope() as yarn:

            def pair_with(rotations: float) -> float:
                wavelengths = yarn.original_max_position_tokens / (rotations * 2 * math.pi)
                return size * math.log(wavelengths) / (2 * math.log(config.rope_theta))

            # Fast pairs (below low) keep their frequency, slow ones (above high) are divided by the factor, with a ramp
            # between.
            low = max(math.floor(pair_with(yarn.beta_fast)), 0)
            high = min(math.ceil(pair_with(yarn.beta_slow)), size - 1)
            pairs = torch.arange(size // 2, dtype=dtype)
            kept_share = 1 - ((pairs - low) / ((high - low) or 1e-3)).clamp(0, 1)
            return 1 / (yarn.factor * powers) * (1 - kept_share) + 1 / powers * kept_share
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
    # [T, R / 2]: position times radians per position.
    angles = torch.arange(num_positions, dtype=dtype)[:, None] * inverse_frequencies(config, dtype)
    temperature, of_scores = _temperatures(config)
    # `softmax_scale` contains the temperature of scores, so it is divided out here.
    factor = temperature / of_scores
    return angles.cos() * factor, angles.sin() * factor


class RotationTable:
    """Keeps the turns of one length, because the micro-batches of a run have one length."""

    def __init__(self, config: ModelConfig) -> None:
        self._config = config
        self._tables: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def turns(self, x_BTD: Tensor, context: ContextGroup) -> Tensor:
        """Returns cos + i sin of all positions of the sequences, of which this rank may hold a part."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        num_positions = context.parts(x_BTD.shape[1]).num_tokens
        key = (num_positions, x_BTD.device, dtype)
        if key not in self._tables:
            table = torch.complex(*rotation_table(self._config, num_positions, dtype))
            self._tables = {key: table.to(x_BTD.device)}
        return self._tables[key]
