"""The cap on the groups, hence on the nodes, among which a token's experts are chosen.

Shape legend: T tokens, E experts, G groups of E/G consecutive experts.
"""

import torch
from torch import Tensor


def limit_groups(biased_TE: Tensor, num_groups: int, num_limited_groups: int, num_per_group: int) -> Tensor:
    """Marks the experts of each token's best groups. Source: arXiv:2412.19437, section 2.1.2.

    A group's score is the sum of its `num_per_group` best biased scores. Biased scores may be negative,
    so experts outside the mask must be set to -inf, never to 0.

    Args:
        biased_TE: scores with the selection bias added; further leading dimensions are allowed.
        num_groups: divides E.
        num_limited_groups: groups kept for each token; equal scores resolve as in `torch.topk`.
        num_per_group: experts per token over groups kept, K/M.

    Returns:
        Bool mask of biased_TE's shape with num_limited_groups * E / num_groups true entries per token.

    Raises:
        ValueError: the counts do not fit the experts.
    """
    num_experts = biased_TE.shape[-1]
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"node_limit: num_groups must divide {num_experts} experts, got {num_groups}")
    size = num_experts // num_groups
    if not 1 <= num_limited_groups <= num_groups:
        raise ValueError(f"node_limit: num_limited_groups must lie in 1..{num_groups}, got {num_limited_groups}")
    if not 1 <= num_per_group <= size:
        raise ValueError(f"node_limit: num_per_group must lie in 1..{size}, got {num_per_group}")
    scores_TG = biased_TE.unflatten(-1, (num_groups, size)).topk(num_per_group, -1).values.sum(-1)
    kept_TM = scores_TG.topk(num_limited_groups, -1, sorted=False).indices
    mask_TG = torch.zeros_like(scores_TG, dtype=torch.bool).scatter_(-1, kept_TM, True)
    return mask_TG.repeat_interleave(size, -1)
