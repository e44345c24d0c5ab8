"""Cache of attention in blocks of 64 tokens, and what one pass writes to it and reads from it.

A sequence holds only the blocks that its tokens need. Full blocks are shared: among the answers to one prompt, and
among prompts with the same beginning. Shape legend: B sequences, S new tokens of each, N new tokens of all, T
positions, K blocks of a sequence, C values per token and layer, P rotated pairs.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from model.config import BLOCK_TOKENS


class OutOfBlocksError(Exception):
    """No block is free. The caller removes a sequence, or waits until one ends."""


class _Blocks:
    """Counts the holders of each block. Finished blocks stay readable by key until they are needed."""

    def __init__(self, num_blocks: int, lane: int) -> None:
        self._lane = lane
        self._holders = [0] * num_blocks
        self._free = dict.fromkeys(reversed(range(num_blocks)))
        self._keys: dict[int, bytes] = {}  # of finished blocks
        self._by_key: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # finished and held by no sequence, the longest unused first

    @property
    def num_free(self) -> int:
        """Number of blocks that no sequence holds."""
        return len(self._free) + len(self._idle)

    def take(self, before: int | None = None) -> int:
        """Returns a block for new tokens, if need be the finished block that was unused for the longest.

        Prefers the one that follows `before` in memory, and for a first block the start of a lane that is free.
        """
        if before is None:
            starts = range(0, len(self._holders) - self._lane + 1, self._lane) if self._lane > 1 else ()
            block = next((start for start in starts if self._is_free(start)), -1)
        else:
            block = before + 1
        if block in self._free:
            del self._free[block]
        elif self._free:
            block, _ = self._free.popitem()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._by_key[self._keys.pop(block)]
        else:
            raise OutOfBlocksError
        self._holders[block] = 1
        return block

    def _is_free(self, start: int) -> bool:
        return all(block in self._free for block in range(start, start + self._lane))

    def hold(self, block: int) -> int:
        """Adds a holder to a block and returns it."""
        self._idle.pop(block, None)
        self._holders[block] += 1
        return block

    def is_shared(self, block: int) -> bool:
        """Returns whether several sequences hold a block."""
        return self._holders[block] > 1

    def release(self, block: int) -> None:
        """Removes a holder."""
        self._holders[block] -= 1
        if not self._holders[block]:
            (self._idle if block in self._keys else self._free)[block] = None

    def finish(self, block: int, key: bytes) -> None:
        """Makes a full block readable by the key of its tokens and of all before them, unless another one is."""
        if key not in self._by_key and block not in self._keys:
            self._by_key[key] = block
            self._keys[block] = key

    def of_key(self, key: bytes) -> int | None:
        """Returns the finished block of a key."""
        return self._by_key.get(key)


def _keys(tokens: Sequence[int]) -> Iterator[bytes]:
    """Yields the key of each full block: a hash of its tokens and of all before them."""
    digest = hashlib.blake2b(digest_size=16)
    numbers = np.asarray(tokens, dtype=np.int64)
    for end in range(BLOCK_TOKENS, len(numbers) + 1, BLOCK_TOKENS):
        digest.update(numbers[end - BLOCK_TOKENS : end].data)
        yield digest.digest()


@dataclass(frozen=True, slots=True)
class BlockRows:
    """Blocks of the first positions of B sequences.

    Attributes:
        blocks_X: the blocks, sequence by sequence, X = B K; None if sequence i has lane i after block `first`.
        lane: blocks of a lane.
    """

    num_rows: int
    num_positions: int
    blocks_X: Tensor | None
    first: int
    lane: int


class CachedValues:
    """Values of some layers for the tokens of all blocks."""

    def __init__(
        self, values_per_token: int, num_layers: int, num_blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        # Zeros, because masked positions are still multiplied by weights of 0, and 0 x NaN is NaN.
        shape = (num_layers, num_blocks, BLOCK_TOKENS * values_per_token)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._layers = self._values.unbind()
        self._tokens_width = values_per_token
        self._tokens = self._values.view(num_layers, num_blocks * BLOCK_TOKENS, values_per_token).unbind()

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the storage."""
        return self._values.numel() * self._values.element_size()

    def write(self, layer: int, slots_N: Tensor, values_NC: Tensor) -> None:
        """Writes the values of tokens to their slots."""
        self._tokens[layer].index_copy_(0, slots_N, values_NC)

    def read(self, layer: int, rows: BlockRows) -> Tensor:
        """Returns the values of sequences, BTC; a view if their blocks are in lanes."""
        tokens_TC = self._tokens[layer]
        if rows.blocks_X is None:
            step = rows.lane * BLOCK_TOKENS
            size = (rows.num_rows, rows.num_positions, tokens_TC.shape[1])
            start = tokens_TC.storage_offset() + rows.first * BLOCK_TOKENS * tokens_TC.shape[1]
            return tokens_TC.as_strided(size, (step * tokens_TC.shape[1], tokens_TC.shape[1], 1), start)
        values_XC = self._layers[layer].index_select(0, rows.blocks_X)
        return values_XC.view(rows.num_rows, -1, tokens_TC.shape[1])[:, : rows.num_positions]

    def read_blocks(self, blocks_K: Tensor) -> Tensor:
        """Returns a copy of the values of blocks in all layers, [layers, T, C]."""
        values = self._values[:, blocks_K]
        return values.view(len(values), len(blocks_K) * BLOCK_TOKENS, self._tokens_width)

    def copy_block(self, source: int, target: int) -> None:
        """Copies the values of a block."""
        self._values[:, target] = self._values[:, source]


