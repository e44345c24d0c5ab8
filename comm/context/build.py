"""Chooses how a context group exchanges rows."""

from typing import Literal

from torch.distributed import ProcessGroup

from comm.context.alone import ALONE
from comm.context.forecast import MOST_GATHERED_RANKS
from comm.context.group import ContextLink, GatherContext
from comm.context.protocol import ContextGroup
from comm.context.ring import RingContext
from comm.dispatch.process_group import Observers
from comm.layout import Layout

ContextExchange = Literal["auto", "gather", "ring"]


def open_context(
    group: ProcessGroup | None, layout: Layout, observers: Observers, exchange: ContextExchange = "auto"
) -> ContextGroup:
    """Returns the context group of a process group; if it is None or has one rank, sequences are whole.

    `exchange`: how rows travel; `auto` gathers them up to `MOST_GATHERED_RANKS` ranks.
    """
    if group is None or group.size() == 1:
        return ALONE
    link = ContextLink(group, layout, observers)
    is_ring = exchange == "ring" or (exchange == "auto" and group.size() > MOST_GATHERED_RANKS)
    return RingContext(link) if is_ring else GatherContext(link)
