"""Chooses each token's experts by its logits, weighs them, and computes the gradient of the logits."""

import torch
from torch import Tensor

from kernels.operation import operation
from kernels.router import reference
from kernels.router.reference import RouteLimits

MOST_EXPERTS = 1024
"""Scores of a row that a program can hold, up to four times as many places after padding."""


def _fits(logits_TE: Tensor, limits: RouteLimits) -> bool:
    # A sigmoid in float64 has no wider type from which it would be rounded once. Other kinds of scores have no kernel.
    return limits.kind == "sigmoid" and logits_TE.dtype == torch.float32 and logits_TE.shape[1] <= MOST_EXPERTS


route = operation(
    reference.route, cuda="triton", fits=lambda logits_TE, bias_E, limits, *rest: _fits(logits_TE, limits)
)
route_backward = operation(
    reference.route_backward,
    cuda="triton",
    fits=lambda grads, ids, weights, scores_TE, grad_scores, limits: _fits(scores_TE, limits),
)
