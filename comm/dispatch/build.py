"""Builds the dispatcher and the lane of a run."""

from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from comm.config import CappedDispatchConfig, DispatchConfig
from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import DISPATCHERS
from comm.dispatch.requirements import TokenSizes
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherParts:
    """What a dispatcher is built from.

    Attributes:
        num_experts: of a layer, over all ranks.
        layout: of the world.
        group: of the ranks that share a layer's experts with this one, `layout.expert_group`.
        lane: where exchanges run.
        observers: who counts and logs them.
        timeout_seconds: of each collective of the groups that the dispatcher makes for itself.
        tokens: of a rank in a micro-batch; a dispatcher may allocate for them.
    """

    num_experts: int
    layout: Layout
    group: ProcessGroup
    lane: Lane
    observers: Observers
    timeout_seconds: float
    tokens: TokenSizes


def open_lane(device: torch.device) -> Lane:
    """Opens a stream on CUDA, a worker thread elsewhere."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane("comm")


def build_dispatcher(config: DispatchConfig, parts: DispatcherParts) -> Dispatcher:
    """Builds the dispatcher that `config` names. Every rank of the job calls it at the same point.

    The dispatcher that sends is innermost, the one that clips choices is around it, and the one that quantises rows is
    outermost.
    """
    dispatcher = DISPATCHERS.get(config.kind).build(config, parts)
    if isinstance(config, CappedDispatchConfig) and config.node_cap == "clip":
        nodes = [parts.layout.node_of(rank) for rank in distributed.get_process_group_ranks(parts.group)]
        node_of_expert_E = nodes_of_experts(parts.num_experts, nodes)
        num_nodes = len(set(nodes))
        dispatcher = ClippingDispatcher(
            dispatcher, node_of_expert_E, num_nodes, config.max_nodes, parts.observers.clips
        )
    if config.payload == "fp8":
        dispatcher = Fp8Dispatcher(dispatcher)
    return dispatcher
