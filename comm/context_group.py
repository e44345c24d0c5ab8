"""Runs a context group's collectives, logs and counts them; sums are in rank order, so bitwise equal."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Literal, TypeVar

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Spread
from comm.layout import MOST_GATHERED_RANKS, Layout
from comm.protocol import (
    ALONE,
    CompletedWork,
    ContextGroup,
    Contribution,
    MappedWork,
    Rows,
    SequenceParts,
    Work,
    zigzag_parts,
)
from comm.watchdog.collective_log import LoggedWork, group_name

T = TypeVar("T")

_ALIGNMENT_BYTES = 16


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def to_bytes(rows: Rows) -> Tensor:
    """Returns the bytes of all tensors one after the other, each from a multiple of 16 bytes on, uint8."""
    flat = [tensor.contiguous().flatten().view(torch.uint8) for tensor in rows]
    if len(flat) == 1:
        return flat[0]
    message = flat[0].new_zeros(sum(_aligned(tensor.numel()) for tensor in flat))
    for start, tensor in zip(_starts(rows), flat, strict=True):
        message[start : start + tensor.numel()] = tensor
    return message


def from_bytes(message: Tensor, like: Rows) -> Rows:
    """Reverses `to_bytes`: returns views of the message, with the shapes and types of `like`."""
    starts = _starts(like)
    return tuple(
        message[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    )


def _starts(rows: Rows) -> list[int]:
    return [0, *accumulate(_aligned(tensor.nbytes) for tensor in rows[:-1])]


class ContextLink:
    """Process group of a context group. Used only from the compute lane."""

    def __init__(self, group: ProcessGroup, layout: Layout, observers: Observers) -> None:
        self.members = tuple(distributed.get_process_group_ranks(group))
        self.index = distributed.get_rank(group)
        self.name = group_name("context", self.members)
        self.observers = observers
        self._group = group
        self._nodes = tuple(layout.node_of(rank) for rank in self.members)

    def start_gather(self, packed: Tensor) -> Work[list[Tensor]]:
        """Starts to send bytes to all members, and returns the bytes of each."""
        received = [torch.empty_like(packed) for _ in self.members]
        self._count([packed.nbytes] * len(self.members))
        work = distributed.all_gather(received, packed, group=self._group, async_op=True)
        return self._pending("gather of context rows", work, received, packed)

    def start_exchange(self, parts: Tensor) -> Work[Tensor]:
        """Starts to send row r of `parts` to member r. Returns what each member sent here."""
        received = torch.empty_like(parts)
        self._count([parts[0].nbytes] * len(self.members))
        work = distributed.all_to_all_single(received, parts, group=self._group, async_op=True)
        return self._pending("exchange of context gradients", work, received, parts)

    def start_shift(self, sent: Tensor, name: str) -> Work[Tensor]:
        """Starts to send a tensor to the next member and to receive an equally large one from the one before."""
        received = torch.empty_like(sent)
        to_splits = [0] * len(self.members)
        from_splits = to_splits.copy()
        to_splits[(self.index + 1) % len(self.members)] = sent.nbytes
        from_splits[self.index - 1] = sent.nbytes
        self._count(to_splits)
        # An all-to-all of one part: a send alone would deadlock on NCCL, and gloo sends nothing from a GPU's memory.
        sent_B, received_B = (tensor.flatten().view(torch.uint8) for tensor in (sent, received))
        work = distributed.all_to_all_single(
            received_B, sent_B, from_splits, to_splits, group=self._group, async_op=True
        )
        return self._pending(name, work, received, sent_B)

    def sum(self, values: Tensor) -> Tensor:
        """Implements `ContextGroup.sum`."""
        received = [torch.empty_like(values) for _ in self.members]
        work = distributed.all_gather(received, values.contiguous(), group=self._group, async_op=True)
        return ordered_sum(self._pending("sum over the context group", work, received, values).wait())

    def _pending(self, name: str, work: distributed.Work | None, received: T, sent: Tensor) -> Work[T]:
        log = self.observers.log
        return LoggedWork(log, log.start(self.name, self.members, name), work, received, sent)

    def _count(self, bytes_per_member: Sequence[int]) -> None:
        self.observers.traffic.add_context(Spread.of(bytes_per_member, self._nodes, self.index))


class LinkedContext:
    """Base class of context groups of several ranks: zig-zag parts, and sums."""

    def __init__(self, link: ContextLink) -> None:
        self._link = link
        self.size = len(link.members)
        self.index = link.index

    def parts(self, own_tokens: int) -> SequenceParts:
        """Implements `ContextGroup.parts`."""
        return zigzag_parts(own_tokens * self.size, self.size)

    def sum(self, values: Tensor) -> Tensor:
        """Implements `ContextGroup.sum`."""
        return self._link.sum(values)


class GatherContext(LinkedContext):
    """Implements `ContextGroup` with an all-gather of rows and an all-to-all of their gradients."""

    keeps_rows = True

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Implements `ContextGroup.visit`."""
        work = self._link.start_gather(to_bytes(rows))
        yield self.index, rows
        received = work.wait()
        for distance in range(1, self.size):
            index = (self.index - distance) % self.size
            yield index, from_bytes(received[index], rows)

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Implements `ContextGroup.collect`."""
        parts = [contribute(index, rows if index == self.index else kept[index]) for index in range(self.size)]
        stacked = torch.stack(parts)
        shape = stacked.shape
        dtype = stacked.dtype
        work = self._link.start_exchange(stacked.view(self.size, -1).view(torch.uint8))
        return MappedWork(work, lambda received: ordered_sum(list(received.view(dtype).view(shape))))


def ordered_sum(parts: Sequence[Tensor]) -> Tensor:
    """Adds tensors in their order, in float32 if their type is narrower."""
    total = parts[0]
    dtype = parts[0].dtype
    if dtype.is_floating_point:
        total = total.to(torch.promote_types(dtype, torch.float32))
    for part in parts[1:]:
        total = total + part
    return total.to(dtype)


class RingContext(LinkedContext):
    """Implements `ContextGroup` with sends around a ring; keeps no rows of other ranks.

    A rank sends to the next one and receives from the one before, and holds the rows of two ranks at a time. Its rows
    pass all other ranks in `size` - 1 steps. In a backward they pass again, one step ahead of the sum of their
    gradients, which ends at the rank that holds the tokens.
    """

    keeps_rows = False

    def visit(self, rows: Rows) -> Iterator[tuple[int, Rows]]:
        """Implements `ContextGroup.visit`."""
        message = to_bytes(rows)
        pending = None
        for distance in range(self.size):
            if pending is not None:
                message = pending.wait()
            if distance < self.size - 1:
                pending = self._link.start_shift(message, "context rows to the next rank")
            yield (self.index - distance) % self.size, from_bytes(message, rows) if distance else rows

    def collect(self, rows: Rows, kept: Mapping[int, Rows], contribute: Contribution) -> Work[Tensor]:
        """Implements `ContextGroup.collect`; the sum travels in float32 or wider, own part last."""
        own_part: Tensor | None = None
        pending: Work[Tensor] | None = None
        for index, visited in self.visit(rows):
            part = contribute(index, visited)
            wide = part.to(torch.promote_types(part.dtype, torch.float32)).contiguous()
            if own_part is None:
                own_part = wide
                dtype = part.dtype
                continue
            if pending is not None:
                wide = pending.wait() + wide
            pending = self._link.start_shift(wide, "context gradients to the next rank")
        assert own_part is not None
        assert pending is not None
        return CompletedWork((pending.wait() + own_part).to(dtype))


ContextExchange = Literal["auto", "gather", "ring"]


def open_context(
    group: ProcessGroup | None, layout: Layout, observers: Observers, exchange: ContextExchange = "auto"
) -> ContextGroup:
    """Returns the context group of a process group; `auto` gathers rows up to `MOST_GATHERED_RANKS` ranks."""
    if group is None or group.size() == 1:
        return ALONE
    link = ContextLink(group, layout, observers)
    is_ring = exchange == "ring" or (exchange == "auto" and group.size() > MOST_GATHERED_RANKS)
    return RingContext(link) if is_ring else GatherContext(link)
