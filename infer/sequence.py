"""Describes a prompt that is being continued, and its reports.

Shape legend: T new tokens, D hidden size.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from infer.config import Finish, GenerateError
from infer.protocol import ChosenToken, NumberedPrompt, Request, StopToken, TokenConstraint
from infer.sample import SequenceRandom


def never_stop(index: int, token: int) -> bool:
    """Ends no sequence."""
    return False


@dataclass(slots=True, eq=False)
class ActiveSequence:
    """A prompt and its continuation so far.

    Attributes:
        index: number of the prompt. Sequences of one number have one prompt and one request.
        order: a sequence of lower order is older, and does not wait for a younger one.
        settings: `Request.settings`.
        finish: why it ended; None if it has not.
        error: why it failed and ended.
        states_TD: states of the last 1 or 2 tokens, which the MTP module has not read.
        prompt_scores: the prompt's tokens after the first that were scored while they were read.
    """

    index: int
    prompt: Sequence[int]
    max_tokens: int
    random: SequenceRandom
    request: Request
    sample: int = 0
    place: int = 0
    order: int = 0
    settings: tuple[object, ...] = ()
    constraint: TokenConstraint | None = None
    chosen: list[ChosenToken] = field(default_factory=list)
    finish: Finish | None = None
    error: GenerateError | None = None
    states_TD: Tensor | None = None
    prompt_scores: list[ChosenToken] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = self.request.settings
        self.constraint = self.request.constraint and self.request.constraint()

    @property
    def tokens(self) -> list[int]:
        """Tokens of the continuation, including a stop token that ended it."""
        return [chosen.token for chosen in self.chosen]

    @property
    def text(self) -> Sequence[int]:
        """Tokens that are read first: all but the last one of the continuation, which a pass continues."""
        return [*self.prompt, *self.tokens[:-1]] if self.chosen else self.prompt

    @property
    def num_text(self) -> int:
        """Number of tokens of the text."""
        return len(self.prompt) + max(0, len(self.chosen) - 1)

    @property
    def num_left(self) -> int:
        """Number of tokens that can still be generated."""
        return self.max_tokens - len(self.chosen)

    @property
    def max_length(self) -> int:
        """Maximum number of tokens of prompt and continuation."""
        return len(self.prompt) + self.max_tokens

    def resume(self, chosen: Sequence[ChosenToken]) -> None:
        """Sets the continuation so far, of a sequence without one."""
        self.chosen = list(chosen)
        if self.constraint is not None:
            for token in self.tokens:
                self.constraint.accept(token)

    def take(self, chosen: ChosenToken, stop_condition: StopToken) -> bool:
        """Adds a chosen token. Returns whether it is text, which a stop token is not."""
        if not math.isfinite(chosen.log_prob):
            self.error = GenerateError(
                f"prompt {self.index + 1}: the model's logits must be finite, are not after {len(self.chosen)} new "
                f"tokens; its weights or their type are not usable"
            )
        if self.error:
            self.finish = "stop"
            return False
        self.chosen.append(chosen)
        if chosen.token in self.request.stop:
            self.finish = "stop"
            return False
        if self.constraint is not None:
            self.constraint.accept(chosen.token)
        if stop_condition(self.index, chosen.token):
            self.finish = "stop"
        elif self.num_left == 0:
            self.finish = "length"
        return True


def start_sequences(prompts: Sequence[NumberedPrompt], request: Request, max_positions: int) -> list[ActiveSequence]:
    """Returns the empty continuations of all prompts: all samples of a prompt, then those of the next."""
    return [
        ActiveSequence(
            prompt.number,
            prompt.tokens,
            min(request.max_new_tokens, max_positions - len(prompt.tokens)),
            SequenceRandom(request.sampling.seed, prompt.number, sample, request.step),
            request,
            sample=sample,
            place=number * request.samples + sample,
        )
        for number, prompt in enumerate(prompts)
        for sample in range(request.samples)
    ]
