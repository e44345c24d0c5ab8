"""Multi-head latent attention: expanded in training, absorbed in decoding unless products are in FP8.

Source: arXiv:2412.19437, section 2.1.1. Shape legend: N new tokens, C cached values per token, X = C plus queries.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from comm.context.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from model.attention.absorbed import (
    add_attention_over_cache,
    attend_absorbed,
    attend_cached,
    attend_expanded,
    compute_latent_rows,
    pad_tokens,
)
from model.attention.context import mix_in_context
from model.attention.core import mix
from model.attention.form import AttentionForm
from model.attention.kv_cache import CacheView, PromptView, StepView
from model.attention.projections import LATENT_NORM_EPS, LatentOptions, LatentProjections, LatentShape, LatentWeights
from model.attention.rope import rotation_table, softmax_scale
from model.config import ModelConfig
from model.norm import RmsNorm
from model.precision.linear import WeightSink
from model.precision.linears import Linears

# From so many new tokens of a sequence on, keys and values of all positions are computed once, which then costs less
# than scores between every head's query and the latents.
EXPANDED_TOKENS = 64


class LatentAttention(LatentProjections):
    """Attention with low-rank queries, and keys and values from a latent and a rotated key of all heads."""

    def __init__(
        self,
        config: ModelConfig,
        dtype: torch.dtype,
        kernel: str,
        linears: Linears,
    ) -> None:
        super().__init__(config, dtype)
        self._linears = linears
        self._shape = LatentShape(
            num_heads=config.num_heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            eps=LATENT_NORM_EPS,
            scale=softmax_scale(config),
        )
        self._options = partial(LatentOptions, shape=self._shape, kernel=kernel)
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self,
        x_BTD: Tensor,
        norm: RmsNorm,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Implements `Attention.forward`."""
        compressed_BTX, weights = self._compress(x_BTD, norm, sink)
        options = self._options(
            rotation=self._rotation(x_BTD, context),
            documents=documents,
            sink=sink,
            records=torch.is_grad_enabled(),
            context=context,
        )
        if context.size > 1:
            return mix_in_context(x_BTD, compressed_BTX, weights, options, self._linears)
        return mix(x_BTD, compressed_BTX, weights, options, self._linears)

    def _compress(self, x: Tensor, norm: RmsNorm, sink: WeightSink | None) -> tuple[Tensor, LatentWeights]:
        """Returns compressed queries (or whole ones), latents and shared key, [..., X], and other weights."""
        has_latent = self._config.q_lora_rank is not None
        query_weight = self.q_a_proj.weight if has_latent else self.q_proj.weight
        compressed = self._linears.normed_linear(x, norm, (query_weight, self.kv_a_proj_with_mqa.weight), sink)
        return compressed, LatentWeights(
            query_norm=self.q_a_layernorm.weight if has_latent else None,
            query_up=self.q_b_proj.weight if has_latent else None,
            latent_norm=self.kv_a_layernorm.weight,
            latent_up=self.kv_b_proj.weight,
            out=self.o_proj.weight,
        )

    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Implements `Attention.decode`: expanded over whole prompts, absorbed over the cache."""
        if self._linears.decodes_as_trained:
            return self._decode_as_trained(hidden_ND, norm, view)
        x_ND: Tensor = norm(hidden_ND)
        values_NC = compute_latent_rows(self, self._config, x_ND, view.rotation)
        view.write(values_NC)
        given = (self, self._config, x_ND, view.rotation)
        match view:
            case PromptView():
                return hidden_ND + attend_expanded(*given, values_NC, view.counts)
            case StepView() if view.positions_BS.shape[1] >= EXPANDED_TOKENS:
                assert view.future_BST is not None
                return hidden_ND + attend_cached(*given, view.read(), view.future_BST)
            case StepView():
                return hidden_ND + attend_absorbed(*given, view.read(), view.future_BST)

    def _decode_as_trained(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Decodes with the products of training, which start from latents before their norm."""
        compressed_NX, weights = self._compress(hidden_ND, norm, None)
        rows_NC = compressed_NX[:, -values_per_token(self._config) :].clone()
        rotated_NR = rows_NC[:, self._config.kv_lora_rank :]
        rotated_NR.copy_(view.rotation.turn(rotated_NR[:, None])[:, 0])
        view.write(rows_NC)
        rotation = (view.rotation.cos_NP, view.rotation.sin_NP)
        options = self._options(rotation=rotation, documents=None, sink=None, records=False)
        if isinstance(view, StepView):
            given = (weights, options, self._linears)
            return add_attention_over_cache(hidden_ND, compressed_NX, view.read(), view.future_BST, *given)
        split, prompts = (
            [each.split(list(view.counts)) for each in (hidden_ND, compressed_NX, *rotation)],
            list[Tensor](),
        )
        for parts in zip(*split, strict=True):
            hidden_TD, compressed_TX, *turns = (pad_tokens(each) for each in parts)
            own = replace(options, rotation=(turns[0], turns[1]))
            mixed_1TD = mix(hidden_TD[None], compressed_TX[None], weights, own, self._linears)
            prompts.append(mixed_1TD[0, : len(parts[0])])
        return torch.cat(prompts)

    def _rotation(self, x_BTD: Tensor, context: ContextGroup) -> tuple[Tensor, Tensor]:
        """Returns cos and sin of all positions of the sequences, of which this rank may hold a part."""
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        num_positions = context.parts(x_BTD.shape[1]).num_tokens
        key = (num_positions, x_BTD.device, dtype)
        if key not in self._tables:
            cos, sin = rotation_table(self._config, num_positions, dtype)
            self._tables = {key: (cos.to(x_BTD.device), sin.to(x_BTD.device))}
        return self._tables[key]


def values_per_token(config: ModelConfig) -> int:
    """Returns how many values a layer caches of a token: 512 + 64 = 576 for DeepSeek-V3."""
    return config.kv_lora_rank + config.qk_rope_head_dim


LATENT_ATTENTION = AttentionForm(name="mla", build=LatentAttention, values_per_token=values_per_token)
