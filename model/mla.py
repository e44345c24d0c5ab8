"""Multi-head latent attention, expanded form (arXiv:2412.19437, section 2.1.1).

Shape legend: B sequences, T tokens, D hidden size, H heads.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.config import ModelConfig
from model.linear import WeightSink, linear
from model.norm import RmsNorm
from model.rope import rotate, rotation_table, softmax_scale


class Projection(nn.Module):
    """A weight without bias, [outputs, inputs]; applied through `model.linear`."""

    def __init__(self, inputs: int, outputs: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, dtype=dtype))

    def forward(self, x: Tensor, sink: WeightSink | None) -> Tensor:
        """x [..., inputs] -> [..., outputs]."""
        return linear(x, self.weight, sink)


class LatentAttention(nn.Module):
    """Queries through a low-rank latent, keys and values from one shared latent and one rotated key for all heads."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self._config = config
        heads, hidden, eps = config.num_heads, config.hidden_size, config.norm_eps
        query_size = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Projection(hidden, query_size, dtype)
        else:
            self.q_a_proj = Projection(hidden, config.q_lora_rank, dtype)
            self.q_a_layernorm = RmsNorm(config.q_lora_rank, eps, dtype)
            self.q_b_proj = Projection(config.q_lora_rank, query_size, dtype)
        latent = config.kv_lora_rank
        self.kv_a_proj_with_mqa = Projection(hidden, latent + config.qk_rope_head_dim, dtype)
        self.kv_a_layernorm = RmsNorm(latent, eps, dtype)
        self.kv_b_proj = Projection(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype)
        self.o_proj = Projection(heads * config.v_head_dim, hidden, dtype)
        self._scale = softmax_scale(config)
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(self, x_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        """Causal attention over each sequence: BTD -> BTD."""
        config = self._config
        cos, sin = self._rotation(x_BTD)
        query = self._query(x_BTD, sink).unflatten(-1, (config.num_heads, config.qk_head_dim))
        query_plain, query_rope = query.split([config.qk_nope_head_dim, config.qk_rope_head_dim], -1)
        latent, key_rope = self.kv_a_proj_with_mqa(x_BTD, sink).split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        expanded = self.kv_b_proj(self.kv_a_layernorm(latent), sink)
        key_plain, value = expanded.unflatten(-1, (config.num_heads, -1)).split(
            [config.qk_nope_head_dim, config.v_head_dim], -1
        )
        query = torch.cat((query_plain, rotate(query_rope, cos, sin)), -1)
        shared_key = rotate(key_rope[:, :, None], cos, sin).expand(-1, -1, config.num_heads, -1)
        key = torch.cat((key_plain, shared_key), -1)
        mixed = functional.scaled_dot_product_attention(
            query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), is_causal=True, scale=self._scale
        )
        return self.o_proj(mixed.transpose(1, 2).flatten(2), sink)  # type: ignore[no-any-return]

    def _query(self, x_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        if self._config.q_lora_rank is None:
            return self.q_proj(x_BTD, sink)  # type: ignore[no-any-return]
        return self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x_BTD, sink)), sink)  # type: ignore[no-any-return]

    def _rotation(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        key = (x_BTD.shape[1], x_BTD.device, dtype)
        if key not in self._tables:
            cos, sin = rotation_table(self._config, x_BTD.shape[1], dtype)
            self._tables = {key: (cos.to(x_BTD.device), sin.to(x_BTD.device))}
        return self._tables[key]
