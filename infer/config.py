"""Configuration and checks of text generation. Imports no torch, so that commands check early."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from base.refusal import RuleError
from model.config import ModelConfig

Finish = Literal["stop", "length"]  # why a sequence ended: a stop token or the stop condition, or the maximum length

Speculative = Literal[True, False, "auto"]
"""Whether an MTP module drafts tokens that the main model verifies; auto: if that is faster."""


class GenerateError(RuleError):
    """Invalid request."""


class ConstraintError(GenerateError):
    """A constraint that allows no next token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How the next token is chosen from the model's logits.

    Attributes:
        temperature: divisor of the logits; 0 chooses the most probable token.
        top_k: number of most probable tokens that are kept; None keeps all.
        top_p: of those, the smallest set of most probable tokens whose probabilities sum to at least this value is
            kept; 1 keeps all.
        min_p: of those, tokens with at least this share of the highest probability are kept; 0 keeps all.
        repetition_penalty: divisor of positive logits, and factor of negative ones, of all tokens of prompt and
            continuation (arXiv:1909.05858, section 4.1); 1 changes nothing.
        presence_penalty: subtracted from the logits of all tokens of the continuation.
        frequency_penalty: subtracted from the logit of a token each time that it is in the continuation.
        seed: seed of the random numbers. Sampling is reproducible regardless of the batch.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        repetition = self.repetition_penalty
        rules = (
            ("temperature", math.isfinite(self.temperature) and self.temperature >= 0, "finite and at least 0", 0),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1, or null for all tokens", 1),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1", 1 if self.top_p > 1 else 0.01),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1", 1 if self.min_p > 1 else 0),
            ("repetition_penalty", math.isfinite(repetition) and repetition > 0, "finite and above 0", 1),
            ("presence_penalty", math.isfinite(self.presence_penalty), "finite", 0),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "finite", 0),
            ("seed", self.seed >= 0, "at least 0", 0),
        )
        for name, is_valid, rule, near in rules:
            if not is_valid:
                raise GenerateError(f"{name}: must be {rule}, is {getattr(self, name)}; nearest valid: {near}")

    @property
    def keeps_all(self) -> bool:
        """Whether every token of the vocabulary can be drawn."""
        return self.temperature > 0 and self.top_k is None and self.top_p == 1 and self.min_p == 0

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on how often tokens occurred before."""
        return (self.repetition_penalty, self.presence_penalty, self.frequency_penalty) != (1.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Statistics:
    """Statistics of a generation. A pass of the main model over B sequences counts B times.

    Attributes:
        passes: passes of the main model, including those over prompts.
        visits: passes of batches, each of which counts once; a prompt that is read in chunks has one for each chunk.
        rounds: rounds of cohorts that a pipelined engine ran.
        tokens: chosen tokens, including stop tokens; without drafts, equal to `passes`.
        drafts_offered: drafts of the MTP module that could be used.
        seconds: time from reading the first prompt to the last token.
        choice: measured gains by which `speculative=auto` chose; empty if nothing was measured.
    """

    passes: int = 0
    visits: int = 0
    rounds: int = 0
    tokens: int = 0
    drafts_offered: int = 0
    drafts_accepted: int = 0
    seconds: float = 0.0
    choice: str = ""

    @property
    def acceptance_rate(self) -> float:
        """Accepted drafts divided by offered drafts, or 0 if none was offered."""
        return self.drafts_accepted / max(self.drafts_offered, 1)

    def summary(self) -> str:
        """Returns a sentence about accepted drafts and passes."""
        choice = f"; {self.choice}" if self.choice else ""
        if not self.drafts_offered:
            return f"no drafts, {self.passes} passes{choice}"
        return (
            f"drafts accepted {self.acceptance_rate * 100:.0f} % ({self.drafts_accepted} of {self.drafts_offered}), "
            f"{self.passes} passes instead of {self.tokens}{choice}"
        )


ENGINE_COUNTS = ("rounds", "visits", "passes", "drafts_offered", "drafts_accepted")
"""Fields of `Statistics` that a journal of rollouts has, summed over draws."""


def sum_statistics(parts: Sequence[Statistics], seconds: float) -> Statistics:
    """Returns the joint statistics of parts that ran at the same time, `seconds` in all."""
    names = [entry.name for entry in fields(Statistics) if entry.type is int]
    return Statistics(**{name: sum(getattr(part, name) for part in parts) for name in names}, seconds=seconds)


def check(
    config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    speculative: Speculative,
    batch_size: int,
) -> None:
    """Rejects prompts and settings that the model cannot serve; raises `GenerateError`."""
    if config.head != "tokens":
        raise GenerateError("model.head: must be tokens to continue prompts, is score; the weights are a reward model")
    if max_new_tokens < 0:
        raise GenerateError(f"max_new_tokens: must be at least 0, is {max_new_tokens}; nearest valid: 0")
    if batch_size < 1:
        raise GenerateError(f"batch_size: must be at least 1, is {batch_size}; nearest valid: 1")
    if speculative is True and config.mtp_depth == 0:
        raise GenerateError("speculative: true needs an MTP module, the model has none; nearest valid: false or auto")
    check_sequences(config, "prompt", prompts)


def check_sequences(config: ModelConfig, name: str, sequences: Sequence[Sequence[int]]) -> None:
    """Rejects sequences that are empty or too long, or hold tokens outside the vocabulary."""
    for number, sequence in enumerate(sequences, 1):
        if not sequence:
            raise GenerateError(f"{name} {number}: must have at least one token, has none")
        if len(sequence) > config.max_position_tokens:
            rule = f"must be at most the model's max_position_tokens={config.max_position_tokens} tokens long"
            raise GenerateError(f"{name} {number}: {rule}, is {len(sequence)}")
        outside = [token for token in sequence if not 0 <= token < config.vocab_size]
        if outside:
            rule = f"tokens must be from 0 to {config.vocab_size - 1}"
            raise GenerateError(f"{name} {number}: {rule}, contains {outside[0]}")
