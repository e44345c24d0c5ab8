"""How a row and what rides with it lie in one run of bytes, so that one message carries both.

Shape legend: N rows, B bytes of a row as sent, K numbers of a part, S rows taken, T tokens, P places of each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Self

import torch
from torch import Tensor

from kernels.permute import permute, unpermute

_ROW_ALIGNMENT = 16  # bytes that one load of a GPU's thread takes
_RIDER_ALIGNMENT = 8  # of the widest number


@dataclass(frozen=True, slots=True)
class RowPart:
    """`width` numbers of `dtype` in each row."""

    width: int
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """In each row, without padding."""
        return self.width * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class RowFormat:
    """The parts of a row as sent: the row itself, and what rides with it. A row alone is sent without padding.

    begins: where each part begins, in bytes. bytes_per_row: B.
    """

    parts: tuple[RowPart, ...]
    begins: tuple[int, ...]
    bytes_per_row: int

    @classmethod
    def of(cls, *tensors: Tensor) -> Self:
        """Makes the format of rows of each of these."""
        return cls.of_parts(*(RowPart(tensor.shape[1], tensor.dtype) for tensor in tensors))

    @classmethod
    def of_parts(cls, row: RowPart, *riders: RowPart) -> Self:
        """Makes the format of a row, and of what is sent with it."""
        if not riders:
            return cls((row,), (0,), row.num_bytes)
        widths = (_round_up(rider.num_bytes, _RIDER_ALIGNMENT) for rider in riders)
        *begins, end = accumulate(widths, initial=_round_up(row.num_bytes, _ROW_ALIGNMENT))
        return cls((row, *riders), (0, *begins), _round_up(end, _ROW_ALIGNMENT))

    def allocate(self, num_rows: int, device: torch.device) -> Tensor:
        """Bytes for rows, NB."""
        return torch.empty(num_rows, self.bytes_per_row, dtype=torch.uint8, device=device)

    def part(self, bytes_NB: Tensor, index: int) -> Tensor:
        """Returns a view of one part of each row, NK."""
        part, begin = self.parts[index], self.begins[index]
        return bytes_NB[:, begin : begin + part.num_bytes].view(part.dtype)

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Rows from their parts, bytes_NB; without a copy where there is one part."""
        if len(self.parts) == 1:
            return bytes_of(tensors[0])
        bytes_NB = self.allocate(len(tensors[0]), tensors[0].device)
        for index, tensor in enumerate(tensors):
            self.part(bytes_NB, index).copy_(tensor)
        return bytes_NB

    def gather(self, tensors: Sequence[Tensor], source_S: Tensor) -> Tensor:
        """Rows of the tensors, each contiguous by itself, taken by index; bytes_SB."""
        bytes_SB = self.allocate(len(source_S), source_S.device)
        for index, tensor in enumerate(tensors):
            permute(tensor, source_S, self.part(bytes_SB, index))
        return bytes_SB

    def sum(self, bytes_NB: Tensor, places_TP: Tensor, dtype: torch.dtype | None = None) -> list[Tensor]:
        """Sums for each part the rows of each token, in their order; a negative place adds nothing.

        `dtype`: of the row's sum, if not its own.
        """
        riders = range(1, len(self.parts))
        rows_TD = unpermute(self.part(bytes_NB, 0), places_TP, dtype)
        return [rows_TD, *(unpermute(self.part(bytes_NB, index), places_TP) for index in riders)]


def bytes_of(rows_ND: Tensor) -> Tensor:
    """Rows as bytes, NB; a view where they are contiguous."""
    return rows_ND.contiguous().view(len(rows_ND), prod(rows_ND.shape[1:])).view(torch.uint8)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
