"""What slices of the same sequences share in one stage: a context group over time, on some ranks.

Forwards run slice by slice. A slice attends to the rows of earlier ones, which stay until its backward. Backwards run
in reverse, so the gradient of a slice's rows is complete when its backward begins (arXiv:2406.03488, section 3).
Shape legend: T tokens of a slice, N = B T, S sequences or documents.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from comm.protocol import ContextGroup, Contribution, MappedWork, Rows, SequenceParts, Work


@dataclass(slots=True)
class _SharedLayer:
    """State of one layer, by slice.

    Attributes:
        rows: rows of all ranks by index, from a slice's forward to its backward; only this rank's in a ring.
        gradients: sum of the gradients of a slice's rows from later slices, in float32 or wider.
        counts: how often a slice's tokens choose each expert, by sequence: SE.
        shares: sum of a slice's normalized scores, by sequence: SE.
    """

    rows: dict[int, dict[int, Rows]] = field(default_factory=dict)
    gradients: dict[int, Tensor] = field(default_factory=dict)
    counts: dict[int, Tensor] = field(default_factory=dict)
    shares: dict[int, Tensor] = field(default_factory=dict)


class SharedGradient:
    """Sum of the gradients of an output head's matrix over slices, in place of one for each slice."""

    def __init__(self) -> None:
        self._total: Tensor | None = None

    def add(self, gradient: Tensor | None) -> Tensor | None:
        """Adds a slice's gradient, and returns the sum to the first slice, which runs backward last."""
        if self._total is None or gradient is None:
            self._total = gradient
            # Saved tensors must not change, but later slices add to this one.
            return None if gradient is None else gradient.data
        self._total += gradient
        return None

    def tensors(self) -> Iterator[Tensor]:
        """Yields the sum, if a backward still needs it."""
        if self._total is not None:
            yield self._total

    def end(self) -> None:
        """Forgets the sum, which the backward of the first slice holds."""
        self._total = None


class SlicedSequences:
    """Sequences of one micro-batch in one stage, and what their slices share in each layer and head."""

    def __init__(self, parts: SequenceParts) -> None:
        self.parts = parts
        self._layers: dict[int, _SharedLayer] = {}
        self.heads: defaultdict[int, SharedGradient] = defaultdict(SharedGradient)

    def shared(self) -> Iterator[Tensor]:
        """Yields what later slices read or add to: rows of slices before their backward, and gradients."""
        for layer in self._layers.values():
            for by_rank in layer.rows.values():
                for rows in by_rank.values():
                    yield from rows
        for head in self.heads.values():
            yield from head.tensors()

    def carried(self) -> Iterator[Tensor]:
        """Yields the gradients of earlier slices' rows."""
        for layer in self._layers.values():
            yield from layer.gradients.values()

    def context(self, layer: int, index: int, ranks: ContextGroup) -> "SliceContext":
        """Returns the context group of a slice in a layer, given the ranks that share each slice."""
        return SliceContext(self.parts, index, self._layers.setdefault(layer, _SharedLayer()), ranks)


