"""Documents of packed sequences: a token sees only tokens of the same document."""

# Shape legend: B sequences, T tokens.

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, kw_only=True, slots=True)
class DocumentRun:
    """Consecutive documents of one length, in tokens of the flattened batch."""

    start: int
    length: int
    num_documents: int


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one micro-batch; all layers share the object, which caches the masks that kernels need."""

    ids_BT: Tensor  # document of each token, int64; the tokens of a document are consecutive
    starts: Tensor  # first token of each document in the flattened batch, then the number of tokens, int32
    longest: int  # tokens of the longest document
    is_padding_BT: Tensor  # whether a token fills the rest of a sequence
    num_real: int  # documents that are not padding

    @classmethod
    def from_positions(cls, positions_BT: Tensor) -> "Documents":
        """Builds the documents from each token's position within its document.

        A document begins at each position that does not follow the position before. Padding, whose position is -1,
        becomes documents of one token each. Pass positions on the host and move the documents afterwards: this avoids a
        host sync.
        """
        begins_BT = torch.ones_like(positions_BT)
        begins_BT[:, 1:] = (positions_BT[:, 1:] != positions_BT[:, :-1] + 1) | (positions_BT[:, 1:] <= 0)
        ends = torch.tensor([begins_BT.numel()], device=begins_BT.device)
        # Host syncs unless positions are on the host: nonzero, the longest document and the number of documents.
        starts = torch.cat((begins_BT.flatten().nonzero().flatten(), ends)).to(torch.int32)
        is_padding_BT = positions_BT < 0
        num_real = len(starts) - 1 - int(is_padding_BT.sum())
        return cls(begins_BT.cumsum(1), starts, int(starts.diff().max()), is_padding_BT, num_real)

    def to(self, device: torch.device) -> "Documents":
        """Returns the documents on a device."""
        moved = Documents(
            self.ids_BT.to(device),
            self.starts.to(device),
            self.longest,
            self.is_padding_BT.to(device),
            self.num_real,
        )
        if self.starts.device.type == "cpu":
            vars(moved)["first_tokens"] = self.first_tokens
        return moved

    def tensors(self) -> Iterator[Tensor]:
        """Yields all tensors of the object, including those of its cached masks."""
        for value in vars(self).values():
            if isinstance(value, Tensor):
                yield value
            elif not isinstance(value, int | tuple):  # biases by type, or a block mask
                parts = value if isinstance(value, dict) else vars(value)
                yield from (part for part in parts.values() if isinstance(part, Tensor))

    @cached_property
    def numbers_BT(self) -> Tensor:
        """Number of each token's document among those that are not padding, from 0; `num_real` for padding."""
        is_padding_BT = self.is_padding_BT
        begins_BT = self.ids_BT.diff(dim=1, prepend=torch.zeros_like(self.ids_BT[:, :1])) > 0
        numbers_N = (begins_BT & ~is_padding_BT).flatten().cumsum(0) - 1
        return numbers_N.view_as(is_padding_BT).masked_fill_(is_padding_BT, self.num_real)

    @cached_property
    def lengths(self) -> Tensor:
        """Number of tokens of each document that is no padding, by `numbers_BT`, then of all padding together."""
        numbers_N = self.numbers_BT.flatten()
        return numbers_N.new_zeros(self.num_real + 1).scatter_add_(0, numbers_N, torch.ones_like(numbers_N))

    @cached_property
    def first_tokens(self) -> tuple[int, ...]:
        """The numbers of `starts` on the host. No host sync if the documents were moved from there."""
        return tuple(self.starts.tolist())

    @cached_property
    def runs(self) -> tuple[DocumentRun, ...]:
        """Runs of consecutive documents of one length. A host sync unless the documents are on the host."""
        lengths, counts = torch.unique_consecutive(self.starts.diff(), return_counts=True)
        runs, start = list[DocumentRun](), 0
        for length, num_documents in zip(lengths.tolist(), counts.tolist(), strict=True):
            runs.append(DocumentRun(start=start, length=length, num_documents=num_documents))
            start += length * num_documents
        return tuple(runs)

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """Boolean mask: True if the query (third dim) may see the key (fourth dim) of the same document."""
        ids_BT = self.ids_BT
        return (ids_BT[:, :, None] == ids_BT[:, None, :]).tril_()[:, None]

    def bias_B1TT(self, dtype: torch.dtype) -> Tensor:
        """Returns the mask as a bias of the scores, 0 or minus infinity: one tensor, which all layers share."""
        if dtype not in self._biases:
            zeros = torch.zeros(self.mask_B1TT.shape, dtype=dtype, device=self.ids_BT.device)
            self._biases[dtype] = zeros.masked_fill_(~self.mask_B1TT, -torch.inf)
        return self._biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def block_mask(self) -> "BlockMask":
        """Mask for FlexAttention, by blocks of tokens."""
        from torch.nn.attention.flex_attention import create_block_mask

        ids_BT = self.ids_BT
        batch, size = ids_BT.shape

        def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (ids_BT[b, query] == ids_BT[b, key])

        return create_block_mask(sees, batch, None, size, size, device=ids_BT.device)
