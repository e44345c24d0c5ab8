"""Attention and the MTP merge against a reading of the paper, head by head and token by token."""

import cmath
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.mla import LatentAttention
from model.config import Computing, ModelConfig
from model.head import MtpBlock
from model.norm import RmsNorm
from model.transformer import build_linears
from tests.tiny import MODEL


def randomize(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean() + 1e-6).sqrt() * weight


def turned(x: Tensor, position: int, config: ModelConfig) -> Tensor:
    pairs = []
    for pair in range(len(x) // 2):
        angle = position * config.rope_theta ** (-2 * pair / len(x))
        value = complex(float(x[2 * pair]), float(x[2 * pair + 1])) * cmath.exp(1j * angle)
        pairs += [value.real, value.imag]
    return torch.tensor(pairs, dtype=torch.float64)


@torch.no_grad()
def by_hand(attention: LatentAttention, x_TD: Tensor, config: ModelConfig) -> Tensor:
    plain, rope, size = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    queries, keys, values = [], [], []
    for position, x in enumerate(x_TD):
        if config.q_lora_rank is None:
            query = attention.q_proj.weight @ x
        else:
            query = attention.q_b_proj.weight @ norm(attention.q_a_proj.weight @ x, attention.q_a_layernorm.weight)
        both = attention.kv_a_proj_with_mqa.weight @ x
        latent = norm(both[: config.kv_lora_rank], attention.kv_a_layernorm.weight)
        shared_key = turned(both[config.kv_lora_rank :], position, config)
        expanded = (attention.kv_b_proj.weight @ latent).view(config.num_heads, plain + size)
        heads = query.view(config.num_heads, plain + rope)
        queries.append([torch.cat((head[:plain], turned(head[plain:], position, config))) for head in heads])
        keys.append([torch.cat((head[:plain], shared_key)) for head in expanded])
        values.append([head[plain:] for head in expanded])
    out = []
    for position in range(len(x_TD)):
        mixed = []
        for head in range(config.num_heads):
            seen = range(position + 1)
            scores = torch.stack([queries[position][head] @ keys[other][head] for other in seen])
            weights = (scores * (plain + rope) ** -0.5).softmax(0)
            mixed.append(sum(weight * values[other][head] for weight, other in zip(weights, seen, strict=True)))
        out.append(attention.o_proj.weight @ torch.cat([head for head in mixed if isinstance(head, Tensor)]))
    return torch.stack(out)


@pytest.mark.parametrize("q_lora_rank", [16, None])
def test_attention_equals_plain_reading(q_lora_rank: int | None) -> None:
    config = replace(MODEL, q_lora_rank=q_lora_rank)
    attention = LatentAttention(config, torch.float64, "auto", build_linears(Computing()))
    norm_before = RmsNorm(config.hidden_size, 1e-6, torch.float64)
    randomize(attention, 1)
    x = torch.randn(2, 7, config.hidden_size, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 0.1
    with torch.no_grad():
        made = attention(x, norm_before, None) - x
    for sequence in range(2):
        torch.testing.assert_close(
            made[sequence], by_hand(attention, norm_before(x)[sequence], config), rtol=1e-9, atol=1e-9
        )


def test_mtp_merge_reads_embedding_first() -> None:
    linears = build_linears(Computing())
    attention = LatentAttention(MODEL, torch.float64, "auto", linears)
    block = MtpBlock(MODEL, range(8), torch.float64, attention, linears)
    randomize(block, 3)
    embedded, hidden = torch.randn(2, 1, 1, 32, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    with torch.no_grad():
        made = block.merge(embedded, hidden, None)[0, 0]
        both = norm(embedded[0, 0], block.enorm.weight), norm(hidden[0, 0], block.hnorm.weight)
        expected = block.eh_proj.weight @ torch.cat(both)
    torch.testing.assert_close(made, expected, rtol=1e-10, atol=1e-10)
