"""Latent attention, also absorbed: outputs and gradients equal the formula under ordinary autograd.

Shape legend: B sequences, T tokens, H heads, D hidden size, P pairs.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from kernels.attention import ATTENTION
from kernels.attention.documents import Documents
from model.attention.cache import KvCache
from model.attention.form import rotation_table
from model.attention.mla import LATENT_NORM_EPS, LatentAttention
from model.block import Block
from model.config import BLOCK_TOKENS, Computing, MlaConfig, Recomputed, YarnRope
from model.linear import WeightSink
from model.norm import RmsNorm
from model.transformer import build_linears
from tests.infer.models import make_model
from tests.kernels import plain
from tests.kernels.flash_attn_emulation import PACKAGES, Calls
from tests.kernels.plain import randn, strided
from tests.model.against_plain import Weights, assert_equals_plain, randomize
from tests.tiny import MODEL

SMALL = replace(MODEL, hidden_size=10, num_heads=3, norm_eps=1e-3)

CONFIGS = {
    "latent queries": SMALL,
    "whole queries": replace(SMALL, q_lora_rank=None),
    "odd sizes": replace(SMALL, qk_nope_head_dim=7, qk_rope_head_dim=2, v_head_dim=5, kv_lora_rank=9, q_lora_rank=11),
    "odd offset": replace(SMALL, qk_nope_head_dim=7, qk_rope_head_dim=4, v_head_dim=12),
    "wide values": replace(SMALL, qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=16, q_lora_rank=None),
}

SUBSETS: list[frozenset[Recomputed]] = [
    frozenset(),
    frozenset({"norm"}),
    frozenset({"mla_up"}),
    frozenset({"norm", "mla_up"}),
]

PLACES = torch.tensor([[0, 1, 2, 0, 1, 0, -1], [4, 5, 0, 1, 2, 3, 4]])


class Attention(nn.Module):
    """A norm and the attention that reads it."""

    def __init__(self, config: MlaConfig, dtype: torch.dtype, computing: Computing) -> None:
        super().__init__()
        self.config = config
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype)
        self.self_attn = LatentAttention(config, dtype, computing.attention, build_linears(computing))
        randomize(self, 1)


def turned(x_BTHR: Tensor, config: MlaConfig) -> Tensor:
    """Neighbours as complex numbers, multiplied by e^(i angle) of their place and pair."""
    pairs = x_BTHR.shape[-1] // 2
    speeds_P = config.rope_theta ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles_TP = torch.arange(x_BTHR.shape[1], dtype=torch.float64)[:, None] * speeds_P
    cos, sin = angles_TP.cos()[:, None], angles_TP.sin()[:, None]
    first, second = x_BTHR[..., 0::2], x_BTHR[..., 1::2]
    return torch.stack((first * cos - second * sin, first * sin + second * cos), -1).flatten(-2)


def plain_attention(weights: Weights, x_BTD: Tensor, config: MlaConfig, documents: Documents | None) -> Tensor:
    """Computes x + attention(norm(x)) (arXiv:2412.19437, section 2.1.1)."""
    own = {name.removeprefix("self_attn.").removesuffix(".weight"): weight for name, weight in weights.items()}
    x = plain.rms_norm(x_BTD, own["norm"], config.norm_eps)
    if config.q_lora_rank is None:
        query = x @ own["q_proj"].t()
    else:
        latent = plain.rms_norm(x @ own["q_a_proj"].t(), own["q_a_layernorm"], LATENT_NORM_EPS)
        query = latent @ own["q_b_proj"].t()
    nope, heads = config.qk_nope_head_dim, (config.num_heads, -1)
    query = query.unflatten(-1, heads)
    both = x @ own["kv_a_proj_with_mqa"].t()
    latent = plain.rms_norm(both[..., : config.kv_lora_rank], own["kv_a_layernorm"], LATENT_NORM_EPS)
    expanded = (latent @ own["kv_b_proj"].t()).unflatten(-1, heads)
    shared = turned(both[..., None, config.kv_lora_rank :], config).expand(-1, -1, config.num_heads, -1)
    query = torch.cat((query[..., :nope], turned(query[..., nope:], config)), -1)
    key = torch.cat((expanded[..., :nope], shared), -1)
    scores_BHTT = torch.einsum("bqhd,bkhd->bhqk", query, key) * config.qk_head_dim**-0.5
    size = x_BTD.shape[1]
    seen = torch.ones(size, size, dtype=torch.bool).tril()
    if documents is not None:
        seen = seen & (documents.ids_BT[:, None, :, None] == documents.ids_BT[:, None, None, :])
    shares = scores_BHTT.masked_fill(~seen, -torch.inf).softmax(-1)
    mixed = torch.einsum("bhqk,bkhd->bqhd", shares, expanded[..., nope:])
    return x_BTD + mixed.flatten(2) @ own["o_proj"].t()


def check(
    config: MlaConfig,
    computing: Computing,
    dtype: torch.dtype,
    documents: Documents | None,
    x_BTD: Tensor,
    is_split: bool = False,
    frozen: Sequence[str] = (),
) -> None:
    def call(module: Attention, inputs: Sequence[Tensor], sink: WeightSink | None) -> tuple[Tensor]:
        return (module.self_attn(inputs[0], module.norm, sink, documents),)

    def plainly(weights: Weights, inputs: Sequence[Tensor]) -> tuple[Tensor]:
        return (plain_attention(weights, inputs[0], config, documents),)

    module = Attention(config, dtype, computing)
    assert_equals_plain(module, call, plainly, [x_BTD], is_split=is_split, frozen=frozen)


@pytest.mark.covering(2)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("recomputed", SUBSETS)
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_and_gradients_equal_formula(
    name: str, recomputed: frozenset[Recomputed], is_split: bool, is_packed: bool
) -> None:
    documents = Documents.from_positions(PLACES) if is_packed else None
    x = randn(2, 7, 10, seed=2)
    for given in (x, strided(x)):
        check(CONFIGS[name], Computing(recomputed=recomputed), torch.float64, documents, given, is_split)


@pytest.mark.covering(1)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_attention_in_bf16_is_as_near_as_bf16_allows(name: str, is_packed: bool) -> None:
    documents = Documents.from_positions(PLACES) if is_packed else None
    x = randn(2, 7, 10, seed=2, dtype=torch.bfloat16)
    for recomputed in (SUBSETS[0], SUBSETS[-1]):
        check(CONFIGS[name], Computing(recomputed=recomputed), torch.bfloat16, documents, x)


@pytest.mark.covering(1)
@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("recomputed", SUBSETS)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("kernel", ["flash_attention", "flash_attention_3", "flash_attention_4"])
def test_attention_through_an_emulated_flash_attn_equals_formula(
    kernel: str, name: str, recomputed: frozenset[Recomputed], is_packed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages need CUDA: an emulation checks layout, padding of values, and its arguments."""
    calls = Calls()
    package = ATTENTION.get(kernel).package
    assert package is not None
    monkeypatch.setitem(sys.modules, package, PACKAGES[package](calls))
    documents = Documents.from_positions(PLACES) if is_packed else None
    computing = Computing(recomputed=recomputed, attention=kernel)
    check(CONFIGS[name], computing, torch.float64, documents, randn(2, 7, 10, seed=2))
    assert (calls.num_whole, calls.num_packed) == ((0, 1) if is_packed else (1, 0))


