"""Blocks of the cache against plain copies of each sequence's values."""

import random
from collections.abc import Sequence
from itertools import chain

import pytest
import torch

from model.attention.cache import KvCache, OutOfBlocksError
from model.config import BLOCK_TOKENS

LAYERS, WIDTH, ROWS, MOST = 2, 3, 5, 3 * BLOCK_TOKENS


class Held:
    """A cache, and each row's tokens with their values, [layers, T, values]."""

    def __init__(self, num_blocks: int) -> None:
        self.cache = KvCache(WIDTH, LAYERS, num_blocks, torch.float64, torch.device("cpu"), lane=3)
        self.num_in_lanes = 0
        self.ids = self.cache.attach(1, 1, torch.uint8)
        self.rows: list[tuple[list[int], torch.Tensor]] = []

    def write(self, row: int, tokens: Sequence[int]) -> None:
        """Writes the next tokens of a row."""
        known, values = self.rows[row]
        new = torch.rand(LAYERS, len(tokens), WIDTH, dtype=torch.float64)
        slots_N = self.cache.slots([row], [len(tokens)])
        for layer in range(LAYERS):
            self.cache.values.write(layer, slots_N, new[layer])
        self.ids.write(0, slots_N, torch.tensor(tokens, dtype=torch.uint8)[:, None])
        self.rows[row] = [*known, *tokens], torch.cat((values, new), 1)
        self.cache.resize(row, len(known) + len(tokens))

    def check(self) -> None:
        """Compares every row, alone and all together, and the number of free blocks."""
        assert self.cache.lengths == tuple(len(tokens) for tokens, _ in self.rows)
        longest = max(self.cache.lengths, default=0)
        if longest and min(self.cache.lengths):
            blocks = self.cache.blocks(range(len(self.rows)), longest)
            self.num_in_lanes += blocks.blocks_X is None
            for row, (tokens, values) in enumerate(self.rows):
                for layer in range(LAYERS):
                    read = self.cache.values.read(layer, blocks)
                    assert torch.equal(read[row, : len(tokens)], values[layer])
                assert self.ids.read(0, blocks)[row, : len(tokens), 0].tolist() == tokens
        held = set(chain.from_iterable(self.cache._tables))
        assert self.cache.num_free_blocks == self.cache._num_blocks - len(held)


EMPTY = torch.empty(LAYERS, 0, WIDTH, dtype=torch.float64)


def test_rows_follow_their_sources_and_hold_no_block_that_they_do_not_need() -> None:
    chosen = random.Random(3)
    held = Held(ROWS * MOST // BLOCK_TOKENS)
    for _ in range(150):
        sources, lengths = [], []
        for _ in range(chosen.randrange(ROWS + 1)):
            source = chosen.randrange(-1, len(held.rows))
            sources.append(source)
            lengths.append(0 if source < 0 else chosen.randrange(len(held.rows[source][0]) + 1))
        held.cache.arrange(sources, lengths)
        held.rows = [
            (held.rows[source][0][:length], held.rows[source][1][:, :length]) if source >= 0 else ([], EMPTY)
            for source, length in zip(sources, lengths, strict=True)
        ]
        for row, length in enumerate(lengths):
            assert len(held.cache._tables[row]) == -(-length // BLOCK_TOKENS)
            most = chosen.choice((1, BLOCK_TOKENS, MOST))
            held.write(row, [chosen.randrange(256) for _ in range(chosen.randrange(min(most, MOST - length) + 1))])
        held.check()
        if held.rows:
            gone = chosen.randrange(len(held.rows))
            held.cache.remove(gone)
            last = held.rows.pop()
            if gone < len(held.rows):
                held.rows[gone] = last
        held.check()


def test_rows_that_were_added_together_are_read_in_place() -> None:
    held = Held(ROWS * MOST // BLOCK_TOKENS)
    for row in range(ROWS):
        held.cache.add()
        held.rows.append(([], EMPTY))
        held.write(row, [row] * (row + 1))
    for length in (BLOCK_TOKENS, 70):
        for row in range(ROWS):
            held.write(row, [row] * length)
        held.check()
    assert held.num_in_lanes == 2


def test_rows_start_with_the_finished_blocks_of_their_own_beginning_only() -> None:
    chosen = random.Random(5)
    cache = KvCache(1, 1, 40, torch.float32, torch.device("cpu"))
    num_shared = 0
    for _ in range(1000):
        row = cache.add()
        tokens = [chosen.randrange(3) for _ in range(chosen.randrange(1, 4 * BLOCK_TOKENS))]
        other = [*tokens, 1]
        changed = chosen.randrange(len(tokens))
        other[changed] += 3
        num_cached = cache.start(row, tokens)
        num_shared += num_cached
        slots_N = cache.slots([row], [len(tokens) - num_cached])
        cache.values.write(0, slots_N, torch.tensor(tokens[num_cached:], dtype=torch.float32)[:, None])
        cache.resize(row, len(tokens))
        cache.finish(row, tokens)
        follower = cache.add()
        assert cache.start(follower, other) == changed // BLOCK_TOKENS * BLOCK_TOKENS
        assert cache.export(follower)[0, :, 0].tolist() == other[: cache.lengths[follower]]
        again = cache.add()
        assert cache.start(again, [*tokens, 2]) == len(tokens) // BLOCK_TOKENS * BLOCK_TOKENS
        assert cache.export(row)[0, :, 0].tolist() == tokens
        for _ in range(3):
            cache.remove(0)
        assert cache.num_free_blocks == 40
    assert num_shared == 0


def test_without_a_free_block_nothing_is_lost() -> None:
    held = Held(2)
    for _ in range(2):
        held.cache.add()
        held.rows.append(([], EMPTY))
    held.write(0, list(range(BLOCK_TOKENS)))
    held.write(1, [1, 2, 3])
    with pytest.raises(OutOfBlocksError):
        held.cache.reserve(0, 1)
    held.check()
    held.cache.remove(1)
    held.rows.pop()
    held.write(0, [7])
    held.check()
