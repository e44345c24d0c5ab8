"""Number of sequences per step, constant or with a batch ramp, as a pure function. Imports no torch."""

import math
from bisect import bisect_right
from dataclasses import dataclass

from kernels.ranges import PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRamp:
    """A ramp of the global batch size in equal increments.

    The sizes before the last one share the first `end_tokens` tokens equally, each rounded up to whole steps.
    DeepSeek-V3 uses 3,072 to 15,360 sequences over 469B tokens (arXiv:2412.19437, section 4.2, without the shape of the
    ramp).
    """

    start_sequences: PositiveInt  # first size
    end_tokens: PositiveInt  # number of tokens after which the ramp ends
    num_sizes: PositiveInt  # number of sizes, including the last one


@dataclass(frozen=True, slots=True)
class _Span:
    """Consecutive steps of one size, from `first_step` on; `first_sequence` sequences precede them."""

    first_step: int
    first_sequence: int
    sequences: int


class BatchSizes:
    """Batch sizes of all steps of a run, independent of the layout and of where a run resumed."""

    def __init__(self, sequences: int, sequence_length_tokens: int = 1, ramp: BatchRamp | None = None) -> None:
        self._length = sequence_length_tokens
        self._spans = _spans(sequences, sequence_length_tokens, ramp)

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes that a step can have, in sequences, in increasing order."""
        return tuple(span.sequences for span in self._spans)

    def sequences(self, step: int) -> int:
        """Returns the number of sequences that a step (from 0) reads."""
        return self._span(step).sequences

    def sequences_before(self, step: int) -> int:
        """Returns the number of sequences that all earlier steps read."""
        span = self._span(step)
        return span.first_sequence + (step - span.first_step) * span.sequences

    def steps_for(self, sequences: float) -> int:
        """Returns the number of steps, at least 1, that together read that many sequences or more."""
        span = next(span for span in reversed(self._spans) if span.first_sequence < sequences or span is self._spans[0])
        return max(1, span.first_step + math.ceil((sequences - span.first_sequence) / span.sequences))

    def tokens_before(self, step: int) -> int:
        """Returns the number of tokens that all earlier steps read, including padding."""
        return self.sequences_before(step) * self._length

    def _span(self, step: int) -> _Span:
        return self._spans[bisect_right(self._spans, step, key=lambda span: span.first_step) - 1]


def ramp_sizes(sequences: int, ramp: BatchRamp) -> tuple[int, ...]:
    """Returns the sizes of a ramp to `sequences`, in equal increments except for rounding."""
    growth = sequences - ramp.start_sequences
    return tuple(ramp.start_sequences + growth * place // (ramp.num_sizes - 1) for place in range(ramp.num_sizes))


def _spans(sequences: int, length: int, ramp: BatchRamp | None) -> tuple[_Span, ...]:
    if ramp is None:
        return (_Span(0, 0, sequences),)
    *growing, last = ramp_sizes(sequences, ramp)
    spans = []
    step = 0
    read = 0
    for place, size in enumerate(growing, 1):
        until = -(-ramp.end_tokens * place // len(growing))
        num_steps = max(0, -(-(until - read * length) // (size * length)))
        if num_steps:
            spans.append(_Span(step, read, size))
        step = step + num_steps
        read = read + num_steps * size
    return (*spans, _Span(step, read, last))
