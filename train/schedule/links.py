"""Opens the links between pipeline ranks that a schedule needs, for use by the interpreter."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.protocol import Work
from comm.transfers import MessageKey, PipelineTransport
from dualpipe.ir import Message, Schedule, linked_pairs
from train.world import World


class PipelineLinks:
    """The pipeline transport for the interpreter. Slices of sequences differ in shape."""

    def __init__(
        self,
        transport: PipelineTransport,
        nodes: Sequence[int],
        traffic: Traffic,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        """Wraps a transport. Micro-batch m has the shape with the number m modulo their number."""
        self._transport = transport
        self._nodes = nodes
        self._traffic = traffic
        self._shapes = tuple(shapes)
        self._dtype = dtype

    def with_shapes(self, shapes: Sequence[tuple[int, ...]]) -> "PipelineLinks":
        """Returns the same links for hidden states of other shapes. Only one of both has messages under way."""
        return PipelineLinks(self._transport, self._nodes, self._traffic, shapes, self._dtype)

    def post_receive(self, message: Message, /) -> Work[Tensor]:
        """Allocates a buffer for a message and starts to receive it."""
        shape = self._shapes[message.micro_batch % len(self._shapes)]
        return self._transport.post_receive(message_key(message), shape, self._dtype)

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Sends a message without waiting, and counts its bytes."""
        across = self._nodes[message.source] != self._nodes[message.destination]
        self._traffic.add_message(tensor.nbytes, across_nodes=across)
        self._transport.send(message_key(message), tensor)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        self._transport.flush()

    def close(self) -> None:
        """Closes the links."""
        self._transport.close()


def message_key(message: Message) -> MessageKey:
    """Returns the transport's key of a schedule's message."""
    return MessageKey(
        kind=message.kind,
        direction=message.direction,
        stage=message.stage,
        micro_batch=message.micro_batch,
        source=message.source,
        destination=message.destination,
    )


def open_links(
    world: World, observers: Observers, schedule: Schedule, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> PipelineLinks:
    """Opens this rank's links of one replica. All ranks of the job call it at the same point."""
    layout = world.layout
    log = observers.log
    transport = PipelineTransport(layout, linked_pairs(schedule), world.device, world.timeout_seconds, log)
    nodes = [layout.node_of(member) for member in layout.pipeline_group(world.rank)]
    return PipelineLinks(transport, nodes, observers.traffic, shapes, dtype)
