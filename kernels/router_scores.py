"""Registers how routers score experts by their logits. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from base.registry import Registry

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterScores:
    """How a router scores experts; the rest of routing is the same for all kinds.

    Attributes:
        scores: function of logits, tokens x experts in float32 or float64: scores in the logits' type, none negative.
            The result must be the number nearest to the exact one, so that all ranks and devices choose alike.
        backward: function of the gradient of the scores and the scores: the gradient of the logits.
    """

    summary: str
    scores: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


ROUTERS = Registry[RouterScores]("model.router", (__name__,))


def _sigmoid_backward(grad_TE: Tensor, scores_TE: Tensor) -> Tensor:
    return grad_TE * (scores_TE * (1 - scores_TE))


def _softmax_backward(grad_TE: Tensor, scores_TE: Tensor) -> Tensor:
    # A score falls if another one's logit rises.
    return scores_TE * (grad_TE - (grad_TE * scores_TE).sum(-1, keepdim=True))


ROUTERS.register(
    "sigmoid",
    RouterScores(
        summary="each expert's own sigmoid, as in DeepSeek-V3",
        scores=lambda logits_TE: logits_TE.double().sigmoid().to(logits_TE.dtype),
        backward=_sigmoid_backward,
    ),
)
ROUTERS.register(
    "softmax",
    RouterScores(
        summary="shares of all experts, as in Qwen3",
        scores=lambda logits_TE: logits_TE.double().softmax(-1).to(logits_TE.dtype),
        backward=_softmax_backward,
    ),
)
