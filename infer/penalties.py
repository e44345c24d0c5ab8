"""Penalties of tokens that occurred before.

Shape legend: B sequences, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.config import Sampling
from model.precision.linear import widen


@dataclass(frozen=True, slots=True)
class TokenHistory:
    """Whether the prompt of a sequence has a token, and how often its continuation has it, int32."""

    prompt_BV: Tensor
    counts_BV: Tensor

    @classmethod
    def of(cls, prompt: Sequence[int], tokens: Sequence[int], vocab_size: int, device: torch.device) -> "TokenHistory":
        """Counts the tokens of one sequence."""
        prompt_1V = torch.zeros(1, vocab_size, dtype=torch.bool, device=device)
        prompt_1V[0, torch.tensor(list(prompt), dtype=torch.int64, device=device)] = True
        counts_1V = torch.zeros(1, vocab_size, dtype=torch.int32, device=device)
        places = torch.tensor(list(tokens), dtype=torch.int64, device=device)
        counts_1V[0].index_add_(0, places, torch.ones_like(places, dtype=torch.int32))
        return cls(prompt_1V, counts_1V)

    @classmethod
    def join(cls, histories: Sequence["TokenHistory"]) -> "TokenHistory":
        """Returns the history of several sequences, in order."""
        return cls(
            torch.cat([history.prompt_BV for history in histories]),
            torch.cat([history.counts_BV for history in histories]),
        )

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
