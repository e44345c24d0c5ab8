"""Defines the order of the forwards and of the backwards on every rank of an interleaved pipeline.

Micro-batches pass in rounds: all micro-batches of a round run chunk 0, then all run chunk 1, and so on
(arXiv:2104.04473, section 2.2). All ranks use the same order, so the messages of a link are sent and received in the
same order regardless of when a rank alternates between forwards and backwards.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class ChunkOrder:
    """Order of the forwards and backwards of every rank.

    A position is an index into the order. Position k of the forwards is on all ranks the same micro-batch and chunk.

    Attributes:
        num_micro_batches: number of micro-batches.
        chunks: number of chunks of a rank.
        num_rounds: number of rounds. Their sizes differ by at most one; the last ones are larger.
    """

    num_micro_batches: int
    chunks: int
    num_rounds: int

    @property
    def largest_round(self) -> int:
        """Number of micro-batches in the largest round."""
        return -(-self.num_micro_batches // self.num_rounds)

    @cached_property
    def forwards(self) -> list[tuple[int, int]]:
        """Chunk and micro-batch of each position of the forwards."""
        return [
            (chunk, micro_batch)
            for members in self._rounds()
            for chunk in range(self.chunks)
            for micro_batch in members
        ]

    @cached_property
    def backwards(self) -> list[tuple[int, int]]:
        """Chunk and micro-batch of each position of the backwards."""
        return [
            (chunk, micro_batch)
            for members in self._rounds()
            for chunk in reversed(range(self.chunks))
            for micro_batch in members
        ]

    @cached_property
    def next_forward(self) -> list[int]:
        """Position of the same micro-batch's forward in the next chunk, or -1, for each position."""
        at = {step: position for position, step in enumerate(self.forwards)}
        return [at.get((chunk + 1, micro_batch), -1) for chunk, micro_batch in self.forwards]

    @cached_property
    def next_backward(self) -> list[int]:
        """Position of the same micro-batch's backward in the chunk before, or -1, for each position."""
        at = {step: position for position, step in enumerate(self.backwards)}
        return [at.get((chunk - 1, micro_batch), -1) for chunk, micro_batch in self.backwards]

    @cached_property
    def turn(self) -> list[int]:
        """Position of the backward in the same chunk, for each position of the forwards."""
        at = {step: position for position, step in enumerate(self.backwards)}
        return [at[step] for step in self.forwards]

    def _rounds(self) -> list[range]:
        share, rest = divmod(self.num_micro_batches, self.num_rounds)
        rounds, start = [], 0
        for index in range(self.num_rounds):
            size = share + (index >= self.num_rounds - rest)
            rounds.append(range(start, start + size))
            start += size
        return rounds
