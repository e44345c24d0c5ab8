"""Limits the expert groups, and so the nodes, among which a token's experts are chosen."""

# Shape legend: G groups of E / G consecutive experts.

import torch
from torch import Tensor


def limit_groups(biased_TE: Tensor, num_groups: int, num_limited_groups: int, num_per_group: int) -> Tensor:
    """Returns a mask of the experts in each token's best groups. Source: arXiv:2412.19437, section 2.1.2.

    A group's score is the sum of its `num_per_group` best biased scores, K / M for K experts per token among M groups.
    Ties are resolved as in `torch.topk`. Biased scores may be negative, so experts outside the mask must be set to
    -inf, never to 0. Raises ValueError if the counts do not fit the number of experts.
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
    scores_TG = biased_TE.unflatten(-1, (num_groups, size)).topk(num_per_group, -1).values.sum(-1)
    # The best groups of each token, TM, as a mask over groups, TG, then over experts, TE.
    kept_TM = scores_TG.topk(num_limited_groups, -1, sorted=False).indices
    mask_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(-1, kept_TM, value=True)
    return mask_TG.unsqueeze(-1).expand(*mask_TG.shape, size).flatten(-2)
