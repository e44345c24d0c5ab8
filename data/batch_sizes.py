"""How many sequences each step reads, as a pure function of the step: one size, or a ramp in a few sizes. No torch."""

from bisect import bisect_right
from dataclasses import dataclass

from kernels.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRamp:
    """A global batch that grows, in sizes that are equally far apart, to the run's own.

    Over the first `end_tokens` tokens the sizes but the last take equal shares of them, each rounded up to whole steps;
    `num_sizes` counts the last one. DeepSeek-V3: from 3,072 to 15,360 sequences over 469B tokens (arXiv:2412.19437,
    section 4.2, which does not tell the shape).
    """

    start_sequences: PositiveInt
    end_tokens: PositiveInt
    num_sizes: PositiveInt


@dataclass(frozen=True, slots=True)
class _Span:
    """Steps of one size, from `first_step` on, and what was read before them."""

    first_step: int
    first_sequence: int
    sequences: int


class BatchSizes:
    """Sizes of all steps of a run. A function of its arguments alone: of no layout, and not of where a run began."""

    def __init__(self, sequences: int, sequence_length_tokens: int = 1, ramp: BatchRamp | None = None) -> None:
        """`sequences` a step, at the end of the ramp if there is one."""
        self._length = sequence_length_tokens
        self._spans = _spans(sequences, sequence_length_tokens, ramp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Every size that a step may have, in sequences, growing."""
        return tuple(span.sequences for span in self._spans)

    def sequences(self, step: int) -> int:
        """That step `step` (from 0) reads."""
        return self._span(step).sequences

    def sequences_before(self, step: int) -> int:
        """That all steps before it read."""
        span = self._span(step)
        return span.first_sequence + (step - span.first_step) * span.sequences

    def tokens_before(self, step: int) -> int:
        """That all steps before it read, padding counted."""
        return self.sequences_before(step) * self._length

    def _span(self, step: int) -> _Span:
        return self._spans[bisect_right(self._spans, step, key=lambda span: span.first_step) - 1]


def ramp_sizes(sequences: int, ramp: BatchRamp) -> tuple[int, ...]:
    """The sizes of a ramp to `sequences`, which lie equally far apart where they can."""
    growth = sequences - ramp.start_sequences
    return tuple(ramp.start_sequences + growth * place // (ramp.num_sizes - 1) for place in range(ramp.num_sizes))


def _spans(sequences: int, length: int, ramp: BatchRamp | None) -> tuple[_Span, ...]:
    if ramp is None:
        return (_Span(0, 0, sequences),)
    *growing, last = ramp_sizes(sequences, ramp)
    spans, step, read = [], 0, 0
    for place, size in enumerate(growing, 1):
        until = -(-ramp.end_tokens * place // len(growing))
        num_steps = max(0, -(-(until - read * length) // (size * length)))
        if num_steps:
            spans.append(_Span(step, read, size))
        step, read = step + num_steps, read + num_steps * size
    return (*spans, _Span(step, read, last))
