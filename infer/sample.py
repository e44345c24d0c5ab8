"""Sampling: penalizes logits, converts them to a distribution, draws tokens, and verifies drafts.

Shape legend: B rows, V vocabulary, K kept tokens.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from infer.config import Sampling
from model.linear import widen


def distribution(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Returns the sampling distribution of the next token, BV, in float32 or wider.

    Applies temperature, then top-k, then top-p to the remaining tokens, then min-p, and renormalizes. Temperature 0
    gives probability 1 to the most probable token (the first one if several are equal).
    """
    if sampling.temperature == 0:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
        return torch.zeros_like(widen(logits_BV)).scatter_(-1, best_B1, 1.0)
    scaled_BV = _scale(logits_BV, sampling.temperature)
    vocab = scaled_BV.shape[-1]
    top_k = min(sampling.top_k or vocab, vocab)
    if top_k == vocab and sampling.top_p >= 1 and sampling.min_p == 0:
        return scaled_BV.softmax(-1)
    # Keep the top k logits, sorted in descending order.
    if top_k < vocab:
        kept_BK, ids_BK = scaled_BV.topk(top_k, -1)
    else:
        kept_BK, ids_BK = torch.sort(scaled_BV, stable=True, dim=-1, descending=True)
    probabilities_BK = kept_BK.softmax(-1)
    if sampling.top_p < 1:
        # Probability of all more probable tokens. It is 0 for the most probable token, which is therefore always kept.
        before_BK = probabilities_BK.cumsum(-1) - probabilities_BK
        probabilities_BK = probabilities_BK.masked_fill(before_BK >= sampling.top_p, 0.0)
    if sampling.min_p > 0:
        # The most probable token comes first, and is always kept.
        smallest_B1 = sampling.min_p * probabilities_BK[:, :1]
        probabilities_BK = probabilities_BK.masked_fill(probabilities_BK < smallest_B1, 0.0)
    probabilities_BK = probabilities_BK / probabilities_BK.sum(-1, keepdim=True)
    return torch.zeros_like(scaled_BV).scatter_(-1, ids_BK, probabilities_BK)


def log_probs(logits_BV: Tensor, tokens_B: Tensor, sampling: Sampling, kept_BV: Tensor | None = None) -> Tensor:
    """Returns each row's log-probability of a token at the sampling temperature, B, in float32 or wider.

    Penalties do not change it, and top-k, top-p and min-p only by their set `kept_BV`, among which probabilities sum to
    1. At temperature 0 it is that of temperature 1.
    """
    # Only a division needs logits without their maximum: the logarithm of the softmax subtracts it anyway.
    divisor = sampling.temperature or 1.0
    scaled_BV = widen(logits_BV) if divisor == 1 else _scale(logits_BV, divisor)
    if kept_BV is not None:
        scaled_BV = scaled_BV.masked_fill(~kept_BV, -torch.inf)
    return scaled_BV.log_softmax(-1).gather(-1, tokens_B[:, None])[:, 0]


def _scale(logits_BV: Tensor, temperature: float) -> Tensor:
    """Returns logits minus their maximum, divided by the temperature."""
    # Shift by the maximum first, because division by a very small temperature would overflow. A temperature that is
    # zero in this type would give NaN.
    wide_BV = widen(logits_BV)
    divisor = max(temperature, torch.finfo(wide_BV.dtype).tiny)
    return (wide_BV - wide_BV.amax(-1, keepdim=True)) / divisor


def draw(weights_BV: Tensor, times_BN: Tensor) -> Tensor:
    """Draws a token per row, B, int64: a group of consecutive tokens by its sum, then one of them.

    What comes first is drawn if each comes at an exponential time with its weight as rate. With equal times, similar
    weights mostly draw the same token (arXiv:2408.07978, section 3). Groups need fewer random numbers.

    Args:
        weights_BV: non-negative weights, not all zero in a row; they need not sum to one.
        times_BN: exponential random numbers of rate 1, float64, `num_times(V)` per row.
    """
    num_rows, vocab = weights_BV.shape
    size = _group_size(vocab)
    # [B, number of groups, size]
    grouped = functional.pad(weights_BV, (0, -vocab % size)).view(num_rows, -1, size)
    groups_B = (grouped.sum(-1, dtype=torch.float64) / times_BN[:, size:-1]).argmax(-1)
    chosen_BS = grouped[torch.arange(num_rows, device=groups_B.device), groups_B]
    tokens_B = groups_B * size + (chosen_BS / times_BN[:, :size]).argmax(-1)
    # NaN weights may give an index out of range. Any token is fine then, because the caller checks the logits.
    return tokens_B.clamp(max=vocab - 1)


