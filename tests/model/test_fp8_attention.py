"""Latent attention in FP8 against its formula in float64 over the same codes: output and every gradient."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention.mla import LATENT_NORM_EPS, LatentAttention
from model.attention.rope import rotate, rotation_table, softmax_scale
from model.config import ModelConfig
from model.gradients import GradientStore, WeightQueue
from model.norm import RmsNorm
from model.precision.fp8.linears import Fp8Linears
from tests.kernels.plain import randn
from tests.model.against_plain import randomize
from tests.model.fp8_plain import InFp8, Normed, expect, in_12_bits
from tests.tiny import MODEL

CONFIG = replace(
    MODEL,
    hidden_size=160,
    num_heads=3,
    q_lora_rank=136,
    kv_lora_rank=48,
    qk_nope_head_dim=24,
    qk_rope_head_dim=8,
    v_head_dim=20,
)
BATCH, TOKENS = 2, 70


class Core:
    """Queries, keys and values to what the heads mix, NV, whose backward reads that in 12 bits."""

    def __init__(self, config: ModelConfig, queries: Tensor, expanded: Tensor, shared: Tensor) -> None:
        """Stores queries, [N, H Q], keys without position and values, NE, and the shared key of all heads, NR."""
        self.leaves = [each.detach().requires_grad_() for each in (queries, expanded, shared)]
        heads, nope = config.num_heads, config.qk_nope_head_dim
        query, both, key = (
            each.view(BATCH, TOKENS, -1, size) for each, size in zip(self.leaves, _sizes(config), strict=True)
        )
        cos, sin = rotation_table(config, TOKENS, torch.float64)
        query = torch.cat([query[..., :nope], rotate(query[..., nope:], cos, sin)], -1)
        shared_key = rotate(key, cos, sin).expand(-1, -1, heads, -1)
        parts = query, torch.cat([both[..., :nope], shared_key], -1), both[..., nope:]
        self._parts = [part.transpose(1, 2) for part in parts]
        query, key, value = (part.detach() for part in self._parts)
        self._scale = softmax_scale(config)
        future = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
        self._shares = (query @ key.mT * self._scale).masked_fill(future, -torch.inf).softmax(-1)
        self.mixed_NV = (self._shares @ value).transpose(1, 2).flatten(2).flatten(0, 1)

    def backward(self, grad_NV: Tensor) -> tuple[Tensor, ...]:
        """Gradients of what it was made of."""
        query, key, value = (part.detach() for part in self._parts)
        grad, kept = (
            each.view(BATCH, TOKENS, -1, value.shape[-1]).transpose(1, 2)
            for each in (grad_NV, in_12_bits(self.mixed_NV))
        )
        slope = self._shares * (grad @ value.mT - (grad * kept).sum(-1, keepdim=True)) * self._scale
        torch.autograd.backward(self._parts, [slope @ key, slope.mT @ query, self._shares.mT @ grad])
        return tuple(leaf.grad for leaf in self.leaves if leaf.grad is not None)


def _sizes(config: ModelConfig) -> tuple[int, int, int]:
    return config.qk_head_dim, config.qk_nope_head_dim + config.v_head_dim, config.qk_rope_head_dim


def expected(
    codes: InFp8, config: ModelConfig, weights: dict[str, Tensor], norm: RmsNorm, x_ND: Tensor, slope_ND: Tensor
) -> dict[str, Tensor]:
    """Returns the output, and the gradient of x, of the norm and of every weight by name."""
    query_name = "q_proj.weight" if config.q_lora_rank is None else "q_a_proj.weight"
    down = [weights[query_name], weights["kv_a_proj_with_mqa.weight"]]
    normal = Normed.of(codes, x_ND, norm.weight, norm.eps)
    sizes = (len(down[0]), config.kv_lora_rank, config.qk_rope_head_dim)
    query, latent, shared = torch.cat([normal.kept_AD @ codes.weight(each).t() for each in down], 1).split(sizes, 1)
    latent_norm = Normed.of(codes, latent, weights["kv_a_layernorm.weight"], LATENT_NORM_EPS)
    expanded = latent_norm.kept_AD @ codes.weight(weights["kv_b_proj.weight"]).t()
    queries, query_norm = query, None
    if config.q_lora_rank is not None:
        query_norm = Normed.of(codes, query, weights["q_a_layernorm.weight"], LATENT_NORM_EPS)
        queries = query_norm.kept_AD @ codes.weight(weights["q_b_proj.weight"]).t()
    core = Core(config, queries, expanded, shared)
    out = weights["o_proj.weight"]
    found = {"output": x_ND.double() + codes.rows(core.mixed_NV, rounds=True) @ codes.weight(out).t()}
    found["o_proj.weight"] = codes.weight_gradient(slope_ND, in_12_bits(core.mixed_NV), rounds=True)
    grad_query, grad_expanded, grad_shared = core.backward(codes.gradient(slope_ND) @ codes.weight(out))

    def through(norm: Normed, name: str, up: str, grad: Tensor) -> Tensor:
        found[up] = codes.weight_gradient(grad, norm.kept_AD)
        grad_x, found[name] = norm.backward(codes.gradient(grad) @ codes.weight(weights[up]))
        return grad_x

    grad_latent = through(latent_norm, "kv_a_layernorm.weight", "kv_b_proj.weight", grad_expanded)
    if query_norm is not None:
        grad_query = through(query_norm, "q_a_layernorm.weight", "q_b_proj.weight", grad_query)
    grads = (grad_query, torch.cat([grad_latent, grad_shared], 1))
    found[query_name], found["kv_a_proj_with_mqa.weight"] = (
        codes.weight_gradient(each, normal.kept_AD) for each in grads
    )
    whole = sum(codes.gradient(grad) @ codes.weight(weight) for grad, weight in zip(grads, down, strict=True))
    assert isinstance(whole, Tensor)
    grad_x, found["norm"] = normal.backward(whole)
    found["x"] = slope_ND + grad_x
    return found


@pytest.mark.parametrize("query_rank", [None, 136, 128])
@pytest.mark.parametrize("is_split", [False, True])
@pytest.mark.parametrize("power_of_two", [False, True])
def test_attention_equals_the_formula(power_of_two: bool, is_split: bool, query_rank: int | None) -> None:
    config = replace(CONFIG, q_lora_rank=query_rank)
    attention = LatentAttention(config, torch.float32, "auto", Fp8Linears(power_of_two=power_of_two))
    norm = RmsNorm(config.hidden_size, config.norm_eps, torch.float32)
    randomize(attention, 1, 0.1)
    randomize(norm, 2, 0.3)
    x = randn(BATCH, TOKENS, config.hidden_size, seed=3, dtype=torch.float32).requires_grad_()
    slope = randn(*x.shape, seed=4)
    queue, weights = WeightQueue(), dict(attention.named_parameters())
    out = attention(x, norm, queue if is_split else None)
    out.backward(slope.float())
    maps = {name: weight for name, weight in weights.items() if "norm" not in name}
    store = GradientStore(maps.values())
    if is_split:
        assert all(weight.grad is None for weight in maps.values())
        queue.flush(store)
    plain = {name: weight.detach() for name, weight in weights.items()}
    exact = expected(InFp8(power_of_two), config, plain, norm, x.detach().flatten(0, 1), slope.flatten(0, 1))
    expect(out.flatten(0, 1), exact.pop("output"), "output")
    assert x.grad is not None
    expect(x.grad.flatten(0, 1), exact.pop("x"), "gradient of x")
    expect(norm.weight.grad, exact.pop("norm"), "gradient of the norm before")
    assert exact.keys() == weights.keys()
    for name, weight in weights.items():
        made = store.gradient(weight) if is_split and name in maps else weight.grad
        expect(made, exact[name], f"gradient of {name}")
