"""The ends of the model: embedding, output head with its loss, and what an MTP module adds around its block.

Source: arXiv:2412.19437, section 2.2. Shape legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from model.block import Block
from model.config import ModelConfig
from model.linear import WeightSink, linear
from model.mla import Projection
from model.norm import RmsNorm
from model.precision import widen


class _SplitEmbedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight_VD: Tensor, tokens_BT: Tensor, sink: WeightSink) -> Tensor:
        ctx.save_for_backward(weight_VD, tokens_BT)
        ctx.sink = sink
        return functional.embedding(tokens_BT, weight_VD)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        (grad_BTD,) = grads
        weight_VD, tokens_BT = ctx.saved_tensors
        vocab = len(weight_VD)
        ctx.sink.defer(
            weight_VD, lambda: torch.ops.aten.embedding_dense_backward(grad_BTD, tokens_BT, vocab, -1, False)
        )
        return None, None, None


class Embedding(nn.Module):
    """Token embedding, [vocabulary, hidden]."""

    def __init__(self, vocab: int, hidden: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden, dtype=dtype))

    def forward(self, tokens_BT: Tensor, sink: WeightSink | None) -> Tensor:
        """BT -> BTD. With a sink the weight's gradient waits for its W, as that of `linear.linear` does."""
        if sink is None or not torch.is_grad_enabled():
            return functional.embedding(tokens_BT, self.weight)
        out: Tensor = _SplitEmbedding.apply(self.weight, tokens_BT, sink)  # type: ignore[no-untyped-call]
        return out


class SharedHead(nn.Module):
    """The own norm of an MTP module; the head's matrix itself is the main model's."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RmsNorm(config.hidden_size, config.norm_eps, dtype)


class MtpBlock(Block):
    """An MTP module: a whole MoE layer, the projection of its two inputs, its own final norm.

    The projection reads [norm(embedding), norm(hidden)], the order of the released weights.
    """

    def __init__(self, config: ModelConfig, experts: range, dtype: torch.dtype) -> None:
        super().__init__(config, experts, dtype)
        hidden, eps = config.hidden_size, config.norm_eps
        self.enorm = RmsNorm(hidden, eps, dtype)
        self.hnorm = RmsNorm(hidden, eps, dtype)
        self.eh_proj = Projection(2 * hidden, hidden, dtype)
        self.shared_head = SharedHead(config, dtype)

    def merge(self, embedded_BTD: Tensor, hidden_BTD: Tensor, sink: WeightSink | None) -> Tensor:
        """Embedding of the token k ahead and the state of the depth before: the block's input, BTD."""
        both = torch.cat((self.enorm(embedded_BTD), self.hnorm(hidden_BTD)), -1)
        return self.eh_proj(both, sink)  # type: ignore[no-any-return]


def cross_entropy_sum(normal_BTD: Tensor, head_VD: Tensor, targets_BT: Tensor, sink: WeightSink | None) -> Tensor:
    """Sum over targets of the cross-entropy in nats, in float32 or wider; a target of -100 counts nothing."""
    logits_BTV = widen(linear(normal_BTD, head_VD, sink))
    return functional.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
