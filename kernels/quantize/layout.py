"""What a matrix becomes in few bits: codes, and a scale for every 128 numbers of a row or column, or 128 x 128 of both.

Shape legend: N rows, D columns, T tiles in a row, P rows once every group is filled up to whole tiles.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.quantize import TILE as TILE
from kernels.quantize import num_pairs as num_pairs
from kernels.quantize import num_tiles as num_tiles

LARGEST_CODE = 448.0
SMALLEST_MIN_AMAX = 2.0**-117
LARGEST_MIN_AMAX = 2.0**127
# As in DeepSeek's published kernels: a tile of activations below it is as good as zero.
ROWS_MIN_AMAX = 1e-4
# Gradients are small by nature: with this bound any number that bfloat16 holds, down to 2**-133, is some scale times a
# code other than zero.
GRADIENTS_MIN_AMAX = SMALLEST_MIN_AMAX
# Of E5M6: (1 + 63/64) * 2**15, as exponent 31 means what it means in IEEE half precision.
LARGEST_E5M6 = 65024.0
# The scale of a tile this small is 2**-126, the smallest normal float32.
E5M6_MIN_AMAX = LARGEST_E5M6 * 2.0**-126

CODES = torch.float8_e4m3fn
_SCALE_BYTES = 4


class Quantized(NamedTuple):
    """Rows in FP8 (arXiv:2412.19437, section 3.3.2).

    Attributes:
        codes: float8_e4m3fn [N, D].
        scales: float32 [N, ceil(D / 128)], multipliers: code times scale gives the value back. NaN for a tile that
            held a NaN or an infinity.
    """

    codes: Tensor
    scales: Tensor


class QuantizedBlocks(NamedTuple):
    """A weight in FP8, in blocks of 128 x 128 (arXiv:2412.19437, section 3.3.2). The last ones may be ragged.

    Attributes:
        codes: float8_e4m3fn [..., N, D]; leading dimensions, of experts say, have blocks of their own.
        scales: float32 [..., ceil(N / 128), ceil(D / 128)], multipliers: code times scale gives the value back. NaN for
            a block that held a NaN or an infinity.
    """

    codes: Tensor
    scales: Tensor


class QuantizedColumns(NamedTuple):
    """Rows in groups, transposed and in FP8, by tiles of 128 rows of a group (arXiv:2412.19437, section 3.3.2).

    An operand of a product that sums over rows. Every group is filled up with zeros to a multiple of 128 rows, so that
    no tile belongs to two; a group of no rows has no tile.

    Attributes:
        codes: float8_e4m3fn [D, P]; the filling has codes 0, or NaN in a tile that is NaN.
        scales: float32 [D, P / 128], multipliers. NaN for a tile that held a NaN or an infinity.
    """

    codes: Tensor
    scales: Tensor


class PackedE5M6(NamedTuple):
    """Rows in 12 bits a number: sign, 5 bits of exponent (bias 15), 6 of mantissa (arXiv:2412.19437, section 3.3.3).

    Which is IEEE half precision without its last 4 bits. Of each row the lower 8 bits of all numbers come first, then
    the upper 4 bits of two numbers to a byte, the even one's lower: bytes that a GPU can load and store 16 at a time,
    which it could not if the bits of a number stayed together. A row of odd length is filled up with a zero.

    Attributes:
        codes: uint8 [N, 3 * ceil(D / 2)].
        scales: float32 [N, ceil(D / 128)], multipliers, powers of two. NaN for a tile that held a NaN or an infinity.
    """

    codes: Tensor
    scales: Tensor


def padded_rows(counts: Sequence[int]) -> int:
    """Rows of all groups once each is filled up to a multiple of 128."""
    return TILE * sum(map(num_tiles, counts))


def check_counts(subject: str, counts: Sequence[int], num_rows: int) -> None:
    """Refuses sizes of groups that do not divide up the rows.

    Args:
        subject: what the counts are of, for the message.
        counts: rows of each group.
        num_rows: of all groups together.

    Raises:
        ValueError: a count is negative, or they do not add up to the rows.
    """
    if min(counts, default=0) < 0:
        raise ValueError(f"{subject}: a count of rows must not be negative, got {min(counts)}; nearest: 0")
    if sum(counts) != num_rows:
        raise ValueError(f"{subject}: counts must add up to the number of rows, {num_rows}, got {sum(counts)}")


def check_min_amax(min_amax: float) -> None:
    """Refuses a lower bound of the amax from which a scale could underflow or overflow.

    Raises:
        ValueError: not in [2**-117, 2**127]: below, min_amax / 448 would not be a normal float32.
    """
    if not SMALLEST_MIN_AMAX <= min_amax <= LARGEST_MIN_AMAX:
        nearest = "2**127" if min_amax > LARGEST_MIN_AMAX else "2**-117"
        raise ValueError(f"quantize_1x128: min_amax must be in [2**-117, 2**127], got {min_amax}; nearest: {nearest}")


def check_columns(subject: str, matrix: Tensor) -> None:
    """Refuses a matrix, or several, that a kernel could not read along its rows.

    Raises:
        ValueError: the last dimension is not contiguous.
    """
    if matrix.shape[-1] > 1 and matrix.stride(-1) != 1:
        raise ValueError(f"{subject} must be contiguous along its columns, got strides {matrix.stride()}")


def check_packed(packed: PackedE5M6, num_columns: int) -> None:
    """Refuses packed rows that are not of so many numbers.

    Raises:
        ValueError: other numbers of bytes or scales, or these of another type.
    """
    check_codes("unpack_e5m6: codes", packed.codes, torch.uint8)
    expected = (3 * num_pairs(num_columns), num_tiles(num_columns))
    found = (packed.codes.shape[1], packed.scales.shape[1])
    if found != expected:
        raise ValueError(
            f"unpack_e5m6: a row of {num_columns} columns has {expected[0]} bytes and {expected[1]} scales, got {found}"
        )
    shape = (packed.codes.shape[0], expected[1])
    check_scales("unpack_e5m6: scales", packed.scales, shape, packed.codes.device)


def check_numbers(subject: str, values: Tensor, num_dims: int | None = None) -> None:
    """Refuses what is no matrix of floating-point numbers.

    Args:
        subject: place and name of the numbers, for the message.
        values: that are to be quantised.
        num_dims: that they must have; None: 2 or more.

    Raises:
        ValueError: another type, or another number of dimensions.
    """
    if not values.is_floating_point():
        raise ValueError(f"{subject} must be floating point, got {values.dtype}; nearest: torch.float32")
    if values.dim() < 2 or num_dims not in (None, values.dim()):
        rule = "at least 2 dimensions" if num_dims is None else f"{num_dims} dimensions"
        raise ValueError(f"{subject} must have {rule}, got {values.dim()}")


def check_codes(subject: str, codes: Tensor, dtype: torch.dtype = CODES) -> None:
    """Refuses codes of another type, which would be read as what they are not.

    Raises:
        ValueError: they are of another type.
    """
    if codes.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, got {codes.dtype}")


def check_scales(subject: str, scales: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Refuses scales that are not those of some codes.

    Args:
        subject: place and name of the scales, for the message.
        scales: that were given.
        shape: that the codes demand.
        device: where the codes are.

    Raises:
        ValueError: another type, shape or device.
    """
    if scales.dtype != torch.float32:
        raise ValueError(f"{subject} must be torch.float32, got {scales.dtype}")
    if tuple(scales.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(scales.shape)}")
    if scales.device != device:
        raise ValueError(f"{subject} must be on {device}, where the codes are, got {scales.device}")


def check_quantized(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Refuses codes and scales that are not of rows by 128 columns.

    Raises:
        ValueError: codes of another type or number of dimensions, or scales that do not fit them.
    """
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes, 2)
    shape = (codes.shape[0], num_tiles(codes.shape[1]))
    check_scales(f"{subject}: scales", scales, shape, codes.device)


def check_quantized_blocks(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Refuses codes and scales that are not of matrices by blocks of 128 x 128.

    Raises:
        ValueError: codes of another type or number of dimensions, or scales that do not fit them.
    """
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes)
    *leading, num_rows, num_columns = codes.shape
    shape = (*leading, num_tiles(num_rows), num_tiles(num_columns))
    check_scales(f"{subject}: scales", scales, shape, codes.device)


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
