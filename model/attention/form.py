"""Interface of a model's attention to blocks and decoding, and the form that a configuration selects.

Another form is one file with a subclass of `Attention` and an `AttentionForm`. Shape legend: B sequences, T tokens, N
new tokens of all sequences, D hidden size.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from comm.context.alone import ALONE
from comm.context.protocol import ContextGroup
from kernels.attention.documents import Documents
from model.attention.kv_cache import CacheView
from model.config import ModelConfig
from model.norm import RmsNorm
from model.precision.linear import WeightSink

if TYPE_CHECKING:
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
        """Returns x + attention(norm(x)), causal: BTD.

        Args:
            x_BTD: the residual of the tokens that this rank holds.
            norm: norm of this layer; it belongs to the block, and autograd computes its gradient.
            documents: documents of whole packed sequences, also if a context group shares them; None: each token sees
                all tokens before it in its sequence.
            context: members that share each sequence. A form that needs whole sequences raises an error if there are
                several.
        """

    @abstractmethod
    def decode(self, hidden_ND: Tensor, norm: RmsNorm, view: CacheView) -> Tensor:
        """Returns hidden + attention(norm(hidden)) of new tokens, and writes them to the cache: ND.

        Args:
            hidden_ND: the residual of the new tokens, sequence by sequence.
            view: this layer's cache and the tokens' positions: whole prompts, or a step of every sequence.
        """


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionForm:
    """A form of attention: how it is built, and how many values a layer's cache holds of a token."""

    name: str
    build: Callable[[ModelConfig, torch.dtype, str, "Linears"], Attention]
    values_per_token: Callable[[ModelConfig], int]


def attention_form(config: ModelConfig) -> AttentionForm:
    """Returns the form of an architecture. Everything that `ModelConfig` describes has latent attention."""
    from model.attention.mla import LATENT_ATTENTION

    return LATENT_ATTENTION
