"""SwiGLU experts as batched products with equally many rows per expert, for 16-bit numbers on CPU.

A product on CPU takes less time than its launch, and each new shape is compiled first. One product over all experts, in
few shapes, is therefore faster than one per expert, although experts with few rows are padded. If padding would more
than quadruple the rows, `reference.py` runs instead.
"""

# Shape legend: as in reference.py; C rows of each expert after padding; S = E C.

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.expert_mlp import reference
from kernels.swiglu.reference import swiglu, swiglu_backward

STEP_ROWS = 64
MOST_FILLED = 4


@dataclass(frozen=True, slots=True)
class _Slots:
    rows_S: Tensor  # row of each slot
    filled: Tensor  # slots without a row
    places_A: Tensor  # slot of each row
    num_experts: int

    def scatter(self, values_ND: Tensor, tokens_A: Tensor | None = None) -> Tensor:
        """Returns each slot's value, ECD, or zero; `tokens_A`: the given row of each place."""
        # Slots without a row read some row and are then set to zero.
        rows_S = self.rows_S if tokens_A is None else tokens_A.index_select(0, self.rows_S)
        values_SD = values_ND.index_select(0, rows_S).index_fill_(0, self.filled, 0)
        return values_SD.view(self.num_experts, -1, values_ND.shape[1])

    def gather(self, values_ECD: Tensor) -> Tensor:
        """Returns each row's value, AD."""
        return values_ECD.flatten(0, 1).index_select(0, self.places_A)


def expert_mlp(
    rows_ND: Tensor,
    weights_A: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    gated_AM: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Implements `reference.expert_mlp`."""
    slots = _fill(counts)
    if slots is None:
        return reference.expert_mlp(rows_ND, weights_A, gate_up_EHD, down_EDM, counts, tokens_A, gated_AM)
    # One product over all experts, E C H, then the gate, E C M.
    hidden_ECH = slots.scatter(rows_ND, tokens_A) @ gate_up_EHD.transpose(1, 2)
    gated_ECM = swiglu(*hidden_ECH.chunk(2, 2)).mul_(slots.scatter(weights_A[:, None]))
    if gated_AM is not None:
        gated_AM.copy_(slots.gather(gated_ECM))
    return slots.gather(gated_ECM @ down_EDM.transpose(1, 2)), slots.gather(hidden_ECH)


def expert_hidden(rows_AD: Tensor, gate_up_EHD: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.expert_hidden`."""
    slots = _fill(counts)
    if slots is None:
        return reference.expert_hidden(rows_AD, gate_up_EHD, counts)
    return slots.gather(slots.scatter(rows_AD) @ gate_up_EHD.transpose(1, 2))


def expert_mlp_backward(
    grad_ND: Tensor,
    weights_A: Tensor,
    hidden_AH: Tensor,
    gate_up_EHD: Tensor,
    down_EDM: Tensor,
    counts: Sequence[int],
    tokens_A: Tensor | None = None,
    *,
    rows_ND: Tensor | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Implements `reference.expert_mlp_backward`."""
    slots = _fill(counts)
    if slots is None:
        operands = (grad_ND, weights_A, hidden_AH, gate_up_EHD, down_EDM, counts, tokens_A)
        return reference.expert_mlp_backward(*operands, rows_ND=rows_ND)
    # Rows in slots: gradients E C D, hidden values E C H and weights E C 1.
    grad_ECD = slots.scatter(grad_ND, tokens_A)
    hidden_ECH = slots.scatter(hidden_AH)
    weights_EC1 = slots.scatter(weights_A[:, None])
    # Back through `down`, and the gradient of each routing weight, A.
    grad_gated_ECM = grad_ECD @ down_EDM
    plain_ECM = swiglu(*hidden_ECH.chunk(2, 2))
    grad_weights_A = slots.gather((plain_ECM * grad_gated_ECM).sum(2, keepdim=True))[:, 0]
    # Back through the gate. Empty slots are zeros and give zero gradients.
    grad_gated_SM = grad_gated_ECM.mul_(weights_EC1).flatten(0, 1)
    grad_hidden_ECH = swiglu_backward(grad_gated_SM, hidden_ECH.flatten(0, 1)).view_as(hidden_ECH)
    grad_rows_AD = slots.gather(grad_hidden_ECH @ gate_up_EHD)
    if rows_ND is None:
        return grad_rows_AD, grad_weights_A, (slots.gather(grad_hidden_ECH),)
    grad_gate_up = grad_hidden_ECH.transpose(1, 2) @ slots.scatter(rows_ND, tokens_A)
    return grad_rows_AD, grad_weights_A, (grad_gate_up, grad_ECD.transpose(1, 2) @ plain_ECM.mul_(weights_EC1))


def gate_up_gradient(grad_hidden_AH: Tensor, rows_AD: Tensor, counts: Sequence[int]) -> Tensor:
    """Implements `reference.gate_up_gradient`."""
    slots = _fill(counts)
    if slots is None:
        return reference.gate_up_gradient(grad_hidden_AH, rows_AD, counts)
    return slots.scatter(grad_hidden_AH).transpose(1, 2) @ slots.scatter(rows_AD)


def down_gradient(
    grad_AD: Tensor, weights_A: Tensor, hidden_AH: Tensor, counts: Sequence[int], gated_AM: Tensor | None = None
) -> Tensor:
    """Implements `reference.down_gradient`."""
    slots = _fill(counts)
    if slots is None:
        return reference.down_gradient(grad_AD, weights_A, hidden_AH, counts, gated_AM)
    if gated_AM is None:
        gated_AM = swiglu(*hidden_AH.chunk(2, 1)).mul_(weights_A[:, None])
    return slots.scatter(grad_AD).transpose(1, 2) @ slots.scatter(gated_AM)


def _fill(counts: Sequence[int]) -> _Slots | None:
    """Returns the slots for these counts, or None if too many would be empty or there are no rows."""
    total = sum(counts)
    num_experts = len(counts)
    size = -(-max(counts, default=0) // STEP_ROWS) * STEP_ROWS
    if not total or size * num_experts > MOST_FILLED * max(total, num_experts * STEP_ROWS):
        return None
    # Slot c of expert e holds row c of that expert if it has so many, E C.
    counts_E1 = torch.tensor(counts)[:, None]
    places_EC = torch.arange(size).expand(num_experts, size)
    is_row_S = (places_EC < counts_E1).flatten()
    rows_S = (places_EC + (counts_E1.cumsum(0) - counts_E1)).flatten().clamp(max=total - 1)
    return _Slots(rows_S, (~is_row_S).nonzero()[:, 0], is_row_S.nonzero()[:, 0], num_experts)
