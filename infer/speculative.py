"""Speculative decoding: a draft is kept or replaced so that the result is distributed as if there had been none.

Source: arXiv:2211.17192, algorithm 1; the drafts are the MTP module's (arXiv:2412.19437, sections 2.2 and 5.4.3).
Shape legend: B sequences, V vocabulary.
"""

import torch
from torch import Tensor

from infer.sample import draw


def verify(
    target_BV: Tensor, draft_BV: Tensor, drafts_B: Tensor, after_BV: Tensor, uniform_B2: Tensor
) -> tuple[Tensor, Tensor]:
    """Keeps draft x with probability min(1, p(x) / q(x)); where it falls, draws from max(p - q, 0), normalised.

    With one-hot distributions, as temperature 0 gives, a draft is kept if and only if it is the most probable token.

    Args:
        target_BV: p, the main model's distribution of the drafted token.
        draft_BV: q, what the draft was drawn from.
        drafts_B: the drafts, int64.
        after_BV: the main model's distribution of the token after the draft.
        uniform_B2: float64 in [0, 1): for keeping, for drawing.

    Returns:
        Whether the draft is kept, B; and a token, B: the one after the draft where it is kept, else the one in its
        place.
    """
    target_B = target_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    draft_B = draft_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    kept_B = uniform_B2[:, 0] * draft_B < target_B
    rest_BV = (target_BV - draft_BV).clamp(min=0)
    # Where p equals q nothing falls but by rounding; p itself is then the distribution.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, target_BV)
    return kept_B, draw(torch.where(kept_B[:, None], after_BV, rest_BV), uniform_B2[:, 1])
