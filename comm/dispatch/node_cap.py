"""The cap on the nodes that a token's experts lie on: which nodes a token touches, and what happens over the cap.

Shape legend: T tokens, K experts per token, E experts, R ranks of the expert group, N its nodes, numbered from 0,
M nodes kept, D hidden size, A arrived rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from comm.dispatch.process_group import ExchangeGroup
from comm.dispatch.traffic import ClipCount
from comm.protocol import Arrived, Dispatcher, Handle, Label, MappedWork, Work

_MOST_NAMED = 8


class NodeCapError(ValueError):
    """Tokens whose experts lie on more nodes than allowed."""

    @classmethod
    def of(cls, rank: int, label: Label | None, num_touched_T: Tensor, max_nodes: int) -> Self:
        """Names the tokens of one rank that are over the cap; waits for the device.

        Args:
            rank: in the world, whose tokens they are.
            label: of the exchange.
            num_touched_T: nodes that each token touches; at least one of them over the cap.
            max_nodes: the cap.
        """
        touched = num_touched_T.tolist()
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
    """Raises on all ranks of a group if any of them has a token over the cap, so that none waits for another.

    Waits for the device only to name this rank's tokens.

    Args:
        num_over_R: tokens over the cap on each member, as all members know them.
        group: of the exchange.
        touched_TN: the nodes that each token of this rank touches.
        max_nodes: the cap.
        label: of the exchange.

    Raises:
        NodeCapError: names this rank's tokens if it has such, else the first rank that has.
    """
    if not any(num_over_R):
        return
    rank = group.members[group.place]
    if num_over_R[group.place]:
        raise NodeCapError.of(rank, label, touched_TN.sum(1), max_nodes)
    found = [(member, num_over) for member, num_over in zip(group.members, num_over_R, strict=True) if num_over]
    culprit, num_over = found[0]
    subject = "token that touches" if num_over == 1 else "tokens that touch"
    others = {0: "", 1: ", and 1 more rank has some"}.get(
        len(found) - 1, f", and {len(found) - 1} more ranks have some"
    )
    raise NodeCapError(
        f"rank {rank}: dispatch{f' of {label}' if label else ''}: rank {culprit} has {num_over} {subject} more than "
        f"dispatch.max_nodes={max_nodes} nodes; its own message names them{others}"
    )


def nodes_of_experts(num_experts: int, member_nodes: Sequence[int]) -> Tensor:
    """Returns the node of each expert, int64, E, when each member of a group holds an equal run of experts.

    Args:
        num_experts: a multiple of the members.
        member_nodes: of each member, by place. Nodes are renumbered from 0 in ascending order.
    """
    number = {node: index for index, node in enumerate(sorted(set(member_nodes)))}
    nodes_R = torch.tensor([number[node] for node in member_nodes], dtype=torch.int64)
    return nodes_R.repeat_interleave(num_experts // len(member_nodes))


def touched_nodes(ids_TK: Tensor, node_of_expert_E: Tensor, num_nodes: int) -> Tensor:
    """Marks the nodes that hold a token's experts, bool TN; ids of -1 touch none. No host synchronization."""
    return _touch(_nodes_of_choices(ids_TK, node_of_expert_E, num_nodes), num_nodes)


@dataclass(frozen=True, slots=True)
class Clipped:
    """Choices under the cap.

    ids_TK: int64, -1 for a choice given up. over_T: the tokens that gave up choices.
    """

    ids_TK: Tensor
    over_T: Tensor


