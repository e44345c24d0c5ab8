"""Absorbed attention equals the expanded form and the training form, and the cache holds the expected values."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.kv_cache import KvCache
from model.attention.mla import LatentAttention, values_per_token
from model.attention.rope import Rotation, rotation_table
from model.block import Block
from model.config import ModelConfig, YarnRope
from tests.infer.models import make_model
from tests.tiny import MODEL

YARN = YarnRope(
    kind="yarn",
    factor=40.0,
    original_max_position_tokens=8,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=0.5,
)
SHAPES = {
    "plain": MODEL,
    "yarn": replace(MODEL, rope_scaling=YARN),
    "no_q_lora": replace(MODEL, q_lora_rank=None),
    "wide_values": replace(MODEL, v_head_dim=20),
}
TOKENS = 11


def rows(config: ModelConfig, dtype: torch.dtype) -> tuple[Block, Tensor, Tensor, Rotation]:
    """Returns a layer, states, their norm, and the rotation of their positions."""
    block = make_model(config, dtype).block(0)
    with torch.no_grad():
        for parameter in block.self_attn.parameters():
            parameter.mul_(3.0)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    rotation = Rotation(*rotation_table(config, TOKENS, torch.promote_types(dtype, torch.float32)))
    hidden_TD = hidden.to(dtype)
    with torch.no_grad():
        return block, hidden_TD, block.input_layernorm(hidden_TD), rotation


def trained_form(block: Block, hidden_TD: Tensor) -> Tensor:
    """Computes attention as in training, without the residual."""
    out: Tensor = block.self_attn(hidden_TD[None], block.input_layernorm, None)[0] - hidden_TD
    return out


def absorb(attention: LatentAttention, x_TD: Tensor, rotation: Rotation, first: int) -> Tensor:
    """Decodes the tokens from `first` on at once, over a cache with every token and garbage behind them."""
    cached = attention.latent_rows(x_TD, rotation)
    cached_1TC = torch.cat((cached, torch.full_like(cached[:2], 3.0)))[None]
    positions = torch.arange(first, TOKENS)
    future = torch.arange(TOKENS + 2) > positions[None, :, None]
    tail = Rotation(rotation.cos_NP[first:], rotation.sin_NP[first:])
    return attention.attend_absorbed(x_TD[first:], tail, cached_1TC, future)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_absorbed_equals_expanded_and_training_form(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    config = SHAPES[shape]
    block, hidden_TD, x_TD, rotation = rows(config, dtype)
    attention = block.self_attn
    assert isinstance(attention, LatentAttention)
    cached = attention.latent_rows(x_TD, rotation)
    whole = attention.attend_expanded(x_TD, rotation, cached, [TOKENS])
    torch.testing.assert_close(whole, trained_form(block, hidden_TD), rtol=tolerance, atol=tolerance)
    for first in (0, TOKENS - 2, TOKENS - 1):
        made = absorb(attention, x_TD, rotation, first)
        torch.testing.assert_close(made, whole[first:], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_expanded_prompts_do_not_see_each_other() -> None:
    block, hidden_TD, x_TD, rotation = rows(MODEL, torch.float64)
    attention = block.self_attn
    assert isinstance(attention, LatentAttention)
    first = Rotation(rotation.cos_NP[:4], rotation.sin_NP[:4])
    both = Rotation(*(torch.cat((table[:4], table[: TOKENS - 4])) for table in (rotation.cos_NP, rotation.sin_NP)))
    made = attention.attend_expanded(x_TD, both, attention.latent_rows(x_TD, both), [4, TOKENS - 4])
    alone = attention.attend_expanded(x_TD[:4], first, attention.latent_rows(x_TD[:4], first), [4])
    torch.testing.assert_close(made[:4], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made[4:], trained_form(block, hidden_TD[4:]), rtol=1e-12, atol=1e-12)


def test_cache_of_v3_holds_576_values_per_token_and_layer() -> None:
    config = replace(MODEL, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = KvCache(values_per_token(config), 61, 2, 3, torch.bfloat16, torch.device("meta"))
    assert values_per_token(config) == 576
    assert cache.num_bytes == 2 * 3 * 70272


def test_cache_gives_back_what_was_written() -> None:
    cache = KvCache(values_per_token(MODEL), 2, 3, 5, torch.float32, torch.device("cpu"))
    size = values_per_token(MODEL)
    for row in range(3):
        assert cache.add() == row
        cache.write_row(1, row, 0, torch.full((row + 1, size), float(row + 1)))
        cache.resize(row, row + 1)
    assert cache.lengths == (1, 2, 3)
    cache.write_step(1, 0, torch.tensor([[1, 2], [2, 3], [3, 4]]), torch.arange(6.0).view(3, 2, 1).expand(3, 2, size))
    assert cache.read(1, slice(3), 5)[..., 0].tolist() == [[1, 0, 1, 0, 0], [2, 2, 2, 3, 0], [3, 3, 3, 4, 5]]
    assert not cache.read(0, slice(3), 5).any()
    cache.resize(2, 5)
    cache.remove(0)
    assert cache.lengths == (5, 2)
    assert cache.read(1, slice(2), 5)[..., 0].tolist() == [[3, 3, 3, 4, 5], [2, 2, 2, 3, 0]]
    cache.remove(1)
    assert cache.lengths == (5,)
    with pytest.raises(AssertionError):
        cache.resize(0, 6)
