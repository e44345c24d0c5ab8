"""Which tokens of packed sequences may see each other: those of one document.

Shape legend: B sequences, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents of one micro-batch; one object serves all layers, and makes what a kernel wants of it once.

    ids_BT: int64, the document of each token, whose tokens are consecutive. starts: int32, first token of each document
    over the flattened batch, and the number of tokens. longest: tokens of the longest document.
    """

    ids_BT: Tensor
    starts: Tensor
    longest: int

    @classmethod
    def from_positions(cls, positions_BT: Tensor) -> "Documents":
        """From each token's place within its document: one begins where the place does not follow the place before.

        Padding, whose place is -1, makes documents of one token each. Give it positions on the host, and move the
        documents: the host then waits for no device.
        """
        begins_BT = torch.ones_like(positions_BT)
        begins_BT[:, 1:] = (positions_BT[:, 1:] != positions_BT[:, :-1] + 1) | (positions_BT[:, 1:] <= 0)
        ends = torch.tensor([begins_BT.numel()], device=begins_BT.device)
        starts = torch.cat((begins_BT.flatten().nonzero().flatten(), ends)).to(torch.int32)
        return cls(begins_BT.cumsum(1), starts, int(starts.diff().max()))

    def to(self, device: torch.device) -> "Documents":
        """The same on a device."""
        return Documents(self.ids_BT.to(device), self.starts.to(device), self.longest)

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """True where the query (third dim) may see the key (fourth dim): no later one, and of its own document."""
        ids_BT = self.ids_BT
        return (ids_BT[:, :, None] == ids_BT[:, None, :]).tril_()[:, None]

    def bias_B1TT(self, dtype: torch.dtype) -> Tensor:
        """The same as what is added to scores, 0 or minus infinity; one for all layers, as each keeps it."""
        if dtype not in self._biases:
            zeros = torch.zeros(self.mask_B1TT.shape, dtype=dtype, device=self.ids_BT.device)
            self._biases[dtype] = zeros.masked_fill_(~self.mask_B1TT, -torch.inf)
        return self._biases[dtype]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    @cached_property
    def block_mask(self) -> "BlockMask":
        """The same for FlexAttention, by blocks of tokens."""
        from torch.nn.attention.flex_attention import create_block_mask

        ids_BT = self.ids_BT
        batch, size = ids_BT.shape

        def sees(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (query >= key) & (ids_BT[b, query] == ids_BT[b, key])

        return create_block_mask(sees, batch, None, size, size, device=ids_BT.device)
