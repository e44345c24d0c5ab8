"""Sequences that are generated together, and what is known of each.

Shape legend: T tokens, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from infer.config import Finish, Sampling
from infer.penalties import TokenHistory
from infer.sample import SequenceRandom

StopCondition = Callable[[int, int], bool]
"""Called with each new token (prompt's number, token); returns true to end the sequence after that token."""


@dataclass(frozen=True, slots=True)
class ChosenToken:
    """A token, its log-probability (`infer.sample.log_probs`) and those that sampling kept, if recorded."""

    token: int
    log_prob: float
    kept: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptEnd:
    """The state for the MTP module and the logits at the last token of a prompt."""

    state_1D: Tensor
    logits_V: Tensor


class ActiveSequence:
    """A prompt and its continuation so far.

    Attributes:
        finish: why it ended; None if it has not.
        states_TD: states of the last 1 or 2 tokens, which the MTP module has not read.
    """

    def __init__(
        self,
        index: int,
        prompt: Sequence[int],
        max_tokens: int,
        random: SequenceRandom,
        *,
        sample: int = 0,
        place: int = 0,
    ) -> None:
        self.index, self.sample, self.place, self.prompt, self.random = index, sample, place, prompt, random
        self.chosen: list[ChosenToken] = []
        self.finish: Finish | None = None
        self.states_TD: Tensor | None = None
        self._max_tokens = max_tokens
        self._has_stop_token = False

    @property
    def tokens(self) -> list[int]:
        """Tokens of the continuation, including a stop token that ended it."""
        return [chosen.token for chosen in self.chosen]

    @property
    def text_tokens(self) -> list[int]:
        """Tokens of the continuation without the stop token."""
        return self.tokens[:-1] if self._has_stop_token else self.tokens

    @property
    def num_left(self) -> int:
        """Number of tokens that can still be generated."""
        return self._max_tokens - len(self.chosen)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and continuation."""
        return len(self.prompt) + self._max_tokens

    def take(self, chosen: ChosenToken, stop: frozenset[int], stop_condition: StopCondition) -> bool:
        """Adds a chosen token. Returns whether it is text, which a stop token is not."""
        self.chosen.append(chosen)
        if chosen.token in stop:
            self.finish, self._has_stop_token = "stop", True
            return False
        if stop_condition(self.index, chosen.token):
            self.finish = "stop"
        elif self.num_left == 0:
            self.finish = "length"
        return True

    def history(self, vocab_size: int, device: torch.device) -> TokenHistory:
        """Counts the tokens of prompt and continuation."""
        return TokenHistory.of(self.prompt, self.tokens, vocab_size, device)


def history_of(
    sequences: Sequence[ActiveSequence], sampling: Sampling, vocab_size: int, device: torch.device
) -> TokenHistory | None:
    """Returns the history of several sequences; None if the sampling has no penalties."""
    if not sampling.has_penalties:
        return None
    return TokenHistory.join([sequence.history(vocab_size, device) for sequence in sequences])
