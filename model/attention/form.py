"""Interface of a model's attention to blocks and decoding: the form, its cache, and rotary positions.

Another form is one file with a subclass of `Attention` and an `AttentionForm`. Latent attention keeps a normalized
latent and a rotated key for all heads in the cache (arXiv:2412.19437, section 2.1.1). Positions rotate interleaved
pairs, with YaRN (arXiv:2309.00071; 2412.19437, section 4.3). Shape legend: S new tokens of each sequence, N new tokens
of all, T positions, C values per token and layer, P rotated pairs, R rotated values per head.
"""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

import torch
from torch import Tensor, nn

from comm.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from model.config import ModelConfig, PlainRope, YarnRope, yarn_temperature
from model.linear import WeightSink
from model.norm import RmsNorm
from model.precision.linears import Linears


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
    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: "CacheView") -> Tensor:
        """Returns hidden + attention(norm(hidden)) of new tokens, and writes them to the cache: ND."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """A form of attention: how it is built, and how many values a layer's cache holds of a token."""

    name: str
    build: Callable[[ModelConfig, torch.dtype, str, Linears], Attention]
    values_per_token: Callable[[ModelConfig], int]


def inverse_frequencies(config: ModelConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns the radians per position of each pair, [R / 2]: theta^(-2k/R), interpolated by YaRN.

    In float32 each operation is rounded as in the released code, with which weights were trained: thousands of
    positions multiply an error in the last bit.
    """
    # Radians per position of pair k, without scaling: theta^(-2k/R).
    size = config.qk_rope_head_dim
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


class KvCache:
    """Storage for a number of sequences of at most `capacity` tokens, each with its own length.

    The held sequences are rows 0 .. `len(lengths) - 1`. Values beyond a row's length are finite, and no token reads
    them before they are overwritten.
    """

    def __init__(
        self,
        values_per_token: int,
        num_layers: int,
        max_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_layers, max_sequences, capacity, values_per_token)
        # Zeros, because masked positions are still multiplied by weights of 0, and 0 x NaN is NaN.
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths: list[int] = []

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each held sequence."""
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        """Largest number of tokens of a sequence."""
        return self._values.shape[2]

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the storage."""
        return self._values.numel() * self._values.element_size()

    def add(self) -> int:
        """Adds an empty sequence and returns its row."""
        assert len(self._lengths) < self._values.shape[1], "more sequences than the cache has rows"
        self._lengths.append(0)
        return len(self._lengths) - 1

    def remove(self, row: int) -> None:
        """Frees a row; the last row moves to its place."""
        last = len(self._lengths) - 1
        # Held rows stay consecutive, so a step reads them as one view without gathering.
        if row != last:
            self._values[:, row, : self._lengths[last]] = self._values[:, last, : self._lengths[last]]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def resize(self, row: int, length: int) -> None:
        """Sets a row's number of tokens: more after a pass has written them, fewer to discard tokens."""
        assert 0 <= length <= self.capacity, "a row is longer than the cache"
        self._lengths[row] = length

    def copy_start(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of a row to another one, which then has that length."""
        self._values[:, target, :length] = self._values[:, source, :length]
        self.resize(target, length)

    def arrange(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Replaces the held sequences: row i continues the tokens of row `sources[i]`; -1: it is empty."""
        assert len(sources) <= self._values.shape[1], "more sequences than the cache has rows"
        moves = [row for row, source in enumerate(sources) if source not in (row, -1)]
        # A row may be read after it is overwritten, so all that move are copied first.
        copies = [self._values[:, sources[row], : lengths[row]].clone() for row in moves]
        for row, values in zip(moves, copies, strict=True):
            self._values[:, row, : lengths[row]] = values
        self._lengths = list(lengths)

    def write_row(self, layer: int, row: int, first: int, values_TC: Tensor) -> None:
        """Writes one sequence's tokens from position `first` on."""
        self._values[layer, row, first : first + len(values_TC)] = values_TC

    def write_step(self, layer: int, first_row: int, positions_BS: Tensor, values_BSC: Tensor) -> None:
        """Writes the new tokens of consecutive rows, each at its position."""
        # Each sequence has its own position, so this is a scatter: [B, S] indices.
        rows_B1 = first_row + torch.arange(len(positions_BS), device=positions_BS.device)[:, None]
        self._values[layer].index_put_((rows_B1, positions_BS), values_BSC)

    def read(self, layer: int, rows: slice, num_positions: int) -> Tensor:
        """Returns the first positions of consecutive rows, BTC, as a view."""
        return self._values[layer, rows, :num_positions]


@dataclass(frozen=True, slots=True)
class PromptView:
    """A layer's cache while whole prompts of `counts` tokens are read into empty rows."""

    cache: KvCache
    layer: int
    rows: Sequence[int]
    counts: Sequence[int]
    turns_NP: Tensor

    def write(self, values_NC: Tensor) -> None:
        """Writes the cached values of each token."""
        # Prompts have different lengths; their tokens follow each other in N.
        for row, values_TC in zip(self.rows, values_NC.split(list(self.counts)), strict=True):
            self.cache.write_row(self.layer, row, 0, values_TC)


@dataclass(frozen=True, slots=True)
class StepView:
    """A layer's cache while S new tokens are added to every held sequence, or to one of them.

    Attributes:
        first_row: row of the first sequence that the view covers; the others follow it.
        num_positions: T, the number of positions up to the last token.
        future_BST: True if a token must not see a position; None if every token sees every position.
    """

    cache: KvCache
    layer: int
    first_row: int
    positions_BS: Tensor
    num_positions: int
    future_BST: Tensor | None
    turns_NP: Tensor

    def write(self, values_NC: Tensor) -> None:
        """Writes the cached values of each new token."""
        # Without a mask, the only new token of each sequence is at the last position.
        if self.future_BST is None:
            self.read()[:, -1] = values_NC
            return
        values_BSC = values_NC.view(*self.positions_BS.shape, -1)
        self.cache.write_step(self.layer, self.first_row, self.positions_BS, values_BSC)

    def read(self) -> Tensor:
        """Returns all positions of the sequences, BTC, as a view."""
        rows = slice(self.first_row, self.first_row + len(self.positions_BS))
        return self.cache.read(self.layer, rows, self.num_positions)


CacheView = PromptView | StepView