def clip(
    ids_TK: Tensor, weights_TK: Tensor | None, node_of_expert_E: Tensor, num_nodes: int, max_nodes: int
) -> Clipped:
    """Keeps the choices on each token's best nodes. Tokens within the cap keep all of theirs.

    A node's score is the sum of the token's weights there, over choices in their order; of equal nodes the lower number
    is better. Without a host synchronization.

    Args:
        ids_TK: int64, global expert ids, -1 for no expert.
        weights_TK: routing weights; without them each choice counts 1.
        node_of_expert_E: int64, the node of each expert.
        num_nodes: of the expert group.
        max_nodes: nodes that a token may keep, at least 1.
    """
    # The node of each choice, TK (N for -1); the nodes that each token touches, TN; tokens over the cap, T.
    # The node of each choice, TK (N for -1); the nodes that each token touches, TN; tokens over the cap, T.
    nodes_TK = _nodes_of_choices(ids_TK, node_of_expert_E, num_nodes)
    touched_TN = _touch(nodes_TK, num_nodes)
    over_T = touched_TN.sum(1) > max_nodes
    # A node's score is the sum of weights there, TN. Untouched nodes come last; equal nodes keep their order.
    # A node's score is the sum of weights there, TN. Untouched nodes come last; equal nodes keep their order.
    counted_TK = torch.ones_like(ids_TK, dtype=torch.float32) if weights_TK is None else weights_TK.detach()
    there_TKN = nodes_TK[:, :, None] == torch.arange(num_nodes, device=ids_TK.device)
    scores_TN = torch.where(there_TKN, counted_TK[:, :, None], 0).sum(1).masked_fill(~touched_TN, -torch.inf)
    best_TM = scores_TN.sort(stable=True, dim=1, descending=True).indices[:, :max_nodes]
    # Choices on nodes beyond the best M are given up; the last column is for choices of no node.
    # Choices on nodes beyond the best M are given up; the last column is for choices of no node.
    lost_TN = torch.ones(len(ids_TK), num_nodes + 1, dtype=torch.bool, device=ids_TK.device)
    lost_TN = lost_TN.scatter_(1, best_TM, False)
    return Clipped(ids_TK.masked_fill(lost_TN.gather(1, nodes_TK) & over_T[:, None], -1), over_T)


