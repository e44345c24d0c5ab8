"""The optimizer of a run and the course of its learning rate, as values. No torch here."""

import re
from dataclasses import dataclass
from decimal import Decimal
from typing import Literal, Self

SpanUnit = Literal["%", "steps", "tokens"]

_SPAN = re.compile(r"([0-9][0-9_]*(?:\.[0-9]+)?(?:e\+?[0-9]+)?)\s*(%|steps?|tokens?)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """Part of a run: a share of its tokens, or a number of steps or tokens.

    In YAML and on the command line a text such as `5 %`, `2000 steps` or `10e9 tokens`.

    Attributes:
        amount: 0 to 100 for `%`, otherwise a whole number.
        unit: of `amount`.
    """

    amount: float
    unit: SpanUnit

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a span from its text.

        Args:
            value: the text, or 0 for no span.

        Raises:
            ValueError: the rule, the value and how to write it; without the key.
        """
        rule = "must be a share of the run, steps or tokens, such as '5 %', '2000 steps' or '10e9 tokens'"
        if type(value) in (int, float):
            if value == 0:
                return cls(amount=0, unit="%")
            raise ValueError(f"{rule}, is {value!r}; nearest valid: {_with_unit(Decimal(str(value)))}")
        found = _SPAN.fullmatch(value.strip()) if isinstance(value, str) else None
        if found is None:
            raise ValueError(f"{rule}, is {value!r}")
        amount, unit = Decimal(found[1].replace("_", "")), found[2].lower()
        if unit == "%":
            if amount > 100:
                raise ValueError(f"must be at most 100 % of the run, is {value!r}; nearest valid: 100 %")
            return cls(amount=float(amount), unit="%")
        if amount != amount.to_integral_value():
            raise ValueError(f"must be a whole number of {unit}, is {value!r}; nearest valid: {round(amount)} {unit}")
        return cls(amount=int(amount), unit="steps" if unit.startswith("step") else "tokens")

    def to_plain(self) -> str:
        """Returns the text that `from_plain` reads."""
        return f"{Decimal(str(self.amount)).normalize():f} {self.unit}"


def _with_unit(number: Decimal) -> str:
    """Returns the span that a number without a unit most likely means."""
    if 0 < number <= 1:
        return f"{(number * 100).normalize():f} %"
    return f"{max(round(number), 0)} steps"


@dataclass(frozen=True, kw_only=True, slots=True)
class ConstantRate:
    """Linear warm-up, then constant."""

    kind: Literal["constant"]
    warmup: Span


@dataclass(frozen=True, kw_only=True, slots=True)
class DecayedRate:
    """Linear warm-up, constant, then a cosine or a straight line to `final_ratio` of the peak, then constant.

    The decay starts at `decay_start`, or at the end of the warm-up if that is later, and ends at `decay_end`.
    """

    kind: Literal["cosine", "linear"]
    warmup: Span
    decay_start: Span
    decay_end: Span
    final_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class WsdRate:
    """Warm-up, stable, decay (arXiv:2404.06395): the decay takes the last `decay` of the run.

    `decay_shape`: `linear`, or `one_minus_sqrt`, 1 - sqrt(progress) (arXiv:2405.18392).
    """

    kind: Literal["wsd"]
    warmup: Span
    decay: Span
    decay_shape: Literal["linear", "one_minus_sqrt"]
    final_ratio: float


@dataclass(frozen=True, kw_only=True, slots=True)
class V3Rate:
    """DeepSeek-V3's pre-training (arXiv:2412.19437, section 4.2): as a cosine decay, then a last, lower rate.

    The rate is `last_learning_rate` from `last_start` on.
    """

    kind: Literal["v3_tokens"]
    warmup: Span
    decay_start: Span
    decay_end: Span
    final_learning_rate: float
    last_start: Span
    last_learning_rate: float


RateSchedule = ConstantRate | DecayedRate | WsdRate | V3Rate


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimConfig:
    """AdamW.

    Attributes:
        learning_rate: the peak, which `schedule` scales.
        schedule: the course of the learning rate.
        sharding: `zero1` shards the optimizer state over the ranks that hold the same parameters (DeepSpeed),
            `replicated` keeps it whole on each of them (torch; the only one for float64).
        moments: their type (float32: float64 for float64 weights). A run may resume from a checkpoint with another
            one: from float32 to bf16 moments are rounded, the other direction changes nothing.
        bucket_elements: how much of the gradients zero1 reduces, and of the weights it gathers, at once.
    """

    kind: Literal["adamw"]
    learning_rate: float
    schedule: RateSchedule
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    sharding: Literal["zero1", "replicated"]
    moments: Literal["float32", "bf16"]
    bucket_elements: int