@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("recomputed", [SUBSETS[0], SUBSETS[-1]])
def test_attention_gives_no_gradient_to_frozen_weights(recomputed: frozenset[Recomputed], is_split: bool) -> None:
    for frozen in (
        ["self_attn.o_proj.weight", "self_attn.kv_a_layernorm.weight"],
        ["self_attn.q_a_proj.weight", "self_attn.q_b_proj.weight", "norm.weight"],
        ["self_attn.kv_b_proj.weight", "self_attn.kv_a_proj_with_mqa.weight", "self_attn.q_a_layernorm.weight"],
    ):
        check(SMALL, Computing(recomputed=recomputed), torch.float64, None, randn(2, 3, 10, seed=2), is_split, frozen)


@pytest.mark.parametrize("shape", [(1, 1, 10), (3, 1, 10), (1, 2, 10)])
def test_attention_of_one_token_equals_formula(shape: tuple[int, int, int]) -> None:
    for recomputed in SUBSETS:
        check(SMALL, Computing(recomputed=recomputed), torch.float64, None, randn(*shape, seed=2))


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


def rows(config: MlaConfig, dtype: torch.dtype) -> tuple[Block, Tensor, Tensor, Tensor]:
    """Returns a layer, states, their norm, and the turns of their positions."""
    block = make_model(config, dtype).block(0)
    with torch.no_grad():
        for parameter in block.self_attn.parameters():
            parameter.mul_(3.0)
    hidden = torch.randn(TOKENS, config.hidden_size, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    turns_NP = torch.complex(*rotation_table(config, TOKENS, torch.promote_types(dtype, torch.float32)))
    hidden_TD = hidden.to(dtype)
    with torch.no_grad():
        return block, hidden_TD, block.input_layernorm(hidden_TD), turns_NP


def trained_form(block: Block, hidden_TD: Tensor) -> Tensor:
    """Computes attention as in training, without the residual."""
    out: Tensor = block.self_attn(hidden_TD[None], block.input_layernorm, None)[0] - hidden_TD
    return out


def absorb(attention: LatentAttention, x_TD: Tensor, turns_NP: Tensor, first: int) -> Tensor:
    """Decodes the tokens from `first` on at once, over a cache with every token and garbage behind them."""
    cached = attention.latent_rows(x_TD, turns_NP)
    cached_1TC = torch.cat((cached, torch.full_like(cached[:2], 3.0)))[None]
    positions = torch.arange(first, TOKENS)
    future = torch.arange(TOKENS + 2) > positions[None, :, None]
    tail = turns_NP[first:]
    return attention.attend_absorbed(x_TD[first:], tail, cached_1TC, future)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-12)])
