"""Runs all-to-alls over one process group, and logs and counts each of them.

A row and the values sent with it are packed into consecutive bytes, so that one message carries both.
"""

# Shape legend: R ranks of the group, C numbers for each, N rows sent, M rows received, B bytes of a row as sent, K
# numbers of a part, S rows taken, P places of each token.

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from typing import Self

import torch
from torch import Tensor, distributed
from torch.distributed import ProcessGroup

from comm.dispatch.traffic import ClipCount, Spread, Traffic
from comm.layout import Layout
from comm.protocol import CompletedWork, Label, Work
from comm.watchdog.collective_log import Collective, CollectiveLog, LoggedWork, group_name
from kernels.permute import permute, unpermute

_ROW_ALIGNMENT = 16  # bytes that one load of a GPU's thread takes
_EXTRA_ALIGNMENT = 8  # bytes of the widest dtype


@dataclass(frozen=True, slots=True)
class RowPart:
    """Part of a row: `width` numbers of `dtype`."""

    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes of the part in each row, without padding."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowFormat:
    """Format of a row as sent: the row itself and extra values. A row without extra values has no padding."""

    parts: tuple[RowPart, ...]  # the row, then the extra values
    begins: tuple[int, ...]  # offset of each part in bytes
    bytes_per_row: int  # bytes of a row as sent, B

    @classmethod
    def of(cls, *tensors: Tensor) -> Self:
        """Returns the format of rows that are made of the rows of each tensor."""
        return cls.of_parts(*(RowPart(tensor.shape[1], tensor.dtype) for tensor in tensors))

    @classmethod
    def of_parts(cls, row: RowPart, *extras: RowPart) -> Self:
        """Returns the format of a row and of the extra values that are sent with it."""
        if not extras:
            return cls((row,), (0,), row.num_bytes)
        # The row begins a message row; extra values follow it, each aligned, and the end is padded.
        widths = (_round_up(extra.num_bytes, _EXTRA_ALIGNMENT) for extra in extras)
        *begins, end = accumulate(widths, initial=_round_up(row.num_bytes, _ROW_ALIGNMENT))
        return cls((row, *extras), (0, *begins), _round_up(end, _ROW_ALIGNMENT))

    def allocate(self, num_rows: int, device: torch.device) -> Tensor:
        """Allocates uninitialized bytes for rows; NB."""
        return torch.empty(num_rows, self.bytes_per_row, dtype=torch.uint8, device=device)

    def part(self, bytes_NB: Tensor, index: int) -> Tensor:
        """Returns a view of one part of each row; NK."""
        part = self.parts[index]
        begin = self.begins[index]
        return bytes_NB[:, begin : begin + part.num_bytes].view(part.dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Packs the parts of rows into bytes_NB; copies nothing if there is only one part."""
        if len(self.parts) == 1:
            return bytes_of(tensors[0])
        bytes_NB = self.allocate(len(tensors[0]), tensors[0].device)
        for index, tensor in enumerate(tensors):
            self.part(bytes_NB, index).copy_(tensor)
        return bytes_NB

    def gather(self, tensors: Sequence[Tensor], source_S: Tensor) -> Tensor:
        """Gathers rows of the tensors by index into bytes_SB. Each row must be contiguous."""
        bytes_SB = self.allocate(len(source_S), source_S.device)
        for index, tensor in enumerate(tensors):
            permute(tensor, source_S, self.part(bytes_SB, index))
        return bytes_SB

    def sum(self, bytes_NB: Tensor, places_TP: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Sums the rows at `places_TP`, for each part, in order, the first to `dtype`; skips negative places."""
        extras = range(1, len(self.parts))
        rows_TD = unpermute(self.part(bytes_NB, 0), places_TP, dtype)
        return [rows_TD, *(unpermute(self.part(bytes_NB, index), places_TP) for index in extras)]


def bytes_of(rows_ND: Tensor) -> Tensor:
    """Returns rows as bytes, NB; a view if they are contiguous."""
    return rows_ND.contiguous().view(len(rows_ND), prod(rows_ND.shape[1:])).view(torch.uint8)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@dataclass(frozen=True, slots=True)
class Observers:
    """Counters and log of exchanges."""

    traffic: Traffic  # counter of rows and bytes sent
    log: CollectiveLog  # log of every collective
    clips: ClipCount = field(default_factory=ClipCount)  # counter of clipped tokens


class ExchangeGroup:
    """Process group with its exchanges. Used only from the comm lane."""

    members: tuple[int, ...]  # global ranks of the group's members
    nodes: tuple[int, ...]  # node of each member
    index: int  # index of this rank in the group

    def __init__(self, name: str, group: ProcessGroup, layout: Layout, observers: Observers) -> None:
        self.members = tuple(distributed.get_process_group_ranks(group))
        self.nodes = tuple(layout.node_of(rank) for rank in self.members)
        self.index = distributed.get_rank(group)
        self._name = group_name(name, self.members)
        self._group = group
        self._observers = observers

    def start_numbers(self, numbers_RC: Tensor, label: Label | None) -> Work[Tensor]:
        """Starts to send row r to member r, uncounted; the result has the row of each member, RC."""
        if len(self.members) == 1:
            return CompletedWork(numbers_RC)
        received_RC = torch.empty_like(numbers_RC)
        collective = self._start("exchange of counts", label)
        work = distributed.all_to_all_single(received_RC, numbers_RC, group=self._group, async_op=True)
        return LoggedWork(self._observers.log, collective, work, received_RC, numbers_RC)

    def exchange_numbers(self, numbers_RC: Tensor, label: Label | None) -> Tensor:
        """Exchanges numbers like `start_numbers`, and waits for the result."""
        return self.start_numbers(numbers_RC, label).wait()

    def start(
        self,
        rows_NB: Tensor,
        sent: Sequence[int],
        received: Sequence[int],
        name: str,
        label: Label | None,
        into_MB: Tensor | None = None,
    ) -> Work[Tensor]:
        """Starts to send uint8 rows in order, `sent[0]` of them to member 0, and so on. Does not block.

        They must not change until the exchange is complete. `into_MB` receives rows.
        """
        assert rows_NB.dtype == torch.uint8
        assert len(rows_NB) == sum(sent)
        self._count(rows_NB.shape[1], sent, received, label)
        if len(self.members) == 1:
            return CompletedWork(rows_NB if into_MB is None else into_MB.copy_(rows_NB))
        # One all-to-all of unequal parts: M rows arrive, by member.
        received_MB = rows_NB.new_empty(sum(received), rows_NB.shape[1]) if into_MB is None else into_MB
        collective = self._start(name, label)
        work = distributed.all_to_all_single(
            received_MB, rows_NB, list(received), list(sent), group=self._group, async_op=True
        )
        return LoggedWork(self._observers.log, collective, work, received_MB, rows_NB)

    def _start(self, name: str, label: Label | None) -> Collective:
        return self._observers.log.start(self._name, self.members, name, label)

    def _count(self, bytes_per_row: int, sent: Sequence[int], received: Sequence[int], label: Label | None) -> None:
        rows_sent = Spread.of(sent, self.nodes, self.index)
        rows_received = Spread.of(received, self.nodes, self.index)
        self._observers.traffic.add_sent(
            None if label is None else label.layer,
            rows_sent,
            rows_sent.times(bytes_per_row),
            rows_received.times(bytes_per_row),
        )
