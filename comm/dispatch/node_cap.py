"""Limits the nodes that hold a token's experts, by verification or by clipping."""

# Shape legend: R ranks of the expert group, N its nodes, numbered from 0, M nodes kept, A arrived rows.

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import ClipCount
from comm.protocol import Arrived, Dispatcher, Handle, Label, MappedWork, Work, own_handle

_MOST_NAMED = 8


class NodeCapError(ValueError):
    """Raised if the experts of a token lie on more nodes than allowed."""

    @classmethod
    def of(cls, rank: int, label: Label | None, num_touched_T: Tensor, max_nodes: int) -> Self:
        """Builds the error that names one rank's tokens, at least one, over the cap. Waits for the device."""
        touched = num_touched_T.tolist()  # host sync
        over = [(token, nodes) for token, nodes in enumerate(touched) if nodes > max_nodes]
        named = ", ".join(f"{token} ({nodes} nodes)" for token, nodes in over[:_MOST_NAMED])
        more = f" and {len(over) - _MOST_NAMED} more" if len(over) > _MOST_NAMED else ""
        subject, verb = ("token", "touches") if len(over) == 1 else ("tokens", "touch")
        of = f" of {label}" if label else ""
        return cls(
            f"rank {rank}: dispatch{of}: {subject} {named}{more} {verb} more than dispatch.max_nodes={max_nodes} "
            f"nodes; nearest valid: dispatch.max_nodes={max(touched)}, or dispatch.node_cap=clip"
        )


def verify_cap(
    num_over_R: Sequence[int], group: ExchangeGroup, touched_TN: Tensor, max_nodes: int, label: Label | None
) -> None:
    """Raises NodeCapError on all ranks if one has a token over the cap; names this rank's tokens first."""
    if not any(num_over_R):
        return
    rank = group.members[group.index]
    if num_over_R[group.index]:
        raise NodeCapError.of(rank, label, touched_TN.sum(1), max_nodes)
    over_by_member = [
        (member, num_over) for member, num_over in zip(group.members, num_over_R, strict=True) if num_over
    ]
    culprit, num_over = over_by_member[0]
    subject = "token that touches" if num_over == 1 else "tokens that touch"
    others = {0: "", 1: ", and 1 more rank has some"}.get(
        len(over_by_member) - 1, f", and {len(over_by_member) - 1} more ranks have some"
    )
    raise NodeCapError(
        f"rank {rank}: dispatch{f' of {label}' if label else ''}: rank {culprit} has {num_over} {subject} more than "
        f"dispatch.max_nodes={max_nodes} nodes; its own message names them{others}"
    )


