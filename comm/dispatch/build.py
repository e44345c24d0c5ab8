"""Builds the dispatcher and the comm lane of a run."""

from dataclasses import dataclass

import torch
from torch import distributed
from torch.distributed import ProcessGroup

from comm.config import CappedDispatchConfig, DispatchConfig
from comm.dispatch.fp8 import Fp8Dispatcher
from comm.dispatch.node_cap import ClippingDispatcher, nodes_of_experts
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import DISPATCHERS, TokenSizes
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.protocol import Dispatcher


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatcherParts:
    """Arguments for building a dispatcher.

    Attributes:
        num_experts: experts of a layer over all ranks.
        group: process group of the ranks that share a layer's experts, `layout.expert_group`.
        timeout_seconds: timeout of each collective in groups that the dispatcher creates.
        tokens: sizes of a rank's micro-batch, for which a dispatcher may allocate buffers.
    """

    num_experts: int
    layout: Layout
    group: ProcessGroup
    lane: Lane
    observers: Observers
    timeout_seconds: float
    tokens: TokenSizes


def open_lane(device: torch.device, name: str = "comm") -> Lane:
    """Opens a lane: a stream on CUDA, else a worker thread. Its thread has the given name."""
    return StreamLane(device, name) if device.type == "cuda" else ThreadLane(name)


def build_dispatcher(config: DispatchConfig, parts: DispatcherParts) -> Dispatcher:
    """Builds the dispatcher of `config`, wrapped to clip or quantize. All ranks call it at the same point."""
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
