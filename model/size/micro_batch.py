"""Sizes of a micro-batch's tensors on one rank, of which attention and phases consist.

Imports no torch.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kernels.tiles import TILE, num_tiles
from model.config import Computing, ModelConfig, Recomputed

SCALE_BYTES = 4
_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class RowSizes:
    """Bytes of some rows of a width.

    Attributes:
        count: number of rows.
        tiles: tiles of 128 rows that cover them, for each expert's rows separately.
        value_bytes: bytes of a number in the model's type.
    """

    count: int
    tiles: int
    value_bytes: int

    def numbers(self, width: int) -> int:
        """Returns the bytes in the model's type."""
        return self.count * width * self.value_bytes

    def wide(self, width: int) -> int:
        """Returns the bytes in float32 or wider."""
        return self.count * width * max(4, self.value_bytes)

    def codes(self, width: int) -> int:
        """Returns the bytes in FP8, with a scale for every 128."""
        return self.count * (width + SCALE_BYTES * num_tiles(width))

    def columns(self, width: int) -> int:
        """Returns the bytes in transposed FP8, padded to whole tiles of rows."""
        return width * self.tiles * (TILE + SCALE_BYTES)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes for one rank and one micro-batch.

    Attributes:
        device: determines how many logits the head computes at a time.
        sequences: number of sequences.
        tokens: tokens of each sequence that this rank holds.
        value_bytes: bytes of a number in the model's type.
        pads_heads: whether queries, keys and values have one width, as torch's fused attention requires on CPU.
        expert_rows: rows that arrive at this rank's experts.
        num_local_experts: routed experts of a layer on this rank.
        routing: bytes of a dispatcher's index tensors, from dispatch to the end of the micro-batch.
        to_experts: bytes inside an exchange to the experts, in addition to its input and output.
        from_experts: bytes inside an exchange from the experts, in addition to its input and output.
        context: ranks that share each sequence.
        kept_ranks: other ranks of these whose latents are kept, from `comm.context.forecast.num_kept_ranks`.
    """

    config: ModelConfig
    computing: Computing
    device: Literal["cpu", "cuda"]
    sequences: int
    tokens: int
    value_bytes: int
    pads_heads: bool
    expert_rows: int
    num_local_experts: int
    routing: int = 0
    to_experts: int = 0
    from_experts: int = 0
    context: int = 1
    kept_ranks: int = 0

    @cached_property
    def token_rows(self) -> RowSizes:
        """Rows of the rank's tokens."""
        count = self.sequences * self.tokens
        return RowSizes(count, num_tiles(count), self.value_bytes)

    @cached_property
    def arrived_rows(self) -> RowSizes:
        """Rows at the rank's experts, which receive equally many."""
        per_expert, rest = divmod(self.expert_rows, self.num_local_experts)
        tiles = rest * num_tiles(per_expert + 1) + (self.num_local_experts - rest) * num_tiles(per_expert)
        return RowSizes(self.expert_rows, tiles, self.value_bytes)

    @property
    def wide_bytes(self) -> int:
        """Bytes of a number that needs at least float32."""
        return max(4, self.value_bytes)

    @property
    def is_fp8(self) -> bool:
        """Whether products are in FP8."""
        return self.computing.products != "own"

    @property
    def is_shared(self) -> bool:
        """Whether several ranks, or several slices, share each sequence."""
        return self.context > 1

    @property
    def shares_experts(self) -> bool:
        """Whether a MoE layer has shared experts."""
        return bool(self.config.num_shared_experts)

    def keeps(self, kind: Recomputed) -> bool:
        """Whether a kind of output is kept for the backward; FP8 models recompute all."""
        return not self.is_fp8 and kind not in self.computing.recomputed

    def matrix(self, *shape: int) -> int:
        """Returns the bytes of a weight gradient: float32 if products are in FP8, else the weight's type."""
        size = self.wide_bytes if self.is_fp8 else self.value_bytes
        for dimension in shape:
            size *= dimension
        return size

    @cached_property
    def row(self) -> int:
        """Bytes of a hidden state."""
        return self.token_rows.numbers(self.config.hidden_size)

    @property
    def scale(self) -> int:
        """Bytes of a norm's inverse root mean squares."""
        return self.token_rows.wide(1)

    @property
    def query_rank(self) -> int:
        """Width of the compressed queries that have a norm, 0 if queries are not compressed."""
        return self.config.q_lora_rank or 0

    @property
    def query_width(self) -> int:
        """Width of all heads' queries."""
        return self.config.num_heads * self.config.qk_head_dim

    @property
    def value_width(self) -> int:
        """Width of all heads' values."""
        return self.config.num_heads * self.config.v_head_dim

    @property
    def expanded_width(self) -> int:
        """Width of all heads' keys without position, and values."""
        return self.config.num_heads * (self.config.qk_nope_head_dim + self.config.v_head_dim)

    @property
    def latent_width(self) -> int:
        """Values of a token that other ranks need: compressed keys and values, and the shared key."""
        return self.config.kv_lora_rank + self.config.qk_rope_head_dim

    @property
    def compressed_width(self) -> int:
        """Width of compressed queries, compressed keys and values, and the shared key."""
        return (self.config.q_lora_rank or self.query_width) + self.latent_width

    @property
    def kernel_widths(self) -> tuple[int, int]:
        """Widths of all heads' queries (or keys) and values as the attention kernel reads them."""
        query, value = self.query_width, self.value_width
        return (max(query, value),) * 2 if self.pads_heads else (query, value)

    @property
    def heads(self) -> int:
        """Bytes of queries, keys and values as the attention kernel reads them."""
        query, value = self.kernel_widths
        return self.token_rows.numbers(2 * query + value)

    @property
    def mixed(self) -> int:
        """Bytes that the attention kernel returns."""
        return self.token_rows.numbers(self.kernel_widths[1])

    @property
    def logsumexp(self) -> int:
        """Bytes that the attention kernel keeps for its backward in addition to its result."""
        return self.token_rows.wide(self.config.num_heads)

    @property
    def message(self) -> int:
        """Bytes of the rows that a rank of a context group sends for one layer, once.

        In FP8 these are latents as they are kept, with scales and the norm's inverse root mean squares, and the shared
        key, each aligned.
        """
        if not self.is_fp8:
            return self.token_rows.numbers(self.latent_width)
        rank = self.config.kv_lora_rank
        parts = (self.config.qk_rope_head_dim * self.value_bytes, rank, SCALE_BYTES * num_tiles(rank), self.wide_bytes)
        return sum(-(-self.token_rows.count * part // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES for part in parts)

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.config.num_shared_experts * self.config.expert_intermediate_size

    @property
    def sent(self) -> int:
        """Bytes of the rows that dispatch sends, one for each token: codes if products are in FP8."""
        return self.token_rows.codes(self.config.hidden_size) if self.is_fp8 else self.row

    @property
    def received(self) -> int:
        """Bytes of the rows that dispatch delivers to this rank's experts, in the form in which they are sent."""
        hidden = self.config.hidden_size
        return self.arrived_rows.codes(hidden) if self.is_fp8 else self.arrived_rows.numbers(hidden)

    @property
    def scores(self) -> int:
        """Bytes of a router's scores."""
        return self.token_rows.wide(self.config.num_routed_experts)