def num_times(vocab: int) -> int:
    """Returns the number of times of a draw: of tokens in a group, of groups, and one for `verify`."""
    size = _group_size(vocab)
    return size + -(-vocab // size) + 1


def _group_size(vocab: int) -> int:
    return 1 << vocab.bit_length() // 2


class SequenceRandom:
    """Random numbers of one sequence, independent of the other sequences in its batch."""

    def __init__(self, seed: int, prompt: int, sample: int = 0, step: int = 0) -> None:
        # Each number has its own word of 64 bits, so no two sequences share random numbers. torch's generator on the
        # CPU would only use the low 32 bits of a seed.
        philox = np.random.Philox(key=seed % 2**128, counter=[0, prompt, sample, step])
        self._generator = np.random.Generator(philox)
        self._last: deque[NDArray[np.float64]] = deque(maxlen=2)
        self._num_draws = 0

    def uniform(self, count: int) -> Tensor:
        """Returns `count` uniform numbers in [0, 1), float64, on the CPU."""
        return torch.from_numpy(self._generator.random(count))

    def times(self, count: int, number: int | None) -> NDArray[np.float64]:
        """Returns `count` exponential numbers above 0 of a draw: by number of the last two, or the next."""
        number = self._num_draws if number is None else number
        while self._num_draws <= number:
            self._last.append(self._generator.standard_exponential(count) + 2.0**-1000)
            self._num_draws += 1
        return self._last[number - self._num_draws]


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Whether the prompt of a sequence has a token, and how often its continuation has it, int32."""

    prompt_BV: Tensor
    counts_BV: Tensor

    @classmethod
    def of(
        cls, sequences: Sequence[tuple[Sequence[int], Sequence[int]]], vocab_size: int, device: torch.device
    ) -> "TokenHistory":
        """Counts the tokens of sequences, given the prompt and the continuation of each."""
        prompt_BV = torch.zeros(len(sequences), vocab_size, dtype=torch.bool, device=device)
        counts_BV = torch.zeros(len(sequences), vocab_size, dtype=torch.int32, device=device)
        for row, (prompt, tokens) in enumerate(sequences):
            prompt_BV[row, torch.tensor(prompt, dtype=torch.int64, device=device)] = True
            ids = torch.tensor(tokens, dtype=torch.int64, device=device)
            counts_BV[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        return cls(prompt_BV, counts_BV)

    def after(self, tokens_B: Tensor) -> "TokenHistory":
        """Returns the history after one more token of each sequence."""
        ones_B1 = torch.ones_like(tokens_B[:, None], dtype=torch.int32)
        return TokenHistory(self.prompt_BV, self.counts_BV.scatter_add(1, tokens_B[:, None], ones_B1))


def penalize(logits_BV: Tensor, history: TokenHistory | None, sampling: Sampling) -> Tensor:
    """Returns the logits after all penalties, in float32 or wider. Without a history, nothing is changed."""
    if history is None:
        return logits_BV
    logits_BV = widen(logits_BV)
    is_in_continuation_BV = history.counts_BV > 0
    factor = sampling.repetition_penalty
    repeated_BV = torch.where(logits_BV > 0, logits_BV / factor, logits_BV * factor)
    logits_BV = torch.where(history.prompt_BV | is_in_continuation_BV, repeated_BV, logits_BV)
    logits_BV = logits_BV - sampling.frequency_penalty * history.counts_BV
    return logits_BV - sampling.presence_penalty * is_in_continuation_BV


def verify(target_BV: Tensor, draft_BV: Tensor, drafts_B: Tensor, times_BN: Tensor) -> tuple[Tensor, Tensor]:
    """Accepts draft x with probability min(1, p(x) / q(x)), or else draws from max(p - q, 0), normalized.

    Source: arXiv:2211.17192, algorithm 1; the drafts are the MTP module's (arXiv:2412.19437, sections 2.2 and 5.4.3).

    Args:
        target_BV: p, the main model's distribution of the drafted token.
        draft_BV: q, the distribution that the draft was drawn from.
        times_BN: random numbers as of `draw`, not those that drew the draft.

    Returns:
        Whether each draft is accepted, B; and the draft or the token in place of it, B.
    """
    target_B = target_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    draft_B = draft_BV.gather(1, drafts_B[:, None])[:, 0].to(torch.float64)
    # Accept if u < p(x) / q(x), without a division by zero. The exponential of minus a time is uniform.
    accepted_B = times_BN[:, -1].neg().exp() * draft_B < target_B
    rest_BV = (target_BV - draft_BV).clamp(min=0)
    # If p equals q, a draft is rejected only by rounding. Then draw from p itself.
    rest_BV = torch.where(rest_BV.sum(-1, keepdim=True) > 0, rest_BV, target_BV)
    return accepted_B, torch.where(accepted_B, drafts_B, draw(rest_BV, times_BN))
