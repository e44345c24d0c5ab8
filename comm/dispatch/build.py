"""The dispatcher and the lane that a run asks for."""

from typing import assert_never

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from comm.config import (
    AllToAllDispatchConfig,
    DeepEPDispatchConfig,
    DispatchConfig,
    LocalDispatchConfig,
    TwoHopDispatchConfig,
)
from comm.dispatch.all_to_all.dispatcher import AllToAllDispatcher
from comm.dispatch.deepep.dispatcher import DeepEPDispatcher
from comm.dispatch.deepep.package import BufferShape
from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.process_group import Observers
from comm.dispatch.two_hop.dispatcher import TwoHopDispatcher, TwoHopGroups
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher


def open_lane(device: torch.device) -> Lane:
    """A stream on CUDA, a worker thread elsewhere."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane("comm")


def build_dispatcher(
    config: DispatchConfig,
    num_experts: int,
    layout: Layout,
    group: ProcessGroup,
    lane: Lane,
    observers: Observers,
    timeout_seconds: float,
    shape: BufferShape | None = None,
) -> Dispatcher:
    """By `config`, for the experts shared out over `group`. Every rank of the job calls it at the same point.

    What sends is inmost, around it what clips choices, and outmost what quantises rows.

    Args:
        config: of the exchange.
        num_experts: of a layer, over all ranks.
        layout: of the world.
        group: of the ranks that share a layer's experts with this one, `layout.expert_group`.
        lane: where exchanges run.
        observers: who counts and logs them.
        timeout_seconds: of each collective of the groups that the exchange makes for itself.
        shape: of DeepEP's buffer; no other needs one.
    """
    dispatcher = _build_sender(config, num_experts, layout, group, lane, observers, timeout_seconds, shape)
    if config.kind != "local" and config.node_cap == "clip":
        nodes = [layout.node_of(rank) for rank in distributed.get_process_group_ranks(group)]
        node_of_expert_E = nodes_of_experts(num_experts, nodes)
        num_nodes = len(set(nodes))
        dispatcher = ClippingDispatcher(dispatcher, node_of_expert_E, num_nodes, config.max_nodes, observers.clips)
    if config.payload == "fp8":
        dispatcher = Fp8Dispatcher(dispatcher)
    return dispatcher


def _build_sender(
    config: DispatchConfig,
    num_experts: int,
    layout: Layout,
    group: ProcessGroup,
    lane: Lane,
    observers: Observers,
    timeout_seconds: float,
    shape: BufferShape | None = None,
) -> Dispatcher:
    max_nodes = config.max_nodes if config.kind != "local" and config.node_cap == "verify" else None
    match config:
        case LocalDispatchConfig():
            return LocalDispatcher(num_experts)
        case AllToAllDispatchConfig():
            return AllToAllDispatcher(group, num_experts, layout, lane, observers, max_nodes)
        case TwoHopDispatchConfig():
            groups = TwoHopGroups.join(group, layout, timeout_seconds)
            return TwoHopDispatcher(groups, num_experts, layout, lane, observers, config)
        case DeepEPDispatchConfig():
            assert shape is not None
            return DeepEPDispatcher(group, num_experts, layout, lane, observers, shape, max_nodes)
        case _ as other:
            assert_never(other)
