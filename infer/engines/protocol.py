"""Defines what every engine takes and returns. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from infer.config import Finish, GenerateError, Sampling, Statistics


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedPrompt:
    """A prompt of a job.

    Attributes:
        number: number of the prompt in the whole job, which decides its random numbers.
        tokens: token ids, at least one.
    """

    number: int
    tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """How an engine continues prompts.

    Attributes:
        samples: at least 1, number of continuations of each prompt.
        max_new_tokens: maximum number of new tokens of each; the model's positions limit it, too.
        sampling: how tokens are chosen.
        step: number of the request in a job, for example of a training step. It decides the random numbers, too.
        stop: token ids that end a continuation. The ending token is part of the rollout, because it was chosen.
    """

    samples: int
    max_new_tokens: int
    sampling: Sampling
    step: int = 0
    stop: frozenset[int] = frozenset()

    def __post_init__(self) -> None:
        """Rejects a request without samples.

        Raises:
            GenerateError: names the field.
        """
        if self.samples < 1:
            raise GenerateError(f"samples: must be at least 1, is {self.samples}; nearest valid: 1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """A sampled continuation.

    Attributes:
        prompt: number of its prompt.
        sample: its number among the prompt's continuations, from 0.
        tokens: chosen token ids, including the stop token that ended it.
        log_probs: log-probability of each token under the model at the sampling temperature (1 if it is 0), before
            top-k, top-p, min-p and penalties.
        finish: why it ended.
    """

    prompt: int
    sample: int
    tokens: tuple[int, ...]
    log_probs: tuple[float, ...]
    finish: Finish


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollouts:
    """Continuations by prompt and then by sample, and joint statistics."""

    rollouts: tuple[Rollout, ...]
    statistics: Statistics


class Engine(Protocol):
    """Protocol of an engine.

    Tokens and draws depend on weights, seed, step, prompt number and sample number, never on the layout or on other
    prompts.
    """

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Continues every prompt. All ranks of the model call it with the same arguments.

        Raises:
            GenerateError: a prompt is empty or too long, a token is outside the vocabulary, or logits are not finite.
        """
        ...
