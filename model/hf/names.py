"""Lists every tensor of a checkpoint in the released form: name, shape, type. Imports no torch.

Source: the released checkpoint; arXiv:2412.19437, section 3.3, for what is kept in FP8.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Literal

from model.config import ModelConfig

StoredDtype = Literal["F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E8M0", "I64"]

BLOCK = 128
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
SCORE_HEAD = "score.weight"
SCALE_SUFFIX = "_scale_inv"
BIAS_SUFFIX = ".mlp.gate.e_score_correction_bias"
_ROTARY = re.compile(r"model\.(layers\.(0|[1-9][0-9]{0,8})\.self_attn\.)?rotary_emb\.inv_freq")
_MTP_COPIES = {"embed_tokens.weight": EMBEDDING, "shared_head.head.weight": HEAD}
_QUANTIZED = re.compile(
    r"model\.layers\.\d+\.(self_attn\.(q|k|v|q_a|q_b|kv_b|o)_proj|self_attn\.kv_a_proj_with_mqa"
    r"|mlp\.(experts\.\d+\.|shared_experts\.)?(gate|up|down)_proj)\.weight"
)

Named = Iterator[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class Stored:
    """Shape of a tensor in a file, and its type as safetensors names it."""

    shape: tuple[int, ...]
    dtype: StoredDtype

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return reduce(mul, self.shape, 1)


def stored_tensors(config: ModelConfig, *, dtype: StoredDtype, fp8: bool) -> dict[str, Stored]:
    """Returns every tensor of an architecture's released checkpoint, in the order of the network.

    Biases and scales are float32. Shared experts have no rows if there are none, as `transformers` writes them.
    """
    stored: dict[str, Stored] = {}
    for name, shape in file_weights(config):
        if fp8 and is_quantized(name) and 0 not in shape:
            stored |= with_scales(name, shape)
        else:
            stored[name] = Stored(shape, "F32" if name.endswith(BIAS_SUFFIX) else dtype)
    return stored


def weights(config: ModelConfig) -> Named:
    """Yields (name, shape) of every weight and correction bias, and of the MTP modules' copies."""
    vocab = config.vocab_size
    hidden = config.hidden_size
    yield EMBEDDING, (vocab, hidden)
    for layer in range(config.num_layers):
        yield from _layer(config, layer, moe=layer >= config.num_dense_layers)
    yield "model.norm.weight", (hidden,)
    yield HEAD if config.head == "tokens" else SCORE_HEAD, (config.num_head_rows, hidden)
    for layer in range(config.num_layers, config.num_layers + config.mtp_depth):
        yield from _layer(config, layer, moe=True)
        prefix = f"model.layers.{layer}."
        yield prefix + "enorm.weight", (hidden,)
        yield prefix + "hnorm.weight", (hidden,)
        yield prefix + "eh_proj.weight", (hidden, 2 * hidden)
        yield prefix + "embed_tokens.weight", (vocab, hidden)
        yield prefix + "shared_head.norm.weight", (hidden,)
        yield prefix + "shared_head.head.weight", (vocab, hidden)


def file_weights(config: ModelConfig) -> Named:
    """Yields `weights` that files hold. Qwen3's hold no correction biases and nothing empty."""
    holds_all = config.attention == "mla"
    return (
        (name, shape) for name, shape in weights(config) if holds_all or not (0 in shape or name.endswith(BIAS_SUFFIX))
    )


def is_quantized(name: str) -> bool:
    """Whether a released FP8 checkpoint holds this weight in FP8."""
    return _QUANTIZED.fullmatch(name) is not None


def scale_name(name: str) -> str:
    """Returns the name of an FP8 weight's scales."""
    return name + SCALE_SUFFIX


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the scales, one for each block of 128 x 128; the last block may be ragged."""
    return tuple(-(-size // BLOCK) for size in shape)


def with_scales(name: str, shape: tuple[int, ...], scales: StoredDtype = "F32") -> dict[str, Stored]:
    """Returns an FP8 weight and its scales, in float32 or as exponents alone (E8M0)."""
    return {name: Stored(shape, "F8_E4M3"), scale_name(name): Stored(scale_shape(shape), scales)}


def is_rotary(name: str) -> bool:
    """Whether a tensor holds rotary frequencies, which `config.json` already determines."""
    return _ROTARY.fullmatch(name) is not None


def copied_from(name: str) -> str | None:
    """Returns the main model's tensor of which an MTP module's tensor is a copy, or None."""
    parts = name.split(".", 3)
    return _MTP_COPIES.get(parts[3]) if parts[:2] == ["model", "layers"] and len(parts) == 4 else None


def layer_of(name: str) -> int | None:
    """Returns the layer of a tensor, or None for embedding, final norm and head."""
    matched = re.match(r"model\.layers\.(0|[1-9][0-9]{0,8})\.", name)
    return int(matched[1]) if matched else None


def _layer(config: ModelConfig, layer: int, *, moe: bool) -> Named:
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    yield prefix + "input_layernorm.weight", (hidden,)
    for name, shape in config.attention_weights:
        yield f"{prefix}self_attn.{name}.weight", shape
    yield prefix + "post_attention_layernorm.weight", (hidden,)
    if not moe:
        yield from _feed_forward(prefix + "mlp.", hidden, config.dense_intermediate_size)
        return
    narrow = config.expert_intermediate_size
    yield prefix + "mlp.gate.weight", (config.num_routed_experts, hidden)
    yield prefix.removesuffix(".") + BIAS_SUFFIX, (config.num_routed_experts,)
    for expert in range(config.num_routed_experts):
        yield from _feed_forward(f"{prefix}mlp.experts.{expert}.", hidden, narrow)
    yield from _feed_forward(prefix + "mlp.shared_experts.", hidden, config.num_shared_experts * narrow)


def _feed_forward(prefix: str, hidden: int, intermediate: int) -> Named:
    yield prefix + "gate_proj.weight", (intermediate, hidden)
    yield prefix + "up_proj.weight", (intermediate, hidden)
    yield prefix + "down_proj.weight", (hidden, intermediate)