class SliceContext:
    """Implements `ContextGroup` for a slice; the other members are all slices on all ranks."""

    def __init__(self, parts: SequenceParts, slice_index: int, layer: _SharedLayer, ranks: ContextGroup) -> None:
        self.size = len(parts.held)
        self.index = slice_index * ranks.size + ranks.index
        self.keeps_rows = ranks.keeps_rows
        self._parts = parts
        self._slice = slice_index
        self._layer = layer
        self._ranks = ranks

    def parts(self, own_tokens: int) -> SequenceParts:
        """Implements `ContextGroup.parts`."""
        assert own_tokens == self._parts.tokens_of(self.index), "hidden states of another slice"
        return self._parts

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Yields the rows of this slice and of those before it. No token attends to later ones."""
        ranks = self._ranks
        arrived = self._layer.rows[self._slice] = {ranks.index: rows}
        for rank, visited in ranks.visit(rows):
            if self.keeps_rows:
                arrived[rank] = visited
            yield self._member(self._slice, rank), visited
        for earlier in range(self._slice - 1, -1, -1):
            own = self._layer.rows[earlier]
            for rank, visited in own.items() if self.keeps_rows else ranks.visit(own[ranks.index]):
                yield self._member(earlier, rank), visited

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Returns the gradient of this slice's rows, and adds to those of earlier slices."""
        gradients = self._layer.gradients
        # Later slices have run their backward already and left their part of this slice's gradient.
        later = gradients.pop(self._slice, None)
        own = self._collect(self._slice, rows, kept, contribute)
        # This slice attended to all earlier ones, so each of them gets a part: [B, T, C].
        for index in range(self._slice):
            part = self._collect(index, self._layer.rows[index][self._ranks.index], kept, contribute).wait()
            if index in gradients:
                gradients[index] += part
            else:
                # Sums of many slices in 16 bits would lose small parts.
                gradients[index] = part.to(torch.promote_types(part.dtype, torch.float32), copy=True)
        del self._layer.rows[self._slice]
        return MappedWork(own, lambda part: part if later is None else (later + part).to(part.dtype))

    def _collect(self, index: int, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Returns the gradient of this rank's rows of a slice, from the queries of this slice on all ranks."""
        members = {rank: self._member(index, rank) for rank in range(self._ranks.size)}
        kept_by_rank = {rank: kept[member] for rank, member in members.items() if member in kept}
        return self._ranks.collect(rows, kept_by_rank, lambda rank, visited: contribute(members[rank], visited))

    def _member(self, index: int, rank: int) -> int:
        return index * self._ranks.size + rank

    def sum(self, values: Tensor) -> Tensor:
        """Is not possible: later slices have not run."""
        raise AssertionError("a slice cannot sum values of later slices")

    def balance(self, normal_NE: Tensor, numbers_N: Tensor, counts_SE: Tensor, slopes_S: Tensor) -> Tensor:
        """Returns the balance loss of whole sequences with the last slice, and 0 with those before it.

        Every slice has its part of the gradient, from the counts of all slices, which are known in the backwards.
        """
        counts_SE = self._ranks.sum(counts_SE)
        loss: Tensor = _SliceBalance.apply(normal_NE, self, numbers_N, counts_SE, slopes_S)  # type: ignore[no-untyped-call]
        return loss

    def record_balance(self, counts_SE: Tensor, shares_SE: Tensor) -> bool:
        """Records a slice's part, again if it is recomputed, and returns whether the slice is the last."""
        self._layer.counts[self._slice] = counts_SE
        self._layer.shares[self._slice] = shares_SE
        return (self._slice + 1) * self._ranks.size == self.size

    def factors(self, slopes_S: Tensor) -> Tensor:
        """Returns the factor of each expert's scores in a sequence, from the counts of all slices: SE."""
        return slopes_S[:, None] * torch.stack(list(self._layer.counts.values())).sum(0)

    def shares(self) -> Tensor:
        """Returns the sum of normalized scores over all slices, SE."""
        return torch.stack(list(self._layer.shares.values())).sum(0)


class _SliceBalance(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, normal_NE: Tensor, slice_: SliceContext, numbers_N: Tensor, counts_SE: Tensor, slopes_S: Tensor
    ) -> Tensor:
        ctx.slice = slice_
        ctx.save_for_backward(numbers_N, slopes_S)
        shares_SE = torch.zeros_like(counts_SE).index_add_(0, numbers_N, normal_NE)
        is_last = slice_.record_balance(counts_SE, shares_SE)
        return (slice_.factors(slopes_S) * slice_.shares()).sum() if is_last else normal_NE.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        numbers_N, slopes_S = ctx.saved_tensors
        return grads[0] * ctx.slice.factors(slopes_S)[numbers_N], None, None, None, None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlace:
    """Which micro-batch a run of a stage is; with sequences, it is slice number `index` of them."""

    direction: int = 0
    micro_batch: int = 0
    sequences: SlicedSequences | None = None
    index: int = 0


class SlicedRuns:
    """Sequences of one stage of which some slices have begun but not all."""

    def __init__(self, parts: SequenceParts, slices: int) -> None:
        self._parts = parts
        self._slices = slices
        self._begun: dict[tuple[int, int], SlicedSequences] = {}

    def place(self, direction: int, micro_batch: int) -> RunPlace:
        """Returns the place of the next run of a stage. Slices of a sequence must be asked for in order."""
        if self._slices == 1:
            return RunPlace(direction=direction, micro_batch=micro_batch)
        number, index = divmod(micro_batch, self._slices)
        key = direction, number
        if index == 0:
            self._begun[key] = SlicedSequences(self._parts)
        sequences = self._begun[key] if index < self._slices - 1 else self._begun.pop(key)
        return RunPlace(direction=direction, micro_batch=micro_batch, sequences=sequences, index=index)
