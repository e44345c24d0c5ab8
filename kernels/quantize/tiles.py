"""How numbers are cut into tiles of 128. No torch here: counts of memory read this before any process starts."""

TILE = 128


def num_tiles(num_columns: int) -> int:
    """Tiles of 128 columns that cover a row, the last one possibly ragged; of rows that cover a column, in blocks."""
    return -(-num_columns // TILE)


def num_pairs(num_columns: int) -> int:
    """Pairs of columns that cover a row, the last one possibly of one: in E5M6 each takes three bytes."""
    return -(-num_columns // 2)
