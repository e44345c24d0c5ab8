"""Tests that the balance loss of ranks that share sequences adds up to that of whole sequences."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from comm.context.protocol import Contribution, Rows, SequenceParts, zigzag_parts
from comm.protocol import Work
from kernels.attention.documents import Documents
from tests.context_parts import join_held, take_held
from tests.kernels.plain import randn
from tests.model.test_router import make_router


@dataclass(frozen=True, slots=True)
class RecordedContext:
    """One of several ranks that share sequences. The sum over the group is known from a first pass."""

    size: int
    index: int
    given: list[Tensor]
    total: Tensor | None = None
    keeps_rows = True

    def parts(self, own_tokens: int) -> SequenceParts:
        """Returns the zig-zag parts."""
        return zigzag_parts(own_tokens * self.size, self.size)

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Is not called by the router."""
        raise AssertionError

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Is not called by the router."""
        raise AssertionError

    def sum(self, values: Tensor) -> Tensor:
        """Records this rank's part, and returns the known sum."""
        self.given.append(values)
        return values if self.total is None else self.total


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_balance_loss_of_ranks_that_share_sequences_adds_up_to_the_whole(size: int, masked: bool) -> None:
    router, x = make_router(), randn(2, 16, 32, seed=4)
    # Uneven documents across the parts of ranks, and padding at the end of each sequence.
    lengths = ((5, 7, 1), (3, 9))
    positions = torch.full((2, 16), -1)
    for sequence, documents in enumerate(lengths):
        start = 0
        for length in documents:
            positions[sequence, start : start + length] = torch.arange(length)
            start += length
    documents = Documents.from_positions(positions) if masked else None
    whole = x.clone().requires_grad_()
    expected = router(whole).balance(documents)
    expected.backward()

    def part(index: int, parts: list[Tensor], total: Tensor | None) -> tuple[Tensor, Tensor]:
        own = take_held(x, index, size).clone().requires_grad_()
        found = router(own).balance(documents, RecordedContext(size, index, parts, total))
        found.backward()
        assert own.grad is not None
        return found.detach(), own.grad

    parts: list[Tensor] = []
    for index in range(size):
        part(index, parts, None)
    total = torch.stack(parts).sum(0)
    found = [part(index, [], total) for index in range(size)]
    torch.testing.assert_close(torch.stack([loss for loss, _ in found]).sum(), expected.detach(), rtol=1e-13, atol=0)
    assert whole.grad is not None
    gradient = join_held([gradient for _, gradient in found])
    torch.testing.assert_close(gradient, whole.grad, rtol=1e-12, atol=1e-16)
