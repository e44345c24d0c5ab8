"""Tiny models for decoding, and a reference pass over whole sequences without a cache."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from comm.dispatch.local import LocalDispatcher
from model.block import Block, Moe
from model.config import ModelConfig, YarnRope
from model.transformer import Transformer, initialize_weights
from tests.tiny import MODEL

YARN = YarnRope(
    kind="yarn",
    factor=4.0,
    original_max_position_tokens=16,
    beta_fast=32.0,
    beta_slow=1.0,
    mscale=1.0,
    mscale_all_dim=1.0,
)
SHAPES = {
    "plain": MODEL,
    "yarn": replace(MODEL, rope_scaling=YARN),
    "no_q_lora": replace(MODEL, q_lora_rank=None),
    "pre_norm": replace(MODEL, mtp_hidden="pre_norm"),
    "wide_values": replace(MODEL, v_head_dim=16, num_shared_experts=0, num_dense_layers=0),
}
SMALL = replace(MODEL, num_layers=2)


def make_model(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 3) -> Transformer:
    """Builds a model with random weights and router biases."""
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    initialize_weights(model, seed)
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if hasattr(module, "e_score_correction_bias"):
            bias = module.e_score_correction_bias
            bias.copy_(torch.rand(bias.shape, generator=generator) * 0.2)  # type: ignore[arg-type, operator]
    return model


def make_foresighted(config: ModelConfig = SMALL, dtype: torch.dtype = torch.float64, seed: int = 3) -> Transformer:
    """Builds a model whose MTP module often, but not always, drafts the token that the main model chooses.

    The embeddings dominate the output of the layers, so both mostly depend on the last token.
    """
    model = make_model(config, dtype, seed)
    with torch.no_grad():
        assert model.model.embed_tokens is not None
        model.model.embed_tokens.weight.mul_(4.0)
        weight = model.mtp_block(1).eh_proj.weight
        size = config.hidden_size
        weight.copy_(torch.cat((torch.eye(size), 0.5 * torch.eye(size)), 1) * 0.4)
    return model


@torch.no_grad()
def whole_pass(model: Transformer, tokens_T: list[int]) -> tuple[Tensor, Tensor]:
    """Returns the logits of the main model (TV) and of the MTP module ((T - 1)V), computed without a cache."""
    config, tokens_1T = model.config, torch.tensor([tokens_T])
    hidden = model.embed(tokens_1T, None)
    for layer in range(config.num_layers):
        hidden = _layer(model.block(layer), hidden)
    normal = model.final_norm(0)(hidden)
    state = normal if config.mtp_hidden == "post_norm" else hidden
    block = model.mtp_block(1)
    merged = block.merge(model.embed(tokens_1T[:, 1:], None), state[:, :-1], None)
    drafted = model.final_norm(1)(_layer(block, merged))
    return functional.linear(normal, model.head_weight)[0], functional.linear(drafted, model.head_weight)[0]


def _layer(block: Block, hidden_1TD: Tensor) -> Tensor:
    residual = block.self_attn(hidden_1TD, block.input_layernorm, None)
    rows = block.post_attention_layernorm(residual)
    if isinstance(block.mlp, Moe):
        return residual + _experts(block.mlp, rows)
    return residual + block.mlp(rows, None)


def _experts(moe: Moe, rows_1TD: Tensor) -> Tensor:
    routing = moe.gate(rows_1TD)
    out = torch.zeros_like(rows_1TD) if moe.shared_experts is None else moe.shared_experts(rows_1TD, None)
    for token, (ids, weights) in enumerate(zip(routing.ids_TK.tolist(), routing.weights_TK, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            gate, up = functional.linear(rows_1TD[0, token], moe.experts.gate_up_proj[expert]).chunk(2)
            out[0, token] += weight * functional.linear(functional.silu(gate) * up, moe.experts.down_proj[expert])
    return out


def chi_square_limit(degrees: int) -> float:
    """Returns the limit that a chi-square statistic exceeds once in a million times (Wilson-Hilferty)."""
    part = 2 / (9 * degrees)
    return float(degrees * (1 - part + 4.7534 * part**0.5) ** 3)


def chi_square(counts: Tensor, probabilities: Tensor) -> tuple[float, float]:
    """Returns the chi-square statistic of counts and its limit; cells with fewer than 5 expected counts are merged.

    Cells of probability 0 must be empty.
    """
    expected = probabilities.flatten() * counts.sum()
    seen = counts.flatten().to(expected.dtype)
    assert not seen[expected == 0].any(), "something impossible was drawn"
    rare = expected < 5
    expected = torch.cat((expected[~rare], expected[rare].sum()[None]))
    seen = torch.cat((seen[~rare], seen[rare].sum()[None]))
    kept = expected > 1e-9 * counts.sum()
    statistic = ((seen - expected).square() / expected)[kept].sum()
    return float(statistic), chi_square_limit(max(int(kept.sum()) - 1, 1))