def nodes_of_experts(num_experts: int, member_nodes: Sequence[int]) -> Tensor:
    """Returns the node of each expert (E, int64), numbered from 0; members hold equally many experts."""
    number = {node: index for index, node in enumerate(sorted(set(member_nodes)))}
    nodes_R = torch.tensor([number[node] for node in member_nodes], dtype=torch.int64)
    return nodes_R.repeat_interleave(num_experts // len(member_nodes))


def touched_nodes(ids_TK: Tensor, node_of_expert_E: Tensor, num_nodes: int) -> Tensor:
    """Returns a mask of the nodes that hold a token's experts, TN. Ids of -1 touch none. No host sync."""
    return _touch(_nodes_of_choices(ids_TK, node_of_expert_E, num_nodes), num_nodes)


@dataclass(frozen=True, slots=True)
class Clipped:
    """Choices after clipping."""

    ids_TK: Tensor  # expert ids, int64, -1 for a removed choice
    over_T: Tensor  # mask of the tokens that lost choices


def clip(
    ids_TK: Tensor, weights_TK: Tensor | None, node_of_expert_E: Tensor, num_nodes: int, max_nodes: int
) -> Clipped:
    """Keeps the choices on each token's best nodes. Tokens within the cap keep all choices.

    A node's score is the sum of the token's weights on it, 1 for each choice by default, in the order of choices. Of
    nodes with equal scores the lower number is better. There is no host synchronization.
    """
    # The node of each choice, TK (N for -1); the nodes that each token touches, TN; tokens over the cap, T.
    nodes_TK = _nodes_of_choices(ids_TK, node_of_expert_E, num_nodes)
    touched_TN = _touch(nodes_TK, num_nodes)
    over_T = touched_TN.sum(1) > max_nodes
    # A node's score is the sum of its weights, TN. Untouched nodes come last; equal nodes keep their order.
    counted_TK = torch.ones_like(ids_TK, dtype=torch.float32) if weights_TK is None else weights_TK.detach()
    is_on_node_TKN = nodes_TK[:, :, None] == torch.arange(num_nodes, device=ids_TK.device)
    scores_TN = torch.where(is_on_node_TKN, counted_TK[:, :, None], 0).sum(1).masked_fill(~touched_TN, -torch.inf)
    best_TM = scores_TN.sort(stable=True, dim=1, descending=True).indices[:, :max_nodes]
    # Choices on nodes beyond the best M are removed. The last column is for choices without a node.
    lost_TN = torch.ones(len(ids_TK), num_nodes + 1, dtype=torch.bool, device=ids_TK.device)
    lost_TN = lost_TN.scatter_(1, best_TM, value=False)
    return Clipped(ids_TK.masked_fill(lost_TN.gather(1, nodes_TK) & over_T[:, None], -1), over_T)


@dataclass(frozen=True, slots=True)
class Renormalization:
    """Scaling w' = w S / S_kept of clipped tokens' weights, unless their kept weights sum to 0."""

    valid_TK: Tensor  # mask of the choices before clipping
    kept_TK: Tensor  # mask of the choices after clipping
    over_T: Tensor  # mask of the clipped tokens

    def forward(self, weights_TK: Tensor) -> Tensor:
        """Returns the weights of the kept choices, TK. Values of removed choices are meaningless."""
        sum_T1, kept_T1 = self._sums(weights_TK)
        # S / S_kept, T1; a token whose kept weights sum to 0 keeps its weights.
        factor_T1 = torch.where(kept_T1 == 0, 1, sum_T1 / kept_T1)
        return torch.where(self.over_T[:, None], weights_TK * factor_T1, weights_TK)

    def backward(self, gradients_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Computes the gradients of the weights w before clipping, TK, from those after it, g.

        With S the sum of all weights, R of the kept ones, and c of g w over kept choices, every choice has the
        gradient c / R, and a kept one also g S / R - c S / R^2. g is 0 for choices that were not sent.
        """
        sum_T1, kept_T1 = self._sums(weights_TK)
        factor_T1 = sum_T1 / kept_T1
        share_TK = gradients_TK / kept_T1
        # c / R, for every choice; T1. Then the part of kept choices; TK.
        common_T1 = torch.where(self.kept_TK, share_TK * weights_TK, 0).sum(1, keepdim=True)
        own_TK = torch.where(self.kept_TK, (gradients_TK - common_T1) * factor_T1, 0)
        clipped_TK = torch.where(self.valid_TK, common_T1 + own_TK, 0)
        # Tokens that `forward` did not scale keep their gradients.
        plain_T1 = ~self.over_T[:, None] | (kept_T1 == 0)
        return torch.where(plain_T1, gradients_TK, clipped_TK)

    def _sums(self, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the sums of each token's weights over all choices and over kept ones, both T1."""
        all_TK = torch.where(self.valid_TK, weights_TK, 0)
        return all_TK.sum(1, keepdim=True), torch.where(self.kept_TK, weights_TK, 0).sum(1, keepdim=True)


class ClippedHandle:
    """Routing of one micro-batch after clipping, and the scaling of its weights."""

    def __init__(self, inner: Handle, renormalization: Renormalization) -> None:
        self.inner = inner
        self.renormalization = renormalization
        self.weights_TK: Tensor | None = None  # weights of the last dispatch, for its backward

    @property
    def num_tokens(self) -> int:
        """Number of tokens of this rank, T."""
        return self.inner.num_tokens


class ClippingDispatcher:
    """Wrapper of a dispatcher that clips tokens to their best nodes; experts get renormalized weights."""

    num_local_experts: int

    def __init__(
        self, inner: Dispatcher, node_of_expert_E: Tensor, num_nodes: int, max_nodes: int, count: ClipCount
    ) -> None:
        self.num_local_experts = inner.num_local_experts
        self._inner = inner
        self._node_of_expert_E = node_of_expert_E
        self._num_nodes = num_nodes
        self._max_nodes = max_nodes
        self._count = count

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Clips the choices and plans the kept ones."""
        self._node_of_expert_E = self._node_of_expert_E.to(ids_TK.device)
        clipped = clip(ids_TK, weights_TK, self._node_of_expert_E, self._num_nodes, self._max_nodes)
        self._count.add(None if label is None else label.layer, clipped.over_T)
        renormalization = Renormalization(ids_TK >= 0, clipped.ids_TK >= 0, clipped.over_T)
        return ClippedHandle(self._inner.plan(clipped.ids_TK, weights_TK, label), renormalization)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, and the renormalized weight, to each of its kept experts."""
        routing = own_handle(handle, ClippedHandle)
        routing.weights_TK = weights_TK.detach()
        return self._inner.dispatch(rows_TD, routing.renormalization.forward(routing.weights_TK), routing.inner)

    def dispatch_again(self, rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's row to each of its kept experts; AD."""
        return self._inner.dispatch_again(rows_TD, own_handle(handle, ClippedHandle).inner)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Returns the unweighted sum over each token's kept experts; TD."""
        return self._inner.combine(rows_AD, own_handle(handle, ClippedHandle).inner)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Computes the gradients of rows, summed per token (TD), and of the last `dispatch`'s weights (TK)."""
        routing = own_handle(handle, ClippedHandle)
        weights_TK = routing.weights_TK
        assert weights_TK is not None, "dispatch_backward needs an earlier dispatch"

        def finish(back: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return back[0], routing.renormalization.backward(back[1], weights_TK)

        return MappedWork(self._inner.dispatch_backward(grad_rows_AD, grad_weights_A, routing.inner), finish)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its kept experts' rows; AD."""
        return self._inner.combine_backward(grad_rows_TD, own_handle(handle, ClippedHandle).inner)

    def close(self) -> None:
        """Closes the inner dispatcher."""
        self._inner.close()


def _nodes_of_choices(ids_TK: Tensor, node_of_expert_E: Tensor, num_nodes: int) -> Tensor:
    """Returns the node of each choice, TK, and `num_nodes` for an id of -1."""
    return torch.where(ids_TK < 0, num_nodes, node_of_expert_E[ids_TK.clamp(min=0)])


def _touch(nodes_TK: Tensor, num_nodes: int) -> Tensor:
    touched = torch.zeros(len(nodes_TK), num_nodes + 1, dtype=torch.bool, device=nodes_TK.device)
    return touched.scatter_(1, nodes_TK, value=True)[:, :num_nodes]
