"""Layouts of quantized matrices: codes, and a scale per 128 numbers of a row or column, or 128 x 128."""

# Shape legend: N rows, D columns, T tiles in a row, P rows after every group is padded to whole tiles.

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kernels.operation import TILE as TILE
from kernels.operation import num_pairs as num_pairs
from kernels.operation import num_tiles as num_tiles

LARGEST_CODE = 448.0
SMALLEST_MIN_AMAX = 2.0**-117
LARGEST_MIN_AMAX = 2.0**127
# As in DeepSeek's published kernels: a tile of activations below it is practically zero.
ROWS_MIN_AMAX = 1e-4
# Gradients are small: with this bound, every bfloat16 number, down to 2**-133, becomes a nonzero code times a scale.
GRADIENTS_MIN_AMAX = SMALLEST_MIN_AMAX
# Largest E5M6 number: (1 + 63/64) * 2**15, as exponent 31 has the meaning of IEEE half precision.
LARGEST_E5M6 = 65024.0
# The scale of a tile this small is 2**-126, the smallest normal float32.
E5M6_MIN_AMAX = LARGEST_E5M6 * 2.0**-126

CODES = torch.float8_e4m3fn
_SCALE_BYTES = 4


class Quantized(NamedTuple):
    """Rows in FP8 (arXiv:2412.19437, section 3.3.2)."""

    codes: Tensor  # float8_e4m3fn [N, D]
    # float32 [N, ceil(D / 128)], multipliers: code times scale restores the value. NaN if the tile held a NaN or an
    # infinity.
    scales: Tensor


class QuantizedBlocks(NamedTuple):
    """A weight in FP8, in blocks of 128 x 128, the last ones ragged (arXiv:2412.19437, section 3.3.2)."""

    # float8_e4m3fn [..., N, D]; each matrix of the leading dimensions, such as experts, has its own blocks.
    codes: Tensor
    # float32 [..., ceil(N / 128), ceil(D / 128)], multipliers: code times scale restores the value. NaN if the block
    # held a NaN or an infinity.
    scales: Tensor


class QuantizedColumns(NamedTuple):
    """Grouped rows in FP8, transposed, by tiles of 128 rows of a group (arXiv:2412.19437, section 3.3.2).

    An operand of a product that sums over rows. Every group is padded with zeros to a multiple of 128 rows, so that no
    tile spans two groups; an empty group has no tile.
    """

    codes: Tensor  # float8_e4m3fn [D, P]; the padding has codes 0, or NaN in a tile that is NaN
    scales: Tensor  # float32 [D, P / 128], multipliers. NaN if the tile held a NaN or an infinity.


class PackedE5M6(NamedTuple):
    """Rows in 12 bits per number: sign, 5 bits of exponent (bias 15), 6 of mantissa.

    This is IEEE half precision without its last 4 bits (arXiv:2412.19437, section 3.3.3). Each row holds first the
    lower 8 bits of all numbers, then the upper 4 bits, two numbers to a byte with the even one in the lower half. A GPU
    can load and store these bytes 16 at a time, unlike 12-bit fields. A row of odd length is padded with a zero.
    """

    codes: Tensor  # uint8 [N, 3 * ceil(D / 2)]
    scales: Tensor  # float32 [N, ceil(D / 128)], multipliers, powers of two. NaN if the tile held a NaN or an infinity.


def empty_quantized(like: Tensor, num_rows: int, num_columns: int) -> Quantized:
    """Allocates codes ND and scales on the device of `like`."""
    return Quantized(
        like.new_empty(num_rows, num_columns, dtype=CODES),
        like.new_empty(num_rows, num_tiles(num_columns), dtype=torch.float32),
    )


def padded_rows(counts: Sequence[int]) -> int:
    """Number of rows of all groups after each is padded to a multiple of 128."""
    return TILE * sum(map(num_tiles, counts))


def check_counts(subject: str, counts: Sequence[int], num_rows: int) -> None:
    """Raises ValueError unless group sizes are not negative and add up to the rows."""
    if min(counts, default=0) < 0:
        raise ValueError(f"{subject}: a count of rows must not be negative, got {min(counts)}; nearest: 0")
    if sum(counts) != num_rows:
        raise ValueError(f"{subject}: counts must add up to the number of rows, {num_rows}, got {sum(counts)}")