@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_absorbed_equals_expanded_and_training_form(shape: str, dtype: torch.dtype, tolerance: float) -> None:
    config = SHAPES[shape]
    block, hidden_TD, x_TD, turns_NP = rows(config, dtype)
    attention = block.self_attn
    assert isinstance(attention, LatentAttention)
    cached = attention.latent_rows(x_TD, turns_NP)
    whole = attention.attend_expanded(x_TD, turns_NP, cached, [TOKENS])
    torch.testing.assert_close(whole, trained_form(block, hidden_TD), rtol=tolerance, atol=tolerance)
    for first in (0, TOKENS - 2, TOKENS - 1):
        made = absorb(attention, x_TD, turns_NP, first)
        torch.testing.assert_close(made, whole[first:], rtol=tolerance, atol=tolerance)


@torch.no_grad()
def test_expanded_prompts_do_not_see_each_other() -> None:
    block, hidden_TD, x_TD, turns_NP = rows(MODEL, torch.float64)
    attention = block.self_attn
    assert isinstance(attention, LatentAttention)
    first = turns_NP[:4]
    both = torch.cat((turns_NP[:4], turns_NP[: TOKENS - 4]))
    made = attention.attend_expanded(x_TD, both, attention.latent_rows(x_TD, both), [4, TOKENS - 4])
    alone = attention.attend_expanded(x_TD[:4], first, attention.latent_rows(x_TD[:4], first), [4])
    torch.testing.assert_close(made[:4], alone, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(made[4:], trained_form(block, hidden_TD[4:]), rtol=1e-12, atol=1e-12)


def test_cache_of_v3_holds_576_values_per_token_and_layer() -> None:
    config = replace(MODEL, kv_lora_rank=512, qk_rope_head_dim=64)
    cache = KvCache(config.cached_values, 61, 3, torch.bfloat16, torch.device("meta"))
    assert config.cached_values == 576
    assert cache.num_bytes == 3 * BLOCK_TOKENS * 70272
