"""Multi-head latent attention: expanded in training, absorbed in decoding unless products are in FP8.

Source: arXiv:2412.19437, section 2.1.1. In the absorbed form, the keys' up-projection is applied to the queries and the
values' up-projection after the mixing. Every head then reads the same cached latent (arXiv:2405.04434, section 2.1.2).
The cache keeps a normalized latent and a rotated key of all heads. Positions rotate interleaved pairs.
Shape legend: S new tokens of each sequence, N new tokens of all, T positions, C cached values per token, X = C plus
queries, Q query values per head, L latent size, R rotated values.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from comm.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from kernels.few_rows import few_rows_linear
from kernels.heads import rotate_
from model.attention.cache import CacheView, PromptView, StepView
from model.attention.context import mix_in_context
from model.attention.core import mix
from model.attention.form import Attention, RotationTable, softmax_scale
from model.config import MlaConfig
from model.linear import Projection, WeightSink, join_storage, widen
from model.norm import RmsNorm
from model.precision.linears import LatentOptions, LatentShape, LatentWeights, Linears, rows_of_heads

# From so many new tokens of a sequence on, keys and values of all positions are computed once, which then costs less
# than scores between every head's query and the latents.
EXPANDED_TOKENS = 64
# The released code uses its class default for these two norms, independent of the model's eps.
LATENT_NORM_EPS = 1e-6
_KEYS = 16
"""Keys whose weights a kernel sums as one vector."""


class LatentAttention(Attention):
    """Attention with low-rank queries, and keys and values from a latent and a rotated key of all heads.

    The weights have the released checkpoint's names.
    """

    def __init__(self, config: MlaConfig, dtype: torch.dtype, kernel: str, linears: Linears) -> None:
        super().__init__()
        self._config = config
        heads = config.num_heads
        hidden = config.hidden_size
        # Queries come directly from the hidden state, or through a latent (arXiv:2412.19437, equation 6).
        query_size = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Projection(hidden, query_size, dtype)
        else:
            self.q_a_proj = Projection(hidden, config.q_lora_rank, dtype)
            self.q_a_layernorm = RmsNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype)
            self.q_b_proj = Projection(config.q_lora_rank, query_size, dtype)
        # One matrix gives the latent of keys and values and the shared key.
        latent = config.kv_lora_rank
        self.kv_a_proj_with_mqa = Projection(hidden, latent + config.qk_rope_head_dim, dtype)
        join_storage(self.q_proj if config.q_lora_rank is None else self.q_a_proj, self.kv_a_proj_with_mqa)
        self.kv_a_layernorm = RmsNorm(latent, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Projection(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype)
        self.o_proj = Projection(heads * config.v_head_dim, hidden, dtype)
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
        self._latent_sizes = (config.kv_lora_rank, config.qk_rope_head_dim)
        self._options = partial(LatentOptions, shape=self._shape, kernel=kernel)
        self._table = RotationTable(config)

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
            turns_TP=self._table.turns(x_BTD, context),
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
        # One product of the norm with both matrices side by side: [..., R + C].
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
        x_ND = norm.decode(hidden_ND)
        # New tokens enter the cache first, because they attend to themselves too.
        values_NC = self.latent_rows(x_ND, view.turns_NP)
        view.write(values_NC)
        match view:
            case PromptView():
                return hidden_ND + self.attend_expanded(x_ND, view.turns_NP, values_NC, view.counts)
            case StepView() if view.positions_BS.shape[1] >= EXPANDED_TOKENS:
                assert view.future_BST is not None
                return hidden_ND + self._attend_cached(x_ND, view.turns_NP, view.read(), view.future_BST)
            case StepView():
                return hidden_ND + self.attend_absorbed(x_ND, view.turns_NP, view.read(), view.future_BST)

    def latent_rows(self, x_ND: Tensor, turns_NP: Tensor) -> Tensor:
        """Computes what the cache keeps of each token: normalized latent and rotated shared key, NC."""
        both_NC = few_rows_linear(x_ND, self.kv_a_proj_with_mqa.weight)
        latent_NL, key_NR = both_NC.split_with_sizes(self._latent_sizes, -1)
        rotate_(key_NR.unsqueeze(1), turns_NP)
        return torch.cat((self.kv_a_layernorm.decode(latent_NL), key_NR), -1)

    def attend_absorbed(self, x_ND: Tensor, turns_NP: Tensor, cached_BTC: Tensor, future_BST: Tensor | None) -> Tensor:
        """Computes attention of S new tokens of each sequence over the cache, which already holds them, ND.

        Args:
            x_ND: normalized hidden states, N = B S, sequence by sequence.
            future_BST: True if a token must not see a position; None if every token sees every position.
        """
        num_sequences, num_positions, cache_width = cached_BTC.shape
        num_heads, rank = self._shape.num_heads, self._shape.latent
        # The up-projection of each head: keys without position, then values.
        up_HKL = self.kv_b_proj.weight.view(num_heads, -1, rank)
        key_up_HKL, value_up_HVL = up_HKL.split_with_sizes((self._shape.nope, self._shape.value), 1)
        plain_NHK, rope_NHR = self._query(x_ND, turns_NP)
        # q^T (W c) = (W^T q)^T c: queries enter the latent space, and no key is expanded. [H, N, L].
        latent_HNL = torch.bmm(plain_NHK.transpose(0, 1), key_up_HKL)
        query_NHC = torch.cat((latent_HNL.transpose(0, 1), rope_NHR), -1).mul_(self._shape.scale)
        # All heads of a sequence are rows of one product, as they read the same keys: M = S H.
        query_BMC = query_NHC.view(num_sequences, -1, cache_width)
        scores_BMT = widen(torch.bmm(query_BMC, cached_BTC.transpose(1, 2)))
        if future_BST is not None:
            scores_BSHT = scores_BMT.view(num_sequences, -1, num_heads, num_positions)
            scores_BMT = scores_BSHT.masked_fill(future_BST.unsqueeze(2), -torch.inf).flatten(1, 2)
        # Mix latents instead of values: [B, M, L].
        weights_BMT = scores_BMT.softmax(-1).to(x_ND.dtype)
        mixed_NHL = torch.bmm(weights_BMT, cached_BTC[..., :rank]).view(-1, num_heads, rank)
        # Values are expanded after the mixing: one vector per head and new token.
        out_HNV = torch.bmm(mixed_NHL.transpose(0, 1), value_up_HVL.transpose(1, 2))
        return few_rows_linear(out_HNV.transpose(0, 1).flatten(1), self.o_proj.weight)

    def attend_expanded(self, x_ND: Tensor, turns_NP: Tensor, cached_NC: Tensor, counts: Sequence[int]) -> Tensor:
        """Computes causal attention within each of several consecutive prompts of `counts` tokens, ND."""
        # Prompts are split, because none may see another: lists of [T, H, Q].
        query_NHQ = torch.cat(self._query(x_ND, turns_NP), -1)
        tensors = (query_NHQ, *self._expand(cached_NC))
        prompts = zip(*(tensor.split(list(counts)) for tensor in tensors), strict=True)
        mixed = [self._mix_heads(query, key, value, None) for query, key, value in prompts]
        return functional.linear(torch.cat(mixed), self.o_proj.weight)

    def _attend_cached(self, x_ND: Tensor, turns_NP: Tensor, cached_BTC: Tensor, future_BST: Tensor) -> Tensor:
        """Computes `attend_absorbed` from expanded keys and values, for many new tokens, ND."""
        # Sequence by sequence, so that the keys of only one are expanded at a time.
        query_BSHQ = torch.cat(self._query(x_ND, turns_NP), -1).unflatten(0, (len(cached_BTC), -1))
        sequences = zip(query_BSHQ, cached_BTC, future_BST, strict=True)
        mixed = [self._mix_heads(query, *self._expand(cached), future) for query, cached, future in sequences]
        return functional.linear(torch.cat(mixed), self.o_proj.weight)

    def _mix_heads(self, query_SHQ: Tensor, key_THQ: Tensor, value_THV: Tensor, future_ST: Tensor | None) -> Tensor:
        """Mixes the values of one sequence, [S, H V]; causal if nothing is masked."""
        query_1HSQ, key_1HTQ, value_1HTV = (x.transpose(0, 1)[None] for x in (query_SHQ, key_THQ, value_THV))
        # The kernel's mask says what is visible.
        mask_ST = None if future_ST is None else ~future_ST
        mixed_1HSV = functional.scaled_dot_product_attention(
            query_1HSQ, key_1HTQ, value_1HTV, mask_ST, is_causal=mask_ST is None, scale=self._shape.scale
        )
        return mixed_1HSV[0, ..., : self._shape.value].transpose(0, 1).flatten(1)

    def _expand(self, cached_NC: Tensor) -> tuple[Tensor, Tensor]:
        # The cached latent is already normalized, and the shared key already rotated.
        latent_NL, shared_NR = cached_NC.split([self._config.kv_lora_rank, self._config.qk_rope_head_dim], -1)
        up_NE = functional.linear(latent_NL, self.kv_b_proj.weight)
        return _to_heads(up_NE, shared_NR, self._shape.num_heads, self._shape.value)

    def _query(self, x_ND: Tensor, turns_NP: Tensor) -> tuple[Tensor, Tensor]:
        """Computes each head's query: the part without position, and the rotated part."""
        shape = self._shape
        if self._config.q_lora_rank is None:
            query = few_rows_linear(x_ND, self.q_proj.weight)
        else:
            # Down, norm, up: [N, H Q].
            low = self.q_a_layernorm.decode(few_rows_linear(x_ND, self.q_a_proj.weight))
            query = few_rows_linear(low, self.q_b_proj.weight)
        # Only the last part of each head has a position.
        query_NHQ = query.view(-1, shape.num_heads, shape.nope + shape.rope)
        plain_NHK, rope_NHR = query_NHQ.split_with_sizes((shape.nope, shape.rope), -1)
        rotate_(rope_NHR, turns_NP)
        return plain_NHK, rope_NHR

    def _decode_as_trained(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Decodes with the products of training, which start from latents before their norm."""
        compressed_NX, weights = self._compress(hidden_ND, norm, None)
        # The cache holds latents before their norm here, since the products of training start there.
        rows_NC = compressed_NX[:, -self._config.cached_values :].clone()
        rotated_NR = rows_NC[:, self._config.kv_lora_rank :]
        rotate_(rotated_NR[:, None], view.turns_NP)
        view.write(rows_NC)
        options = self._options(turns_TP=view.turns_NP, documents=None, sink=None, records=False)
        if isinstance(view, StepView):
            return self._add_over_cache(hidden_ND, compressed_NX, view, weights, options)
        prompts: list[Tensor] = []
        tensors = (hidden_ND, compressed_NX, view.turns_NP)
        # Each prompt is one sequence, padded as in training: [1, T, ...].
        for parts in zip(*(tensor.split(list(view.counts)) for tensor in tensors), strict=True):
            hidden_TD, compressed_TX, turns_TP = map(_pad_tokens, parts)
            prompt_options = replace(options, turns_TP=turns_TP)
            mixed_1TD = mix(hidden_TD[None], compressed_TX[None], weights, prompt_options, self._linears)
            prompts.append(mixed_1TD[0, : len(parts[0])])
        return torch.cat(prompts)

    def _add_over_cache(
        self,
        hidden_ND: Tensor,
        compressed_NX: Tensor,
        view: StepView,
        weights: LatentWeights,
        options: LatentOptions,
    ) -> Tensor:
        """Returns hidden + attention of S new tokens of each sequence over the cache as in training, ND.

        Keys and values of all positions are expanded in each pass. The absorbed form would round other numbers, and FP8
        magnifies any difference. The cache holds latents before their norm and rotated shared keys.
        """
        cached_BTC = view.read()
        future_BST = view.future_BST
        shape = self._shape
        num_sequences, num_positions = cached_BTC.shape[:2]
        # One new token sees all positions; only padding is hidden then.
        if future_BST is None:
            future_BST = cached_BTC.new_zeros(num_sequences, 1, num_positions, dtype=torch.bool)
        # Padded keys are masked: [B, 1, S, T].
        cached_BTC = _pad_tokens(cached_BTC)
        mask_B1ST = ~functional.pad(future_BST, (0, cached_BTC.shape[1] - num_positions), value=True)[:, None]
        heads = (num_sequences, -1, shape.num_heads)
        # Queries of the new tokens, rotated in place: [N, H, Q].
        new = self._linears.compress_latents(compressed_NX[None], weights, options)
        query_NHQ = compressed_NX.new_empty(len(compressed_NX), shape.num_heads, shape.nope + shape.rope)
        new.queries(query_NHQ.flatten(1))
        rotate_(query_NHQ[..., shape.nope :], options.turns_TP)
        # Rows of the cache have no queries before their latents.
        cached = self._linears.compress_latents(cached_BTC, weights._replace(query_norm=None, query_up=None), options)
        key_NHQ, value_NHV = _to_heads(
            cached.keys_and_values(), cached.shared_key().flatten(0, 1), shape.num_heads, shape.value
        )
        query, key, value = (
            tensor.view(*heads, tensor.shape[-1]).transpose(1, 2) for tensor in (query_NHQ, key_NHQ, value_NHV)
        )
        mixed_BHSV = functional.scaled_dot_product_attention(query, key, value, mask_B1ST, scale=shape.scale)
        return new.add(hidden_ND, rows_of_heads(mixed_BHSV, shape.value))


def _pad_tokens(values: Tensor) -> Tensor:
    """Appends tokens of zeros, so that sums over whole vectors of keys are those of longer sequences."""
    return functional.pad(values, (0, 0, 0, -values.shape[-2] % _KEYS))


def _to_heads(up_NE: Tensor, shared_NR: Tensor, num_heads: int, value: int) -> tuple[Tensor, Tensor]:
    """Returns keys, NHQ, and padded values from the up-projections and the rotated shared key."""
    # Each head: key without position, then value.
    up_NHK = up_NE.unflatten(-1, (num_heads, -1))
    key_NHK = up_NHK[..., :-value]
    value_NHV = up_NHK[..., -value:]
    key_NHQ = torch.cat((key_NHK, shared_NR[:, None].expand(-1, num_heads, -1)), -1)
    # Flash kernels require heads of one size: values are padded with zeros, and results are cut again.
    padding = key_NHQ.shape[-1] - value
    return key_NHQ, functional.pad(value_NHV, (0, padding)) if padding > 0 else value_NHV
