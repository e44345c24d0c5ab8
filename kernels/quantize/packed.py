"""Rows in FP8 as one run of bytes each, so that one message carries codes and scales.

Shape legend: N rows, D columns, B bytes of a packed row.
"""

import torch
from torch import Tensor

from kernels.quantize.layout import Quantized, num_tiles

_SCALE_BYTES = 4


def packed_bytes(num_columns: int) -> int:
    """Bytes of a packed row: D codes and a float32 scale for every 128 of them."""
    return num_columns + _SCALE_BYTES * num_tiles(num_columns)


def pack(quantized: Quantized) -> Tensor:
    """Codes, then scales, of each row as bytes; uint8 NB without padding."""
    return torch.cat([quantized.codes.view(torch.uint8), quantized.scales.contiguous().view(torch.uint8)], 1)


def unpack(packed_NB: Tensor, num_columns: int) -> Quantized:
    """What `pack` was given; views of it where the scales lie so that they can be read."""
    codes, scales = packed_NB.split([num_columns, _SCALE_BYTES * num_tiles(num_columns)], 1)
    if num_columns % _SCALE_BYTES:
        # Else a row's scales begin at any byte, and a float32 must not.
        scales = scales.clone(memory_format=torch.contiguous_format)
    return Quantized(codes.view(torch.float8_e4m3fn), scales.view(torch.float32))
