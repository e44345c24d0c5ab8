"""Packs a row and the values sent with it into consecutive bytes, so that one message carries both."""

# Shape legend: B bytes of a row as sent, K numbers of a part, S rows taken, P places of each token.

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Self

import torch
from torch import Tensor

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
