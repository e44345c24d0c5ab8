"""Latent attention over the latent cache: absorbed for decoding, expanded for prompts and in FP8.

In the absorbed form, the keys' up-projection is applied to the queries and the values' up-projection after the mixing.
Every head then reads the same cached latent (arXiv:2405.04434, section 2.1.2; arXiv:2412.19437, 2.1.1).
Shape legend: S new tokens of each sequence, N new tokens of all, T positions, C cached values per token, P rotated
pairs, Q query values per head, L latent size, R rotated values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from model.attention.projections import LatentOptions, LatentProjections, LatentWeights, rows_of_heads
from model.attention.rope import Rotation, rotate_, softmax_scale
from model.config import ModelConfig
from model.precision.linear import widen
from model.precision.linears import Linears

_KEYS = 16
"""Keys whose weights a kernel sums as one vector."""


def compute_latent_rows(attention: LatentProjections, config: ModelConfig, x_ND: Tensor, rotation: Rotation) -> Tensor:
    """Computes what the cache keeps of each token: normalized latent and rotated shared key, NC."""
    both_NC = functional.linear(x_ND, attention.kv_a_proj_with_mqa.weight)
    latent_NL, key_NR = both_NC.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    return torch.cat((attention.kv_a_layernorm(latent_NL), rotation.turn(key_NR[:, None])[:, 0]), -1)


def attend_absorbed(
    attention: LatentProjections,
    config: ModelConfig,
    x_ND: Tensor,
    rotation: Rotation,
    cached_BTC: Tensor,
    future_BST: Tensor | None,
) -> Tensor:
    """Computes attention of S new tokens of each sequence over the cache, which already holds them, ND.

    Args:
        x_ND: normalized hidden states, N = B S, sequence by sequence.
        future_BST: True if a token must not see a position; None if every token sees every position.
    """
    num_sequences, num_heads, rank = len(cached_BTC), config.num_heads, config.kv_lora_rank
    up_HKL = attention.kv_b_proj.weight.view(num_heads, -1, rank)
    key_up_HKL, value_up_HVL = up_HKL.split([config.qk_nope_head_dim, config.v_head_dim], 1)
    plain_NHK, rope_NHR = _query(attention, config, x_ND, rotation)
    latent_HNL = torch.bmm(plain_NHK.transpose(0, 1), key_up_HKL)
    query_HNC = torch.cat((latent_HNL, rope_NHR.transpose(0, 1)), -1) * softmax_scale(config)
    query_BMC = query_HNC.view(num_heads, num_sequences, -1, query_HNC.shape[-1]).transpose(0, 1).flatten(1, 2)
    scores_BHST = widen(torch.bmm(query_BMC, cached_BTC.transpose(1, 2))).unflatten(1, (num_heads, -1))
    if future_BST is not None:
        scores_BHST = scores_BHST.masked_fill(future_BST[:, None], -torch.inf)
    weights_BMT = scores_BHST.softmax(-1).to(x_ND.dtype).flatten(1, 2)
    mixed_BHSL = torch.bmm(weights_BMT, cached_BTC[..., :rank]).unflatten(1, (num_heads, -1))
    mixed_HNL = mixed_BHSL.transpose(0, 1).flatten(1, 2)
    out_HNV = torch.bmm(mixed_HNL, value_up_HVL.transpose(1, 2))
    return functional.linear(out_HNV.transpose(0, 1).flatten(1), attention.o_proj.weight)


def attend_expanded(
    attention: LatentProjections,
    config: ModelConfig,
    x_ND: Tensor,
    rotation: Rotation,
    cached_NC: Tensor,
    counts: Sequence[int],
) -> Tensor:
    """Computes causal attention within each of several consecutive prompts of `counts` tokens, ND."""
    key_NHQ, value_NHV = _expand(attention, config, cached_NC)
    query_NHQ = torch.cat(_query(attention, config, x_ND, rotation), -1)
    mixed, first = [], 0
    for count in counts:
        own = slice(first, first + count)
        query_1HTQ, key_1HTQ, value_1HTV = (x[own].transpose(0, 1)[None] for x in (query_NHQ, key_NHQ, value_NHV))
        mixed_1HTV = functional.scaled_dot_product_attention(
            query_1HTQ, key_1HTQ, value_1HTV, is_causal=True, scale=softmax_scale(config)
        )
        mixed.append(mixed_1HTV[0, ..., : config.v_head_dim].transpose(0, 1).flatten(1))
        first += count
    return functional.linear(torch.cat(mixed), attention.o_proj.weight)


def attend_cached(
    attention: LatentProjections,
    config: ModelConfig,
    x_ND: Tensor,
    rotation: Rotation,
    cached_BTC: Tensor,
    future_BST: Tensor,
) -> Tensor:
    """Computes `attend_absorbed` from expanded keys and values, for many new tokens, ND."""
    query_BSHQ = torch.cat(_query(attention, config, x_ND, rotation), -1).unflatten(0, (len(cached_BTC), -1))
    mixed = []
    for query_SHQ, cached_TC, future_ST in zip(query_BSHQ, cached_BTC, future_BST, strict=True):
        key_THQ, value_THV = _expand(attention, config, cached_TC)
        query_1HSQ, key_1HTQ, value_1HTV = (x.transpose(0, 1)[None] for x in (query_SHQ, key_THQ, value_THV))
        mixed_1HSV = functional.scaled_dot_product_attention(
            query_1HSQ, key_1HTQ, value_1HTV, attn_mask=~future_ST, scale=softmax_scale(config)
        )
        mixed.append(mixed_1HSV[0, ..., : config.v_head_dim].transpose(0, 1).flatten(1))
    return functional.linear(torch.cat(mixed), attention.o_proj.weight)


def add_attention_over_cache(
    hidden_ND: Tensor,
    compressed_NX: Tensor,
    cached_BTC: Tensor,
    future_BST: Tensor | None,
    weights: LatentWeights,
    options: LatentOptions,
    linears: Linears,
) -> Tensor:
    """Returns hidden + attention of S new tokens of each sequence over the cache as in training, ND.

    Keys and values of all positions are expanded in each pass. The absorbed form would round other numbers, and FP8
    magnifies any difference. `cached_BTC` holds latents before their norm and rotated shared keys, also of the new
    tokens.
    """
    shape, (num_sequences, num_positions) = options.shape, cached_BTC.shape[:2]
    if future_BST is None:
        future_BST = cached_BTC.new_zeros(num_sequences, 1, num_positions, dtype=torch.bool)
    cached_BTC = pad_tokens(cached_BTC)
    mask_B1ST = ~functional.pad(future_BST, (0, cached_BTC.shape[1] - num_positions), value=True)[:, None]
    heads = (num_sequences, -1, shape.num_heads)
    new = linears.compress_latents(compressed_NX[None], weights, options)
    query_NHQ = compressed_NX.new_empty(len(compressed_NX), shape.num_heads, shape.nope + shape.rope)
    new.queries(query_NHQ.flatten(1))
    rotate_(query_NHQ[..., shape.nope :], *options.rotation)
    # Rows of the cache have no queries before their latents.
    cached = linears.compress_latents(cached_BTC, weights._replace(query_norm=None, query_up=None), options)
    key_NHQ, value_NHV = _to_heads(
        cached.keys_and_values(), cached.shared_key().flatten(0, 1), shape.num_heads, shape.value
    )
    query, key, value = (each.view(*heads, each.shape[-1]).transpose(1, 2) for each in (query_NHQ, key_NHQ, value_NHV))
    mixed_BHSV = functional.scaled_dot_product_attention(query, key, value, mask_B1ST, scale=shape.scale)
    return new.add(hidden_ND, rows_of_heads(mixed_BHSV, shape.value))


def pad_tokens(values: Tensor) -> Tensor:
    """Appends tokens of zeros, so that sums over whole vectors of keys are those of longer sequences."""
    return functional.pad(values, (0, 0, 0, -values.shape[-2] % _KEYS))


def _expand(attention: LatentProjections, config: ModelConfig, cached_NC: Tensor) -> tuple[Tensor, Tensor]:
    latent_NL, shared_NR = cached_NC.split([config.kv_lora_rank, config.qk_rope_head_dim], -1)
    up_NE = functional.linear(latent_NL, attention.kv_b_proj.weight)
    return _to_heads(up_NE, shared_NR, config.num_heads, config.v_head_dim)


def _to_heads(up_NE: Tensor, shared_NR: Tensor, num_heads: int, value: int) -> tuple[Tensor, Tensor]:
    """Returns keys, NHQ, and padded values from the up-projections and the rotated shared key."""
    up_NHK = up_NE.unflatten(-1, (num_heads, -1))
    key_NHK, value_NHV = up_NHK[..., :-value], up_NHK[..., -value:]
    key_NHQ = torch.cat((key_NHK, shared_NR[:, None].expand(-1, num_heads, -1)), -1)
    # Flash kernels require heads of one size: values are padded with zeros, and results are cut again.
    padding = key_NHQ.shape[-1] - value
    return key_NHQ, functional.pad(value_NHV, (0, padding)) if padding > 0 else value_NHV


def _query(
    attention: LatentProjections, config: ModelConfig, x_ND: Tensor, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """Computes each head's query: the part without position, and the rotated part."""
    if config.q_lora_rank is None:
        query = functional.linear(x_ND, attention.q_proj.weight)
    else:
        low = attention.q_a_layernorm(functional.linear(x_ND, attention.q_a_proj.weight))
        query = functional.linear(low, attention.q_b_proj.weight)
    query_NHQ = query.unflatten(-1, (config.num_heads, config.qk_head_dim))
    plain_NHK, rope_NHR = query_NHQ.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
    return plain_NHK, rotation.turn(rope_NHR)
