"""Which tokens of packed sequences may see each other: those of one document.

Shape legend: B sequences, T tokens.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Documents:
    """ids_BT: int64, the document of each token, whose tokens are consecutive. One object serves all layers."""

    ids_BT: Tensor

    @classmethod
    def of_positions(cls, positions_BT: Tensor) -> "Documents":
        """From each token's place within its document: one begins where the place does not follow the place before.

        Padding, whose place is -1, makes documents of one token each.
        """
        begins_BT = torch.ones_like(positions_BT)
        begins_BT[:, 1:] = (positions_BT[:, 1:] != positions_BT[:, :-1] + 1) | (positions_BT[:, 1:] <= 0)
        return cls(begins_BT.cumsum(1))

    @cached_property
    def mask_B1TT(self) -> Tensor:
        """True where the query (third dim) may see the key (fourth dim): no later one, and of its own document."""
        ids_BT = self.ids_BT
        size = ids_BT.shape[1]
        same_BTT = ids_BT[:, :, None] == ids_BT[:, None, :]
        return same_BTT.tril_()[:, None] if size else same_BTT[:, None]

    @cached_property
    def starts(self) -> Tensor:
        """First token of each document, and the number of tokens, over the flattened batch; int32."""
        ids_BT = self.ids_BT
        begins_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        begins_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        ends = torch.tensor([ids_BT.numel()], device=ids_BT.device)
        return torch.cat((begins_BT.flatten().nonzero().flatten(), ends)).to(torch.int32)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest document."""
        return int(self.starts.diff().max())
