"""Speculative decoding: accepts or replaces drafts without a change of the distribution.

Source: arXiv:2211.17192, algorithm 1; the drafts are the MTP module's (arXiv:2412.19437, sections 2.2 and 5.4.3).
Shape legend: B sequences, V vocabulary.
"""

import torch
from torch import Tensor

from infer.sample import draw


def verify(
    target_BV: Tensor, draft_BV: Tensor, drafts_B: Tensor, after_BV: Tensor, uniform_B2: Tensor
) -> tuple[Tensor, Tensor]:
    """Accepts draft x with probability min(1, p(x) / q(x)), or else draws from max(p - q, 0), normalized.

    With one-hot distributions (temperature 0), a draft is accepted if and only if it is the most probable token.

    Args:
        target_BV: p, the main model's distribution of the drafted token.
        draft_BV: q, the distribution that the draft was drawn from.
        after_BV: the main model's distribution of the token after the draft.
        uniform_B2: uniform random numbers in [0, 1), float64: one for acceptance, one for drawing.

    Returns:
        Whether each draft is accepted, B; and the token after an accepted draft or in place of a rejected one, B.
    """
    target_B = target_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    draft_B = draft_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    # Accept if u < p(x) / q(x), without a division by zero.
    kept_B = uniform_B2[:, 0] * draft_B < target_B
    rest_BV = (target_BV - draft_BV).clamp(min=0)
    # If p equals q, a draft is rejected only by rounding. Then draw from p itself.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, target_BV)
    return kept_B, draw(torch.where(kept_B[:, None], after_BV, rest_BV), uniform_B2[:, 1])
