"""Bytes of a micro-batch's tensors, by name, from which the accounts of phases are added up.

Imports no torch.

Every size covers all tokens of a micro-batch, or all rows that arrive at a rank's experts.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from kernels.quantize import TILE, num_pairs, num_tiles
from model.account.activations import MicroBatchShape
from model.config import LAYER, Computing, ModelConfig

_SCALE_BYTES = 4
_ID_BYTES = 8
_CHUNK_LOGITS_CUDA = 2**27
_CHUNK_LOGITS_CPU = {2: 2**22}
_SMALLEST_CHUNK_ROWS_CPU = 64
_CHUNK_NUMBERS_CPU = 2**19


Lane = Literal["compute", "comm"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseBytes:
    """Bytes of one phase of one micro-batch.

    Attributes:
        lane: lane on which it runs.
        values: results that only the run holds, until the next phase has finished.
        kept: from its forward to its backward.
        routing: from its forward to the end of the micro-batch.
        gradients: gradients of its inputs that only the run holds, until the phase before has finished.
        waiting: from its backward to its W.
        forward_peak: largest allocation inside the forward, above what was allocated before.
        backward_peak: the same inside the backward.
        weight_peak: the same inside W.
        restored: recomputed in its backward for other phases, from its end on.
        recomputed: part of the above that is held until the end of this phase's backward.
        carried: gradients of earlier slices' rows that the backward allocates, less those that it completes.
    """

    name: str
    lane: Lane
    values: int = 0
    kept: int = 0
    routing: int = 0
    gradients: int = 0
    waiting: int = 0
    forward_peak: int = 0
    backward_peak: int = 0
    weight_peak: int = 0
    restored: int = 0
    recomputed: int = 0
    carried: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExchangeBytes:
    """Bytes that a dispatcher holds for one layer and micro-batch.

    Attributes:
        routing: index tensors, from dispatch to the end of the micro-batch.
        to_experts: buffers inside an exchange to the experts, in addition to its input and output.
        from_experts: buffers inside an exchange from the experts, in addition to its input and output.
    """

    routing: int
    to_experts: int
    from_experts: int


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes for one rank and one micro-batch.

    Attributes:
        device: determines how many logits the head computes at a time.
        num_local_experts: routed experts of a layer on this rank.
        exchange: bytes of the dispatcher.
        shape: shape of the micro-batch; `expert_rows` must be set to the rows that arrive.
    """

    config: ModelConfig
    shape: MicroBatchShape
    computing: Computing
    device: Literal["cpu", "cuda"]
    num_local_experts: int
    exchange: ExchangeBytes

    def numbers(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each token, in the model's type."""
        return self.shape.num_tokens * width * self.shape.value_bytes

    def wide(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each token, in float32 or wider."""
        return self.shape.num_tokens * width * self.shape.wide_bytes

    def codes(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each token in FP8, with a scale for every 128."""
        return self.shape.num_tokens * (width + _SCALE_BYTES * num_tiles(width))

    def columns(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each token in transposed FP8, padded to 128 tokens."""
        return _columns(width, num_tiles(self.shape.num_tokens))

    def expert_numbers(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each row at this rank's experts, in the model's type."""
        return self.rows * width * self.shape.value_bytes

    def expert_wide(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each row at this rank's experts, in float32 or wider."""
        return self.rows * width * self.shape.wide_bytes

    def expert_codes(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each row at this rank's experts in FP8."""
        return self.rows * (width + _SCALE_BYTES * num_tiles(width))

    def expert_columns(self, width: int) -> int:
        """Returns the bytes of `width` numbers of each expert row in transposed FP8, padded per expert."""
        per_expert, rest = divmod(self.rows, self.num_local_experts)
        tiles = rest * num_tiles(per_expert + 1) + (self.num_local_experts - rest) * num_tiles(per_expert)
        return _columns(width, tiles)

    def matrix(self, *shape: int) -> int:
        """Returns the bytes of a weight gradient: float32 if products are in FP8, else the weight's type."""
        size = self.shape.wide_bytes if self.is_fp8 else self.shape.value_bytes
        for dimension in shape:
            size *= dimension
        return size

    @property
    def rows(self) -> int:
        """Number of rows that arrive at this rank's experts."""
        assert self.shape.expert_rows is not None
        return self.shape.expert_rows

    @property
    def is_fp8(self) -> bool:
        """Whether products are in FP8."""
        return self.computing.products != "own"

    def recomputes(self, kind: str) -> bool:
        """Whether the backward recomputes a kind of output, as all FP8 models do."""
        return self.is_fp8 or kind in self.computing.recomputed

    @property
    def recomputes_layers(self) -> bool:
        """Whether the backward computes everything again but attention."""
        return LAYER in self.computing.recomputed

    @cached_property
    def row(self) -> int:
        """Bytes of a hidden state."""
        return self.numbers(self.config.hidden_size)

    @cached_property
    def scale(self) -> int:
        """Bytes of a norm's inverse root mean squares."""
        return self.wide(1)

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
    def compressed_width(self) -> int:
        """Width of compressed queries, compressed keys and values, and the shared key."""
        latent = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        return (self.config.q_lora_rank or self.query_width) + latent

    @property
    def heads(self) -> int:
        """Bytes of queries, keys and values as the attention kernel reads them."""
        key, value = self._kernel_widths
        return self.numbers(self.config.num_heads * (2 * key + value))

    @property
    def kernel_mixed(self) -> int:
        """Bytes that the attention kernel returns."""
        return self.numbers(self.config.num_heads * self._kernel_widths[1])

    @property
    def logsumexp(self) -> int:
        """Bytes that the attention kernel keeps for its backward in addition to its result."""
        return self.wide(self.config.num_heads)

    @property
    def wide_mixed(self) -> int:
        """Bytes of the values that the attention kernel returns, in float32 or wider."""
        return self.wide(self.config.num_heads * self._kernel_widths[1])

    @property
    def kernel_query(self) -> int:
        """Bytes of queries as the attention kernel reads them."""
        return self.numbers(self.config.num_heads * self._kernel_widths[0])

    @property
    def wide_query(self) -> int:
        """Bytes of queries as the attention kernel reads them, in float32 or wider."""
        return self.wide(self.config.num_heads * self._kernel_widths[0])

    @property
    def is_shared(self) -> bool:
        """Whether several ranks share each sequence."""
        return self.shape.context > 1

    @property
    def router_weights(self) -> int:
        """Bytes of the routing weights."""
        return self.wide(self.config.num_experts_per_token)

    @property
    def shared_width(self) -> int:
        """Width of all shared experts together."""
        return self.config.num_shared_experts * self.config.expert_intermediate_size

    @property
    def sent(self) -> int:
        """Bytes of the row that dispatch sends of each token: codes if products are in FP8."""
        return self.codes(self.config.hidden_size) if self.is_fp8 else self.row

    @property
    def received(self) -> int:
        """Bytes of the rows that dispatch delivers to this rank's experts, in the form in which they are sent."""
        hidden = self.config.hidden_size
        return self.expert_codes(hidden) if self.is_fp8 else self.expert_numbers(hidden)

    @property
    def attention_weight_peak(self) -> int:
        """Bytes of the largest weight gradient of attention."""
        config = self.config
        return max(
            self.matrix(config.hidden_size, self.value_width),
            self.matrix(self.query_width, self.query_rank),
            self.matrix(self.expanded_width, config.kv_lora_rank),
            self.matrix(self.compressed_width, config.hidden_size),
        )

    @property
    def logits(self) -> int:
        """Bytes of the logits that the head computes at a time, and of their softmax."""
        vocab, size = self.config.vocab_size, self.shape.value_bytes
        if self.device == "cuda":
            return max(1, min(self.shape.num_tokens, _CHUNK_LOGITS_CUDA // vocab)) * vocab * size
        most = max(_SMALLEST_CHUNK_ROWS_CPU, _CHUNK_LOGITS_CPU.get(size, 2**19) // vocab)
        return 2 * min(self.shape.num_tokens, most) * vocab * self.shape.wide_bytes

    @property
    def unpermuted(self) -> int:
        """Bytes inside a sum of each token's rows on a CPU: gathered rows, indices and sums."""
        if self.device == "cuda":
            return 0
        hidden, choices = self.config.hidden_size, self.config.num_experts_per_token
        tokens = min(self.shape.num_tokens, max(1, _CHUNK_NUMBERS_CPU // (hidden * choices)))
        widened = self.shape.value_bytes if self.shape.value_bytes != self.shape.wide_bytes else 0
        gathered = choices * (hidden * (self.shape.wide_bytes + widened) + 3 * _ID_BYTES)
        return tokens * (gathered + hidden * self.shape.wide_bytes)

    @property
    def _kernel_widths(self) -> tuple[int, int]:
        key, value = self.config.qk_head_dim, self.config.v_head_dim
        return (max(key, value),) * 2 if self.shape.pads_heads else (key, value)


def e5m6_bytes(sizes: Sizes, width: int) -> int:
    """Returns the bytes of `width` numbers of each token in 12 bits, with a scale for every 128."""
    return sizes.shape.num_tokens * (3 * num_pairs(width) + _SCALE_BYTES * num_tiles(width))


def block_code_bytes(num_rows: int, num_columns: int) -> int:
    """Returns the bytes of a weight matrix in FP8 with a scale for every 128 x 128 block."""
    return num_rows * num_columns + _SCALE_BYTES * num_tiles(num_rows) * num_tiles(num_columns)


def _columns(width: int, tiles: int) -> int:
    return width * tiles * (TILE + _SCALE_BYTES)
