"""The dispatcher and the lane that a run asks for."""

from typing import assert_never

import torch
from torch.distributed import ProcessGroup

from comm.all_to_all import AllToAllDispatcher
from comm.config import AllToAllDispatchConfig, DispatchConfig, LocalDispatchConfig
from comm.lane import Lane, StreamLane, ThreadLane
from comm.layout import Layout
from comm.local import LocalDispatcher
from comm.protocol import Dispatcher
from comm.traffic import Traffic


def open_lane(device: torch.device) -> Lane:
    """A stream on CUDA, a worker thread elsewhere."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane("comm")


def build_dispatcher(
    config: DispatchConfig, num_experts: int, layout: Layout, group: ProcessGroup, lane: Lane, traffic: Traffic
) -> Dispatcher:
    """By `config.kind`, for the experts shared out over `group`."""
    match config:
        case LocalDispatchConfig():
            return LocalDispatcher(num_experts)
        case AllToAllDispatchConfig():
            return AllToAllDispatcher(group, num_experts, layout, lane, traffic)
        case _ as other:
            assert_never(other)