class KvCache:
    """Values of the tokens of several sequences, each with its own length.

    The held sequences are rows 0 .. `len(lengths) - 1`. Values beyond a row's length are finite, and no token reads
    them before they are overwritten.
    """

    def __init__(
        self,
        values_per_token: int,
        num_layers: int,
        num_blocks: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        lane: int = 1,
    ) -> None:
        """Allocates all blocks.

        Args:
            lane: number of consecutive blocks that are left to a sequence as long as others are free. A step reads
                sequences in consecutive lanes without copying.
        """
        self._num_blocks = num_blocks
        self._lane = lane
        self._device = device
        self._all_values: list[CachedValues] = []
        self.values = self.attach(values_per_token, num_layers, dtype)
        self._blocks = _Blocks(num_blocks, lane)
        self._lengths: list[int] = []
        self._tables: list[list[int]] = []

    def attach(self, values_per_token: int, num_layers: int, dtype: torch.dtype) -> CachedValues:
        """Returns storage of further values of the same tokens."""
        self._all_values.append(CachedValues(values_per_token, num_layers, self._num_blocks, dtype, self._device))
        return self._all_values[-1]

    @property
    def lengths(self) -> Sequence[int]:
        """Number of tokens of each held sequence."""
        return tuple(self._lengths)

    @property
    def num_bytes(self) -> int:
        """Number of bytes of the storage."""
        return sum(values.num_bytes for values in self._all_values)

    @property
    def num_free_blocks(self) -> int:
        """Number of blocks that no sequence holds."""
        return self._blocks.num_free

    def add(self) -> int:
        """Adds an empty sequence and returns its row."""
        self._lengths.append(0)
        self._tables.append([])
        return len(self._lengths) - 1

    def remove(self, row: int) -> None:
        """Frees a row; the last row moves to its place."""
        self._release(self._tables[row])
        last_table = self._tables.pop()
        last_length = self._lengths.pop()
        if row < len(self._tables):
            self._tables[row] = last_table
            self._lengths[row] = last_length

    def resize(self, row: int, length: int) -> None:
        """Sets a row's number of tokens: more after a pass has written them, fewer to discard tokens."""
        assert 0 <= length <= len(self._tables[row]) * BLOCK_TOKENS, "a row is longer than its blocks"
        self._lengths[row] = length

    def swap(self, row: int, other: int) -> None:
        """Exchanges two rows."""
        self._tables[row], self._tables[other] = self._tables[other], self._tables[row]
        self._lengths[row], self._lengths[other] = self._lengths[other], self._lengths[row]

    def finish(self, row: int, tokens: Sequence[int]) -> None:
        """Makes the full blocks of a row readable by `start`, given the tokens of the row in order."""
        for block, key in zip(self._tables[row], _keys(tokens[: self._lengths[row]]), strict=False):
            self._blocks.finish(block, key)

    def start(self, row: int, tokens: Sequence[int]) -> int:
        """Fills an empty row with finished blocks of the same first tokens. Returns how many tokens these are.

        At least the last token is left to read, because its logits are not stored.
        """
        for key in _keys(tokens[:-1]):
            block = self._blocks.of_key(key)
            if block is None:
                break
            self._tables[row].append(self._blocks.hold(block))
        self._lengths[row] = len(self._tables[row]) * BLOCK_TOKENS
        return self._lengths[row]

    def has_room(self, row: int, count: int) -> bool:
        """Returns whether enough blocks are free for the next tokens of a row."""
        length = self._lengths[row] + count
        return -(-length // BLOCK_TOKENS) - len(self._tables[row]) <= self._blocks.num_free

    def reserve(self, row: int, count: int) -> None:
        """Takes blocks for the next tokens of a row, or raises OutOfBlocksError and takes none."""
        if not self.has_room(row, count):
            raise OutOfBlocksError
        table = self._tables[row]
        length = self._lengths[row] + count
        while len(table) * BLOCK_TOKENS < length:
            table.append(self._blocks.take(table[-1] if table else None))

    def copy_start(self, source: int, target: int, length: int) -> None:
        """Lets an empty row start with the first `length` tokens of another one, or raises OutOfBlocksError."""
        if length % BLOCK_TOKENS and not self._blocks.num_free:
            raise OutOfBlocksError
        assert not self._tables[target], "a row that is not empty cannot start with another one"
        self._tables[target] = self._hold(self._tables[source], length)
        self._lengths[target] = length
        self._own_last(target)

    def arrange(self, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Replaces the held sequences: row i continues the tokens of row `sources[i]`; -1: it is empty."""
        before = self._tables
        pairs = zip(sources, lengths, strict=True)
        self._tables = [[] if source < 0 else self._hold(before[source], length) for source, length in pairs]
        self._lengths = list(lengths)
        for table in before:
            self._release(table)
        for row in range(len(self._tables)):
            self._own_last(row)

    def slots(self, rows: Iterable[int], counts: Iterable[int]) -> Tensor:
        """Returns where the values of the next tokens of rows are stored, N, after taking blocks for them."""
        slots = []
        for row, count in zip(rows, counts, strict=True):
            first = self._lengths[row]
            self.reserve(row, count)
            table = self._tables[row]
            positions = range(first, first + count)
            slots += [table[at // BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS for at in positions]
        return torch.tensor(slots, dtype=torch.int64, device=self._device)

    def export(self, row: int) -> Tensor:
        """Returns a copy of the values of a row, [layers, T, C]."""
        blocks_K = torch.tensor(self._tables[row], dtype=torch.int64, device=self._device)
        return self.values.read_blocks(blocks_K)[:, : self._lengths[row]]

    def load(self, row: int, values_LTC: Tensor) -> None:
        """Adds tokens to a row, with values that another cache exported."""
        slots_N = self.slots([row], [values_LTC.shape[1]])
        for layer, values_TC in enumerate(values_LTC):
            self.values.write(layer, slots_N, values_TC)
        self._lengths[row] += values_LTC.shape[1]

    def blocks(self, rows: range, num_positions: int) -> BlockRows:
        """Returns the blocks of the first positions of rows."""
        most = -(-num_positions // BLOCK_TOKENS)
        tables = [self._tables[row][:most] for row in rows]
        first = tables[0][0]
        # A row that is shorter than its lane is followed by blocks that no token may see.
        is_in_lane = most <= self._lane or len(tables) == 1
        in_lanes = is_in_lane and first + (len(tables) - 1) * self._lane + most <= self._num_blocks
        for number, table in enumerate(tables):
            start = first + number * self._lane
            in_lanes = in_lanes and table == list(range(start, start + len(table)))
        blocks_X = None
        if not in_lanes:
            filled = [block for table in tables for block in table + table[:1] * (most - len(table))]
            blocks_X = torch.tensor(filled, dtype=torch.int64, device=self._device)
        return BlockRows(len(rows), num_positions, blocks_X, first, self._lane)

    def _hold(self, table: Sequence[int], length: int) -> list[int]:
        """Returns a table with the blocks of the first `length` tokens of another one."""
        return [self._blocks.hold(block) for block in table[: -(-length // BLOCK_TOKENS)]]

    def _own_last(self, row: int) -> None:
        """Copies the last block of a row if it is shared and not full, because it will be written."""
        table = self._tables[row]
        if self._lengths[row] % BLOCK_TOKENS and self._blocks.is_shared(table[-1]):
            block = self._blocks.take(table[-2] if len(table) > 1 else None)
            for values in self._all_values:
                values.copy_block(table[-1], block)
            self._blocks.release(table[-1])
            table[-1] = block

    def _release(self, table: Sequence[int]) -> None:
        # The last blocks first, because a later block is of no use without those before it.
        for block in reversed(table):
            self._blocks.release(block)


@dataclass(frozen=True, slots=True)
class PromptView:
    """A layer's cache while whole prompts of `counts` tokens are read into empty rows."""

    values: CachedValues
    layer: int
    counts: Sequence[int]
    slots_N: Tensor
    turns_NP: Tensor

    def write(self, values_NC: Tensor) -> None:
        """Writes the cached values of each token."""
        self.values.write(self.layer, self.slots_N, values_NC)


@dataclass(frozen=True, slots=True)
class StepView:
    """A layer's cache while S new tokens are added to every held sequence, or to one of them.

    Attributes:
        rows: all positions up to the last token.
        future_BST: True if a token must not see a position; None if every token sees every position.
    """

    values: CachedValues
    layer: int
    slots_N: Tensor
    rows: BlockRows
    positions_BS: Tensor
    future_BST: Tensor | None
    turns_NP: Tensor

    def write(self, values_NC: Tensor) -> None:
        """Writes the cached values of each new token."""
        self.values.write(self.layer, self.slots_N, values_NC)

    def read(self) -> Tensor:
        """Returns the values of all positions of the sequences, BTC."""
        return self.values.read(self.layer, self.rows)


CacheView = PromptView | StepView
