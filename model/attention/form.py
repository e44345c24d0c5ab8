"""Interface of a model's attention to blocks and decoding, and the form that a configuration selects.

Another form is one file with a subclass of `Attention` and an `AttentionForm`. Shape legend: N new tokens.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from comm.protocol import ALONE, ContextGroup
from kernels.attention.documents import Documents
from model.attention.kv_cache import CacheView
from model.config import ModelConfig
from model.linear import WeightSink
from model.norm import RmsNorm
from model.precision.linears import Linears


class Attention(nn.Module):
    """One layer's attention."""

    @abstractmethod
    def forward(
        self,
        x_BTD: Tensor,
        norm: RmsNorm,
        sink: WeightSink | None,
        documents: Documents | None = None,
        context: ContextGroup = ALONE,
    ) -> Tensor:
        """Returns x + attention(norm(x)), causal, of the tokens that this rank holds: BTD.

        Args:
            norm: norm of this layer; it belongs to the block, and autograd computes its gradient.
            documents: documents of whole packed sequences, also if a context group shares them.
            context: members that share each sequence. A form that needs whole sequences raises an error if there are
                several.
        """

    @abstractmethod
    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Returns hidden + attention(norm(hidden)) of new tokens, and writes them to the cache: ND."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """A form of attention: how it is built, and how many values a layer's cache holds of a token."""

    name: str
    build: Callable[[ModelConfig, torch.dtype, str, Linears], Attention]
    values_per_token: Callable[[ModelConfig], int]
