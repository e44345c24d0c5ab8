"""Quantizes numbers to FP8 or E5M6 with a scale for every 128, or 128 x 128, and restores them.

`implementation`: None selects the default for the operands' device. Importing this package loads no torch: memory
accounts count tiles before any process starts. Shape legend: as in kernels/quantize/layout.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kernels.implementation import Implementation, is_reference

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch
    from torch import Tensor

    from kernels.quantize.layout import PackedE5M6, Quantized, QuantizedBlocks, QuantizedColumns

TILE = 128


def num_tiles(num_columns: int) -> int:
    """Number of tiles of 128 columns (or rows) that cover a row (or column); the last may be ragged."""
    return -(-num_columns // TILE)


def num_pairs(num_columns: int) -> int:
    """Number of column pairs that cover a row; the last may have one column.

    In E5M6 each pair takes three bytes.
    """
    return -(-num_columns // 2)


def quantize_1x128(
    rows_ND: Tensor,
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    implementation: Implementation | None = None,
) -> Quantized:
    """Quantizes rows by 128 columns, as `kernels.quantize.reference.quantize_1x128` does."""
    if is_reference(implementation, rows_ND.device):
        from kernels.quantize import reference

        return reference.quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)
    from kernels.quantize import triton

    return triton.quantize_1x128(rows_ND, power_of_two=power_of_two, min_amax=min_amax)


def dequantize_1x128(
    quantized: Quantized,
    dtype: torch.dtype,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Restores rows from codes and scales, ND, as `kernels.quantize.reference.dequantize_1x128` does."""
    if is_reference(implementation, quantized.codes.device):
        from kernels.quantize import reference

        return reference.dequantize_1x128(quantized, dtype)
    from kernels.quantize import triton

    return triton.dequantize_1x128(quantized, dtype)


def quantize_columns(
    rows_ND: Tensor,
    counts: Sequence[int],
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    implementation: Implementation | None = None,
) -> QuantizedColumns:
    """Quantizes the transpose by 128 rows of a group, as `reference_columns.quantize_columns` does."""
    if is_reference(implementation, rows_ND.device):
        from kernels.quantize import reference_columns

        return reference_columns.quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=min_amax)
    from kernels.quantize import triton_columns

    return triton_columns.quantize_columns(rows_ND, counts, power_of_two=power_of_two, min_amax=min_amax)


def requantize_columns(
    quantized: Quantized,
    counts: Sequence[int],
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    implementation: Implementation | None = None,
) -> QuantizedColumns:
    """Quantizes the transpose of FP8 rows, as `reference_columns.requantize_columns` does."""
    if is_reference(implementation, quantized.codes.device):
        from kernels.quantize import reference_columns

        return reference_columns.requantize_columns(quantized, counts, power_of_two=power_of_two, min_amax=min_amax)
    from kernels.quantize import triton_columns

    return triton_columns.requantize_columns(quantized, counts, power_of_two=power_of_two, min_amax=min_amax)


def quantize_128x128(
    values: Tensor,
    *,
    power_of_two: bool,
    min_amax: float = 1e-4,
    implementation: Implementation | None = None,
) -> QuantizedBlocks:
    """Quantizes one or several weights by blocks, as `reference_blocks.quantize_128x128` does."""
    if is_reference(implementation, values.device):
        from kernels.quantize import reference_blocks

        return reference_blocks.quantize_128x128(values, power_of_two=power_of_two, min_amax=min_amax)
    from kernels.quantize import triton_blocks

    return triton_blocks.quantize_128x128(values, power_of_two=power_of_two, min_amax=min_amax)


def transpose_blocks(
    quantized: QuantizedBlocks,
    *,
    implementation: Implementation | None = None,
) -> QuantizedBlocks:
    """Transposes a weight in FP8, as `kernels.quantize.reference_blocks.transpose_blocks` does."""
    if is_reference(implementation, quantized.codes.device):
        from kernels.quantize import reference_blocks

        return reference_blocks.transpose_blocks(quantized)
    from kernels.quantize import triton_blocks

    return triton_blocks.transpose_blocks(quantized)


def pack_e5m6(
    rows_ND: Tensor,
    *,
    implementation: Implementation | None = None,
) -> PackedE5M6:
    """Packs rows into 12 bits per number, as `kernels.quantize.reference_e5m6.pack_e5m6` does."""
    if is_reference(implementation, rows_ND.device):
        from kernels.quantize import reference_e5m6

        return reference_e5m6.pack_e5m6(rows_ND)
    from kernels.quantize import triton_e5m6

    return triton_e5m6.pack_e5m6(rows_ND)


def unpack_e5m6(
    packed: PackedE5M6,
    num_columns: int,
    dtype: torch.dtype,
    *,
    implementation: Implementation | None = None,
) -> Tensor:
    """Restores rows from 12 bits per number, ND, as `kernels.quantize.reference_e5m6.unpack_e5m6` does."""
    if is_reference(implementation, packed.codes.device):
        from kernels.quantize import reference_e5m6

        return reference_e5m6.unpack_e5m6(packed, num_columns, dtype)
    from kernels.quantize import triton_e5m6

    return triton_e5m6.unpack_e5m6(packed, num_columns, dtype)
