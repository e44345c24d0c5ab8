"""Opens the links between pipeline ranks for programs that decode, whose messages have varying sizes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.transfers.message import DECODING_KINDS
from comm.transfers.transport import PipelineTransport
from dualpipe.ir import Schedule
from dualpipe.transfers import Message, linked_pairs
from infer.engines.pipelined.plan import RoundFormat
from train.schedule.links import message_key
from train.world import World


class DecodeLinks:
    """The pipeline transport for the interpreter of a program that decodes.

    A message is a plan of fixed size, and then the rows that the plan announces. A receive starts when the rank waits
    for it, because the size of the rows is known only then. A sender never waits.
    """

    def __init__(self, transport: PipelineTransport, nodes: Sequence[int], traffic: Traffic) -> None:
        """Wraps a transport."""
        self._transport, self._nodes, self._traffic = transport, nodes, traffic
        self.form: RoundFormat | None = None

    def post_receive(self, message: Message, /) -> "_LateReceive":
        """Returns a receive that starts when it is waited for."""
        assert self.form is not None
        return _LateReceive(self._transport, message, self.form)

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Sends a packed value without waiting, and counts its bytes."""
        assert self.form is not None
        across = self._nodes[message.source] != self._nodes[message.destination]
        self._traffic.add_message(tensor.nbytes, across_nodes=across)
        head, rows = tensor[: self.form.plan_bytes], tensor[self.form.plan_bytes :]
        self._transport.send(message_key(message), head)
        if len(rows):
            self._transport.send(message_key(message), rows)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        self._transport.flush()

    def close(self) -> None:
        """Closes the links."""
        self._transport.close()


class _LateReceive:
    """Receive that starts when it is waited for."""

    def __init__(self, transport: PipelineTransport, message: Message, form: RoundFormat) -> None:
        self._transport, self._message, self._form = transport, message, form

    def wait(self) -> Tensor:
        """Receives the plan, then the rows, and returns both as one packed value."""
        key, form = message_key(self._message), self._form
        head = self._transport.post_receive(key, [form.plan_bytes], torch.uint8).wait()
        size = form.num_payload_bytes(self._message.kind, head)
        if not size:
            return head
        return torch.cat((head, self._transport.post_receive(key, [size], torch.uint8).wait()))


def open_decode_links(world: World, observers: Observers, schedule: Schedule) -> DecodeLinks:
    """Opens this rank's links for programs that decode. All ranks of the job call it at the same point."""
    layout, log = world.layout, observers.log
    pairs, seconds = linked_pairs(schedule), world.timeout_seconds
    transport = PipelineTransport(layout, pairs, world.device, seconds, log, DECODING_KINDS)
    nodes = [layout.node_of(member) for member in layout.pipeline_group(world.rank)]
    return DecodeLinks(transport, nodes, observers.traffic)