@dataclass(frozen=True, slots=True)
class Renormalization:
    """Weights of kept choices, scaled so that each clipped token's weights keep their sum: w' = w S / S_kept.

    A token whose kept weights sum to 0 keeps them as they are. Tokens that are not clipped keep theirs bitwise.

    valid_TK: choices before the clip. kept_TK: choices after it. over_T: the tokens clipped.
    """

    valid_TK: Tensor
    kept_TK: Tensor
    over_T: Tensor

    def forward(self, weights_TK: Tensor) -> Tensor:
        """Weights for the kept choices, TK; what those of lost choices are is of no matter."""
        sum_T1, kept_T1 = self._sums(weights_TK)
        factor_T1 = torch.where(kept_T1 == 0, 1, sum_T1 / kept_T1)
        return torch.where(self.over_T[:, None], weights_TK * factor_T1, weights_TK)

    def backward(self, gradients_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Gradients of the weights before the clip, TK, from those after it.

        With S the sum of all weights, R that of the kept ones, and c the sum over kept choices of g w:
        dL/dw = c / R for every choice, and g S / R - c S / R^2 more for a kept one.

        Args:
            gradients_TK: g, 0 for choices that were not sent.
            weights_TK: given to `forward`.
        """
        sum_T1, kept_T1 = self._sums(weights_TK)
        factor_T1, share_TK = sum_T1 / kept_T1, gradients_TK / kept_T1
        common_T1 = torch.where(self.kept_TK, share_TK * weights_TK, 0).sum(1, keepdim=True)
        own_TK = torch.where(self.kept_TK, (gradients_TK - common_T1) * factor_T1, 0)
        clipped_TK = torch.where(self.valid_TK, common_T1 + own_TK, 0)
        plain_T1 = ~self.over_T[:, None] | (kept_T1 == 0)
        return torch.where(plain_T1, gradients_TK, clipped_TK)

    def _sums(self, weights_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Sums each token's weights over all its choices, and over kept ones; T1."""
        all_TK = torch.where(self.valid_TK, weights_TK, 0)
        return all_TK.sum(1, keepdim=True), torch.where(self.kept_TK, weights_TK, 0).sum(1, keepdim=True)


class ClippedHandle:
    """The routing that is left of one micro-batch, and how its weights were scaled."""

    def __init__(self, inner: Handle, renormalization: Renormalization) -> None:
        self.inner = inner
        self.renormalization = renormalization
        self.weights_TK: Tensor | None = None  # of the last dispatch, for its backward

    @property
    def num_tokens(self) -> int:
        """Tokens of this rank, T."""
        return self.inner.num_tokens


class ClippingDispatcher:
    """Any dispatcher, with each token's choices clipped to its best nodes before they are planned.

    `dispatch` sends the renormalized weights, so the expert's side applies those; `dispatch_backward` gives the exact
    gradient of the weights as they were. Which choices are kept carries no gradient, as in any gate.
    """

    num_local_experts: int

    def __init__(
        self, inner: Dispatcher, node_of_expert_E: Tensor, num_nodes: int, max_nodes: int, count: ClipCount
    ) -> None:
        """Wraps `inner`.

        Args:
            inner: sends the kept choices.
            node_of_expert_E: int64, on any device; this and the next two as for `clip`.
            num_nodes: of the expert group.
            max_nodes: nodes that a token may keep.
            count: learns of every plan.
        """
        self.num_local_experts = inner.num_local_experts
        self._inner = inner
        self._node_of_expert_E = node_of_expert_E
        self._num_nodes = num_nodes
        self._max_nodes = max_nodes
        self._count = count

    def plan(self, ids_TK: Tensor, weights_TK: Tensor | None = None, label: Label | None = None) -> Handle:
        """Clips the choices, then plans what is left."""
        self._node_of_expert_E = self._node_of_expert_E.to(ids_TK.device)
        clipped = clip(ids_TK, weights_TK, self._node_of_expert_E, self._num_nodes, self._max_nodes)
        self._count.add(None if label is None else label.layer, clipped.over_T)
        renormalization = Renormalization(ids_TK >= 0, clipped.ids_TK >= 0, clipped.over_T)
        return ClippedHandle(self._inner.plan(clipped.ids_TK, weights_TK, label), renormalization)

    def dispatch(self, rows_TD: Tensor, weights_TK: Tensor, handle: Handle) -> Work[Arrived]:
        """Sends a copy of each token's row, and the renormalized weight, to each of its kept experts."""
        own = _own(handle)
        own.weights_TK = weights_TK.detach()
        return self._inner.dispatch(rows_TD, own.renormalization.forward(own.weights_TK), own.inner)

    def combine(self, rows_AD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sums over each token's kept experts, unweighted; TD."""
        return self._inner.combine(rows_AD, _own(handle).inner)

    def dispatch_backward(
        self, grad_rows_AD: Tensor, grad_weights_A: Tensor, handle: Handle
    ) -> Work[tuple[Tensor, Tensor]]:
        """Gradients of rows, summed per token (TD), and of the weights given to the last `dispatch` (TK)."""
        own = _own(handle)
        weights_TK = own.weights_TK
        assert weights_TK is not None, "dispatch_backward needs the weights that dispatch was given"

        def finish(back: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            return back[0], own.renormalization.backward(back[1], weights_TK)

        return MappedWork(self._inner.dispatch_backward(grad_rows_AD, grad_weights_A, own.inner), finish)

    def combine_backward(self, grad_rows_TD: Tensor, handle: Handle) -> Work[Tensor]:
        """Sends a copy of each token's gradient to each of its kept experts' rows; AD."""
        return self._inner.combine_backward(grad_rows_TD, _own(handle).inner)

    def close(self) -> None:
        """Closes the inner dispatcher."""
        self._inner.close()


def _own(handle: Handle) -> ClippedHandle:
    assert isinstance(handle, ClippedHandle)
    return handle


def _nodes_of_choices(ids_TK: Tensor, node_of_expert_E: Tensor, num_nodes: int) -> Tensor:
    """Returns the node of each choice, TK; `num_nodes` for an id of -1."""
    return torch.where(ids_TK < 0, num_nodes, node_of_expert_E[ids_TK.clamp(min=0)])


def _touch(nodes_TK: Tensor, num_nodes: int) -> Tensor:
    touched = torch.zeros(len(nodes_TK), num_nodes + 1, dtype=torch.bool, device=nodes_TK.device)
    return touched.scatter_(1, nodes_TK, True)[:, :num_nodes]
