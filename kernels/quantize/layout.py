"""What a matrix becomes in FP8: codes, and one scale per row and tile of 128 columns, or per block of 128 x 128.

Shape legend: N rows, D columns, T tiles in a row.
"""

from typing import NamedTuple

from torch import Tensor

TILE = 128
LARGEST_CODE = 448.0
SMALLEST_MIN_AMAX = 2.0**-117
LARGEST_MIN_AMAX = 2.0**127


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
        codes: float8_e4m3fn [N, D].
        scales: float32 [ceil(N / 128), ceil(D / 128)], multipliers: code times scale gives the value back. NaN for a
            block that held a NaN or an infinity.
    """

    codes: Tensor
    scales: Tensor


def num_tiles(num_columns: int) -> int:
    """Tiles of 128 columns that cover a row, the last one possibly ragged; of rows that cover a column, in blocks."""
    return -(-num_columns // TILE)


def check_min_amax(min_amax: float) -> None:
    """Refuses a lower bound of the amax from which a scale could underflow or overflow.

    Raises:
        ValueError: not in [2**-117, 2**127]: below, min_amax / 448 would not be a normal float32.
    """
    if not SMALLEST_MIN_AMAX <= min_amax <= LARGEST_MIN_AMAX:
        nearest = "2**127" if min_amax > LARGEST_MIN_AMAX else "2**-117"
        raise ValueError(f"quantize_1x128: min_amax must be in [2**-117, 2**127], got {min_amax}; nearest: {nearest}")
