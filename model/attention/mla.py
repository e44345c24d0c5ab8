"""Multi-head latent attention, expanded form (arXiv:2412.19437, section 2.1.1).

Shape legend: B sequences, T tokens, D hidden size, X sizes of compressed queries, keys and values together.
"""

import torch
from torch import Tensor, nn

from kernels.attention.documents import Documents
from model.attention.core import mix
from model.attention.projections import LatentOptions, LatentShape, LatentWeights
from model.attention.rope import rotation_table, softmax_scale
from model.config import ModelConfig
from model.norm import RmsNorm
from model.precision.linear import Projection, WeightSink
from model.precision.linears import Linears

# The released code leaves these two norms at its class' default, whatever the model's own.
LATENT_NORM_EPS = 1e-6


class LatentAttention(nn.Module):
    """Queries through a low-rank latent, keys and values from one shared latent and one rotated key for all heads."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, kernel: str, linears: Linears) -> None:
        super().__init__()
        self._config = config
        self._kernel = kernel
        self._linears = linears
        heads, hidden = config.num_heads, config.hidden_size
        query_size = heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = Projection(hidden, query_size, dtype)
        else:
            self.q_a_proj = Projection(hidden, config.q_lora_rank, dtype)
            self.q_a_layernorm = RmsNorm(config.q_lora_rank, LATENT_NORM_EPS, dtype)
            self.q_b_proj = Projection(config.q_lora_rank, query_size, dtype)
        latent = config.kv_lora_rank
        self.kv_a_proj_with_mqa = Projection(hidden, latent + config.qk_rope_head_dim, dtype)
        self.kv_a_layernorm = RmsNorm(latent, LATENT_NORM_EPS, dtype)
        self.kv_b_proj = Projection(latent, heads * (config.qk_nope_head_dim + config.v_head_dim), dtype)
        self.o_proj = Projection(heads * config.v_head_dim, hidden, dtype)
        self._shape = LatentShape(
            num_heads=heads,
            nope=config.qk_nope_head_dim,
            rope=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=latent,
            eps=LATENT_NORM_EPS,
            scale=softmax_scale(config),
        )
        self._tables: dict[tuple[int, torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def forward(
        self, x_BTD: Tensor, norm: RmsNorm, sink: WeightSink | None, documents: Documents | None = None
    ) -> Tensor:
        """x + attention(norm(x)), causal over each sequence or each of its documents: BTD -> BTD."""
        has_latent = self._config.q_lora_rank is not None
        query_weight = self.q_a_proj.weight if has_latent else self.q_proj.weight
        # Compressed queries (or whole ones), compressed keys and values, shared key: side by side, BTX.
        down = (query_weight, self.kv_a_proj_with_mqa.weight)
        compressed_BTX = self._linears.normed_linear(x_BTD, norm, down, sink)
        weights = LatentWeights(
            query_norm=self.q_a_layernorm.weight if has_latent else None,
            query_up=self.q_b_proj.weight if has_latent else None,
            latent_norm=self.kv_a_layernorm.weight,
            latent_up=self.kv_b_proj.weight,
            out=self.o_proj.weight,
        )
        options = LatentOptions(
            shape=self._shape,
            kernel=self._kernel,
            rotation=self._rotation(x_BTD),
            documents=documents,
            sink=sink,
            records=torch.is_grad_enabled(),
        )
        return mix(x_BTD, compressed_BTX, weights, options, self._linears)

    def _rotation(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(x_BTD.dtype, torch.float32)
        key = (x_BTD.shape[1], x_BTD.device, dtype)
        if key not in self._tables:
            cos, sin = rotation_table(self._config, x_BTD.shape[1], dtype)
            self._tables = {key: (cos.to(x_BTD.device), sin.to(x_BTD.device))}
        return self._tables[key]
