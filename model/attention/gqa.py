"""Grouped-query attention: several heads of queries read one head of keys and values.

Source: arXiv:2305.13245; norms of queries and keys as in Qwen3 (arXiv:2505.09388). The first half of a head rotates
with the second one. The cache keeps rotated keys, then values. Shape legend: S new tokens of each sequence, N new
tokens of all, T positions, H heads of queries, G heads of keys and values, Q values per head, C cached values per
token.
"""

import torch
from torch import Tensor
from torch.nn import functional

from comm.protocol import ALONE, ContextGroup
from kernels.attention import choose_attention
from kernels.attention.documents import Documents
from model.attention.cache import CacheView, PromptView
from model.attention.form import Attention, RotationTable, softmax_scale
from model.config import GqaConfig
from model.linear import Projection, WeightSink, join_storage
from model.norm import RmsNorm
from model.precision.linears import Linears


class GroupedAttention(Attention):
    """Attention with fewer heads of keys and values than of queries.

    The weights have the names of Qwen3's files.
    """

    def __init__(self, config: GqaConfig, dtype: torch.dtype, kernel: str, linears: Linears) -> None:
        super().__init__()
        hidden, size = config.hidden_size, config.head_dim
        heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
        self.q_proj, self.k_proj, self.v_proj = (Projection(hidden, number * size, dtype) for number in heads)
        join_storage(self.q_proj, self.k_proj, self.v_proj)
        self.o_proj = Projection(config.num_heads * size, hidden, dtype)
        self.q_norm = RmsNorm(size, config.norm_eps, dtype) if config.qk_norm else None
        self.k_norm = RmsNorm(size, config.norm_eps, dtype) if config.qk_norm else None
        self._linears = linears
        self._kernel = kernel
        self._heads = heads
        self._size = size
        self._scale = softmax_scale(config)
        self._table = RotationTable(config)

    def forward(
        self,
        x_BTD: Tensor,
        norm: RmsNorm,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Implements `Attention.forward`, for whole sequences."""
        if context.size > 1:
            raise ValueError("model.attention: gqa needs whole sequences, is given parts; nearest valid: mla")
        query_BTHQ, key_BTGQ, value_BTGQ = self._project(x_BTD, norm, sink, self._table.turns(x_BTD, context))
        # Kernels take BHTQ, with a head of keys and values for each head of queries.
        heads = (query_BTHQ, self._repeat(key_BTGQ), self._repeat(value_BTGQ))
        query_BHTQ, key_BHTQ, value_BHTQ = (each.transpose(1, 2) for each in heads)
        kernel = choose_attention(self._kernel, x_BTD.device, x_BTD.dtype, is_packed=documents is not None)
        mixed_BHTQ = kernel.attend(query_BHTQ, key_BHTQ, value_BHTQ, self._scale, documents)
        return self.output(mixed_BHTQ.transpose(1, 2).flatten(2), x_BTD, norm, sink)

    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Implements `Attention.decode`."""
        query_NHQ, key_NGQ, value_NGQ = self._project(hidden_ND, norm, None, view.turns_NP)
        view.write(torch.cat((key_NGQ.flatten(1), value_NGQ.flatten(1)), -1))
        if isinstance(view, PromptView):
            # Prompts are split, because none may see another.
            prompts = zip(*(each.split(list(view.counts)) for each in (query_NHQ, key_NGQ, value_NGQ)), strict=True)
            mixed_NV = torch.cat(
                [self._mix(query[None], key[None], value[None], None) for query, key, value in prompts]
            )
        else:
            key_BTGQ, value_BTGQ = view.read().unflatten(-1, (2, -1, self._size)).unbind(-3)
            query_BSHQ = query_NHQ.unflatten(0, view.positions_BS.shape)
            future_BST = view.future_BST
            if future_BST is None:
                future_BST = torch.zeros((), dtype=torch.bool, device=query_BSHQ.device).expand(1, 1, 1)
            mixed_NV = self._mix(query_BSHQ, key_BTGQ, value_BTGQ, ~future_BST)
        return self.output(mixed_NV, hidden_ND, norm, None)

    def output(self, mixed: Tensor, x: Tensor, norm: RmsNorm, sink: WeightSink | None) -> Tensor:
        """Returns x, [..., D], plus the output map of mixed values, [..., V], in training and decoding."""
        out: Tensor = x + self.o_proj(mixed, sink)
        return out

    def _project(
        self, x: Tensor, norm: RmsNorm, sink: WeightSink | None, turns_TP: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns rotated queries and keys, and values, [..., T, heads, Q]."""
        weights = (self.q_proj.weight, self.k_proj.weight, self.v_proj.weight)
        projected = self._linears.normed_linear(x, norm, weights, sink).unflatten(-1, (-1, self._size))
        query, key, value = projected.split_with_sizes(self._heads, -2)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        return _rotate(query, turns_TP), _rotate(key, turns_TP), value

    def _repeat(self, each: Tensor) -> Tensor:
        """Returns keys or values of each head of queries, [..., H, Q]."""
        return each.repeat_interleave(self._heads[0] // self._heads[1], -2)

    def _mix(self, query_BSHQ: Tensor, key_BTGQ: Tensor, value_BTGQ: Tensor, seen_BST: Tensor | None) -> Tensor:
        """Mixes the values of sequences, NV; causal without a mask."""
        heads = (query_BSHQ, self._repeat(key_BTGQ), self._repeat(value_BTGQ))
        query_BHSQ, key_BHTQ, value_BHTQ = (each.transpose(1, 2) for each in heads)
        mask_B1ST = None if seen_BST is None else seen_BST[:, None]
        mixed_BHSQ = functional.scaled_dot_product_attention(
            query_BHSQ, key_BHTQ, value_BHTQ, mask_B1ST, is_causal=mask_B1ST is None, scale=self._scale
        )
        return mixed_BHSQ.transpose(1, 2).flatten(2).flatten(0, 1)


def _rotate(x: Tensor, turns_TP: Tensor) -> Tensor:
    """Turns each value of a head's first half with that of the second half, in the type of the turns."""
    first, second = x.to(turns_TP.real.dtype).chunk(2, -1)
    cos_T1P, sin_T1P = turns_TP.real[:, None], turns_TP.imag[:, None]
    return torch.cat((first * cos_T1P - second * sin_T1P, second * cos_T1P + first * sin_T1P), -1).to(x.dtype)
