"""What decoding keeps of every token, and a layer's view of it in one pass.

Latent attention keeps a normalized latent and a rotated key for all heads (arXiv:2412.19437, section 2.1.1). Shape
legend: B sequences held, S new tokens of each, N new tokens of all, T positions, C values per token and layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention.rope import Rotation


class KvCache:
    """Room for a number of sequences of at most `capacity` tokens, each as long as it is.

    Sequences held are the rows 0 .. `len(lengths) - 1`, so a layer's rows in use are one view of the storage.
    What lies beyond a row's length is finite and never read by its tokens: it is written again before it is.
    """

    def __init__(
        self,
        values_per_token: int,
        num_layers: int,
        max_sequences: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Allocates all of it at once, in the weights' type."""
        shape = (num_layers, max_sequences, capacity, values_per_token)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self._lengths: list[int] = []

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each sequence held."""
        return tuple(self._lengths)

    @property
    def capacity(self) -> int:
        """Tokens that a sequence may grow to."""
        return self._values.shape[2]

    @property
    def num_bytes(self) -> int:
        """Of the storage."""
        return self._values.numel() * self._values.element_size()

    def add(self) -> int:
        """Takes in an empty sequence; its row."""
        assert len(self._lengths) < self._values.shape[1], "more sequences than the cache has rows"
        self._lengths.append(0)
        return len(self._lengths) - 1

    def remove(self, row: int) -> None:
        """Gives a row back; the last row moves into its place."""
        last = len(self._lengths) - 1
        if row != last:
            self._values[:, row, : self._lengths[last]] = self._values[:, last, : self._lengths[last]]
            self._lengths[row] = self._lengths[last]
        self._lengths.pop()

    def resize(self, row: int, length: int) -> None:
        """Declares how many tokens of a row count: more after a pass has written them, fewer to take tokens back."""
        assert 0 <= length <= self.capacity, "a row is longer than the cache"
        self._lengths[row] = length

    def write_row(self, layer: int, row: int, first: int, values_TC: Tensor) -> None:
        """One sequence's tokens from position `first` on."""
        self._values[layer, row, first : first + len(values_TC)] = values_TC

    def write_step(self, layer: int, positions_BS: Tensor, values_BSC: Tensor) -> None:
        """Every held sequence's new tokens, each at its position."""
        rows_B1 = torch.arange(len(positions_BS), device=positions_BS.device)[:, None]
        self._values[layer].index_put_((rows_B1, positions_BS), values_BSC)

    def read(self, layer: int, num_positions: int) -> Tensor:
        """The first positions of every sequence held, BTC: a view."""
        return self._values[layer, : len(self._lengths), :num_positions]


@dataclass(frozen=True, slots=True)
class PromptView:
    """A layer's cache while whole prompts, one after the other, are read into empty rows.

    rows: of the prompts. counts: tokens of each; they sum to N. rotation: of all tokens' positions.
    """

    cache: KvCache
    layer: int
    rows: Sequence[int]
    counts: Sequence[int]
    rotation: Rotation

    def write(self, values_NC: Tensor) -> None:
        """Writes what is kept of each token."""
        for row, values_TC in zip(self.rows, values_NC.split(list(self.counts)), strict=True):
            self.cache.write_row(self.layer, row, 0, values_TC)


@dataclass(frozen=True, slots=True)
class StepView:
    """A layer's cache while S new tokens of every sequence held are added to it.

    positions_BS: of the new tokens. num_positions: T, after which no token lies. future_BST: true where a token must
    not look; None if every position is seen by every token. rotation: of the new tokens' positions.
    """

    cache: KvCache
    layer: int
    positions_BS: Tensor
    num_positions: int
    future_BST: Tensor | None
    rotation: Rotation

    def write(self, values_NC: Tensor) -> None:
        """Writes what is kept of each new token."""
        self.cache.write_step(self.layer, self.positions_BS, values_NC.view(*self.positions_BS.shape, -1))

    def read(self) -> Tensor:
        """Returns all positions of every sequence held, BTC: a view."""
        return self.cache.read(self.layer, self.num_positions)


CacheView = PromptView | StepView
