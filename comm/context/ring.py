"""Implements a context group whose rows travel around a ring.

A rank sends to the next one and receives from the one before, and holds the rows of two ranks at a time. Its rows pass
all other ranks in `size` - 1 steps. In a backward they pass again, one step ahead of the sum of their gradients, which
ends at the rank that holds the tokens.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from comm.context.group import LinkedContext, Shift
from comm.context.packing import from_bytes, to_bytes
from comm.context.protocol import Contribution, Rows
from comm.protocol import CompletedWork, Work


class RingContext(LinkedContext):
    """Implements `ContextGroup` with sends around a ring; keeps no rows of other ranks."""

    keeps_rows = False

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Implements `ContextGroup.visit`."""
        message, pending = to_bytes(rows), None
        for distance in range(self.size):
            if pending is not None:
                pending.work.wait()
                message = pending.received
            if distance < self.size - 1:
                pending = self._link.start_shift(message, "context rows to the next rank")
            yield (self.index - distance) % self.size, from_bytes(message, rows) if distance else rows

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Implements `ContextGroup.collect`. This rank adds its own part last.

        The sum is rounded at each step, so it travels in float32 if the type is narrower.
        """
        own: Tensor | None = None
        pending: Shift | None = None
        for index, visited in self.visit(rows):
            part = contribute(index, visited)
            wide = part.to(torch.promote_types(part.dtype, torch.float32)).contiguous()
            if own is None:
                own, dtype = wide, part.dtype
                continue
            if pending is not None:
                pending.work.wait()
                wide = pending.received + wide
            pending = self._link.start_shift(wide, "context gradients to the next rank")
        assert own is not None
        assert pending is not None
        pending.work.wait()
        return CompletedWork((pending.received + own).to(dtype))
