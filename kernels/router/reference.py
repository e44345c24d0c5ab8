"""Router: scores of any kind, group-limited top-k on biased scores, weights from unbiased scores.

Source: arXiv:2412.19437, sections 2.1.2 and 4.2; arXiv:2408.15664, algorithm 1. Shape legend: T tokens in all, G groups
of E / G consecutive experts.
"""

from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.router_scores import ROUTERS

# Added to the sum of chosen scores, as in the released code.
SMALLEST_SUM = 1e-20


@dataclass(frozen=True, slots=True)
class RouteLimits:
    """Limits of a token's experts and groups, the factor of weights, and how both are scored."""

    num_chosen: int
    num_groups: int
    num_limited_groups: int
    factor: float
    group_score_experts: int  # biased scores that add up to a group's, or as many as it has experts
    kind: str = "sigmoid"  # of scores, a name in ROUTERS

    def num_per_group(self, num_experts: int) -> int:
        """Returns how many experts' scores add up to a group's."""
        return min(self.group_score_experts, num_experts // self.num_groups)


class Chosen(NamedTuple):
    """Experts of each token, int64, best first; their weights and all scores in the logits' type."""

    ids_TK: Tensor
    weights_TK: Tensor
    scores_TE: Tensor


def route(
    logits_TE: Tensor,
    bias_E: Tensor,
    limits: RouteLimits,
    load_E: Tensor | None = None,
    ids_TK: Tensor | None = None,
) -> Chosen:
    """Chooses each token's experts, unless `ids_TK` has them, and adds the choices to `load_E`.

    A score is the number nearest to the exact one, so that all implementations choose the same experts. Of equal scores
    the one with the lower number wins, in groups too.
    """
    scores_TE = ROUTERS.get(limits.kind).scores(logits_TE)
    if ids_TK is None:
        # Limited groups first (node limit of the paper), then the top k of what is left.
        biased_TE = scores_TE + bias_E
        if limits.num_limited_groups < limits.num_groups:
            num_per_group = limits.num_per_group(len(bias_E))
            mask_TE = limit_groups(biased_TE, limits.num_groups, limits.num_limited_groups, num_per_group)
            biased_TE = biased_TE.masked_fill(~mask_TE, -torch.inf)
        ids_TK = top_ids(biased_TE, limits.num_chosen)
    if load_E is not None:
        # bincount would need a host sync for the size of its result.
        load_E.scatter_add_(0, ids_TK.flatten(), torch.ones_like(ids_TK.flatten()))
    # Weights come from scores without bias, normalized over the K chosen experts.
    chosen_TK = scores_TE.gather(1, ids_TK)
    weights_TK = chosen_TK / (chosen_TK.sum(-1, keepdim=True) + SMALLEST_SUM) * limits.factor
    return Chosen(ids_TK, weights_TK, scores_TE)


def route_backward(
    grad_weights_TK: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    scores_TE: Tensor,
    grad_scores_TE: Tensor | None,
    limits: RouteLimits,
) -> Tensor:
    """Computes the gradient of the logits, TE, from those of weights and, if given, of scores."""
    # A chosen score's slope is by how much its weight's exceeds the mean, divided by the sum of the chosen: TK.
    sums_T1 = scores_TE.gather(1, ids_TK).sum(-1, keepdim=True) + SMALLEST_SUM
    means_T1 = (grad_weights_TK * weights_TK).sum(-1, keepdim=True)
    slopes_TK = (grad_weights_TK * limits.factor - means_T1) / sums_T1
    grad_TE = torch.zeros_like(scores_TE) if grad_scores_TE is None else grad_scores_TE
    return ROUTERS.get(limits.kind).backward(grad_TE.scatter_add(1, ids_TK, slopes_TK), scores_TE)


def limit_groups(biased_TE: Tensor, num_groups: int, num_limited_groups: int, num_per_group: int) -> Tensor:
    """Returns a mask of the experts in each token's best groups. Source: arXiv:2412.19437, section 2.1.2.

    A group's score is the sum of its `num_per_group` best biased scores, K / M for K experts per token among M groups,
    added from the best one on, so that all implementations round alike. Biased scores may be negative, so experts
    outside the mask must be set to -inf, never to 0. Raises ValueError if the counts do not fit the number of experts.
    """
    num_experts = biased_TE.shape[-1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"node_limit: num_groups must divide {num_experts} experts, is {num_groups}")
    size = num_experts // num_groups
    if not 1 <= num_limited_groups <= num_groups:
        raise ValueError(f"node_limit: num_limited_groups must lie in 1..{num_groups}, is {num_limited_groups}")
    if not 1 <= num_per_group <= size:
        raise ValueError(f"node_limit: num_per_group must lie in 1..{size}, is {num_per_group}")
    # Score of each group: the sum of its best experts, TG.
    best_TGS = biased_TE.unflatten(-1, (num_groups, size)).topk(num_per_group, -1).values
    scores_TG = reduce(torch.add, best_TGS.unbind(-1))
    # The best groups of each token, TM, as a mask over groups, TG, then over experts, TE.
    mask_TG = torch.zeros_like(scores_TG, dtype=torch.bool)
    mask_TG.scatter_(-1, top_ids(scores_TG, num_limited_groups), value=True)
    return mask_TG.unsqueeze(-1).expand(*mask_TG.shape, size).flatten(-2)


def top_ids(scores_TE: Tensor, count: int) -> Tensor:
    """Returns the places of the largest scores, best first, and of equal scores the lower place first."""
    # topk would leave open which of equal scores it takes.
    return scores_TE.sort(dim=-1, descending=True, stable=True).indices[..., :count].contiguous()
