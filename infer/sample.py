"""From scores to a distribution, and from a distribution to a token.

Shape legend: B rows, V vocabulary, K kept tokens.
"""

import torch
from torch import Tensor

from infer.config import Sampling
from model.precision.linear import widen


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """The probabilities that tokens are drawn with, BV, float32 or wider; zero for those that are left out.

    Temperature first, then top-k, then top-p of what is left, renormalised. Temperature 0 gives the most probable
    token (the first of equals) everything.
    """
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(widen(logits_BV)).scatter_(-1, best_B1, 1.0)
    # Shifted first: the quotient by a very small temperature would overflow. One that is zero in this type would give
    # no number at all.
    wide_BV = widen(logits_BV)
    temperature = max(sampling.temperature, torch.finfo(wide_BV.dtype).tiny)
    scaled_BV = (wide_BV - wide_BV.amax(-1, keepdim=True)) / temperature
    vocab = scaled_BV.shape[-1]
    top_k = min(sampling.top_k or vocab, vocab)
    if top_k == vocab and sampling.top_p >= 1:
        return scaled_BV.softmax(-1)
    if top_k < vocab:
        kept_BK, ids_BK = scaled_BV.topk(top_k, -1)
    else:
        kept_BK, ids_BK = torch.sort(scaled_BV, stable=True, dim=-1, descending=True)
    probabilities_BK = kept_BK.softmax(-1)
    if sampling.top_p < 1:
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        # The most probable token is always kept: nothing is before it.
        probabilities_BK = probabilities_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
        probabilities_BK = probabilities_BK / probabilities_BK.sum(-1, keepdim=True)
    return torch.zeros_like(scaled_BV).scatter_(-1, ids_BK, probabilities_BK)


def draw(weights_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """A token of each row, by inversion of the cumulative weights: B, int64.

    Args:
        weights_BV: not negative, not all zero in a row; need not sum to one.
        uniform_B: float64, in [0, 1), one for each row.
    """
    below_BV = weights_BV.to(torch.float64).cumsum(-1)
    total_B1 = below_BV[:, -1:].contiguous()
    chosen_B1 = torch.searchsorted(below_BV, uniform_B[:, None] * total_B1, right=True)
    # Rounding may lift the product to the total itself: then the last token of any weight.
    last_B1 = torch.searchsorted(below_BV, total_B1)
    # Weights that are no numbers give no place at all: any token will do, the caller tells by its scores.
    return torch.minimum(chosen_B1, last_B1)[:, 0].clamp(max=weights_BV.shape[1] - 1)


class SequenceRandom:
    """One sequence's random numbers: the same whatever other sequences are in its batch."""

    def __init__(self, seed: int, index: int) -> None:
        """Of the prompt with the number `index` under a seed."""
        # Neighbouring seeds of a Mersenne twister start alike; a large odd factor sets prompts far apart.
        self._generator = torch.Generator().manual_seed((seed + index * 0x9E3779B97F4A7C15) % 2**63)

    def uniform(self, count: int) -> Tensor:
        """Numbers in [0, 1), float64, on the CPU."""
        return torch.rand(count, generator=self._generator, dtype=torch.float64)
