"""Counts the tiles of quantized numbers. Imports no torch."""

TILE = 128
CHUNK_NUMBERS = 2**19  # of rows that are summed at a time on a CPU: 2 MB of float32 stay in the cache


def num_tiles(num_columns: int) -> int:
    """Number of tiles of 128 columns (or rows) that cover a row (or column); the last may be ragged."""
    return -(-num_columns // TILE)


def num_pairs(num_columns: int) -> int:
    """Number of column pairs, of three bytes in E5M6, that cover a row; the last may have one column."""
    return -(-num_columns // 2)
