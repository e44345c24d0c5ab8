"""The cap on nodes per token, verified where it matters: by every rank of the exchange, before rows are sent.

Shape legend: R ranks of the expert group, T tokens of this rank, N nodes of the group.
"""

from collections.abc import Sequence

from torch import Tensor

from comm.dispatch.node_cap import NodeCapError
from comm.dispatch.process_group import Wire
from comm.protocol import Label


def verify_cap(num_over_R: Sequence[int], wire: Wire, touched_TN: Tensor, max_nodes: int, label: Label | None) -> None:
    """Raises on all ranks of a group if any of them has a token over the cap, so that none waits for another.

    Waits for the device only to name this rank's tokens.

    Args:
        num_over_R: tokens over the cap on each member, as all members know them.
        wire: of the group.
        touched_TN: the nodes that each token of this rank touches.
        max_nodes: the cap.
        label: of the exchange.

    Raises:
        NodeCapError: names this rank's tokens if it has such, else the first rank that has.
    """
    if not any(num_over_R):
        return
    rank = wire.members[wire.place]
    if num_over_R[wire.place]:
        raise NodeCapError.of(rank, label, touched_TN.sum(1), max_nodes)
    found = [(member, num_over) for member, num_over in zip(wire.members, num_over_R, strict=True) if num_over]
    culprit, num_over = found[0]
    subject = "token that touches" if num_over == 1 else "tokens that touch"
    others = {0: "", 1: ", and 1 more rank has some"}.get(
        len(found) - 1, f", and {len(found) - 1} more ranks have some"
    )
    raise NodeCapError(
        f"rank {rank}: dispatch{f' of {label}' if label else ''}: rank {culprit} has {num_over} {subject} more than "
        f"dispatch.max_nodes={max_nodes} nodes; its own message names them{others}"
    )