def check_min_amax(min_amax: float) -> None:
    """Raises ValueError unless min_amax is in [2**-117, 2**127]: below, a scale would be subnormal."""
    if not SMALLEST_MIN_AMAX <= min_amax <= LARGEST_MIN_AMAX:
        nearest = "2**127" if min_amax > LARGEST_MIN_AMAX else "2**-117"
        raise ValueError(f"quantize_1x128: min_amax must be in [2**-117, 2**127], got {min_amax}; nearest: {nearest}")


def check_packed(packed: PackedE5M6, num_columns: int) -> None:
    """Raises ValueError unless packed rows hold this number of columns."""
    check_codes("unpack_e5m6: codes", packed.codes, torch.uint8)
    expected = (3 * num_pairs(num_columns), num_tiles(num_columns))
    actual = (packed.codes.shape[1], packed.scales.shape[1])
    if actual != expected:
        raise ValueError(
            f"unpack_e5m6: a row of {num_columns} columns has {expected[0]} bytes and {expected[1]} scales, "
            f"got {actual}"
        )
    shape = (packed.codes.shape[0], expected[1])
    check_scales("unpack_e5m6: scales", packed.scales, shape, packed.codes.device)


def check_numbers(subject: str, values: Tensor, num_dims: int | None = None) -> None:
    """Raises ValueError unless values are floating point with `num_dims` dimensions (None: 2 or more)."""
    if not values.is_floating_point():
        raise ValueError(f"{subject} must be floating point, got {values.dtype}; nearest: torch.float32")
    if values.dim() < 2 or num_dims not in (None, values.dim()):
        rule = "at least 2 dimensions" if num_dims is None else f"{num_dims} dimensions"
        raise ValueError(f"{subject} must have {rule}, got {values.dim()}")


def check_codes(subject: str, codes: Tensor, dtype: torch.dtype = CODES) -> None:
    """Raises ValueError if codes have another type, which a kernel would misread."""
    if codes.dtype != dtype:
        raise ValueError(f"{subject} must be {dtype}, got {codes.dtype}")


def check_scales(subject: str, scales: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    """Raises ValueError unless scales are float32, of the shape that the codes require, on their device."""
    if scales.dtype != torch.float32:
        raise ValueError(f"{subject} must be torch.float32, got {scales.dtype}")
    if tuple(scales.shape) != shape:
        raise ValueError(f"{subject} must be {list(shape)}, got {list(scales.shape)}")
    if scales.device != device:
        raise ValueError(f"{subject} must be on {device}, where the codes are, got {scales.device}")


def check_quantized(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless codes and scales are those of rows by 128 columns."""
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes, 2)
    shape = (codes.shape[0], num_tiles(codes.shape[1]))
    check_scales(f"{subject}: scales", scales, shape, codes.device)


def check_quantized_blocks(subject: str, codes: Tensor, scales: Tensor) -> None:
    """Raises ValueError unless codes and scales are those of matrices by blocks of 128 x 128."""
    check_codes(f"{subject}: codes", codes)
    check_numbers(f"{subject}: codes", codes)
    *leading, num_rows, num_columns = codes.shape
    shape = (*leading, num_tiles(num_rows), num_tiles(num_columns))
    check_scales(f"{subject}: scales", scales, shape, codes.device)


def pack(quantized: Quantized) -> Tensor:
    """Returns each row's codes, then its scales, as bytes: uint8 NB without padding."""
    return torch.cat([quantized.codes.view(torch.uint8), quantized.scales.contiguous().view(torch.uint8)], 1)


def unpack(packed_NB: Tensor, num_columns: int) -> Quantized:
    """Reverses `pack`; returns views if the scales are aligned in the packed rows."""
    codes, scales = packed_NB.split([num_columns, _SCALE_BYTES * num_tiles(num_columns)], 1)
    if num_columns % _SCALE_BYTES:
        # Scales of an odd row begin at an unaligned byte, which a float32 view does not allow.
        scales = scales.clone(memory_format=torch.contiguous_format)
    return Quantized(codes.view(torch.float8_e4m3fn), scales.view(torch.float32))
