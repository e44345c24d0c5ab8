"""Exchanges rows in chunks: one crosses nodes while the previous one is sent within nodes.

Messages are numbered: 0 to C - 1 are chunks that cross nodes, C contains the rows that stay on their node.
"""

# Shape legend: X rows that arrive, Y rows that return, B bytes of a row as sent, M rows of a received message.

from collections.abc import Callable, Sequence

from torch import Tensor

from comm.dispatch.process_group import ExchangeGroup, PendingExchange, RowFormat
from comm.dispatch.traffic import Spread, Traffic
from comm.dispatch.two_hop.counts import Hop
from comm.protocol import Label

Pack = Callable[[int], Tensor]  # returns the bytes of the message with a number

Relay = Callable[[int, Tensor], Tensor]
"""Returns the bytes that a relay forwards, from the number of a message and its received bytes."""


class ChunkedExchange:
    """Exchange over both hops. All ranks of the group start the same messages in order, even empty ones."""

    def __init__(
        self,
        rail: ExchangeGroup,
        node: ExchangeGroup,
        across: Sequence[Hop],
        within: Sequence[Hop],
        name: str,
        label: Label | None,
    ) -> None:
        self._rail = rail
        self._node = node
        self._across = across
        self._within = within
        self._name = name
        self._label = label

    def send_to_experts(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows to their experts' ranks and returns bytes_XB, ordered by message."""
        num_chunks = len(self._across)
        # All chunks start to cross nodes at once; the rows that stay on the node are sent meanwhile.
        crossings = [self._start_across(chunk, pack(chunk), hop, None) for chunk, hop in enumerate(self._across)]
        home = pack(num_chunks)
        lengths = [sum(hop.received) for hop in self._within]
        arrived_XB = form.allocate(sum(lengths), home.device)
        into = arrived_XB.split(lengths)
        pending = self._start_within(num_chunks, home, self._within[-1], into[-1])
        del home
        # Forward each chunk within the node when it has crossed, while the next ones cross.
        for chunk in range(num_chunks):
            crossed = crossings.pop(0).wait()
            following = self._start_within(chunk, relay(chunk, crossed), self._within[chunk], into[chunk])
            del crossed
            pending.wait()
            pending = following
        pending.wait()
        return arrived_XB

    def return_to_tokens(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows back to their tokens' ranks, the next chunk while a relay sums one; bytes_YB by message."""
        first = pack(0)
        lengths = [sum(hop.sent) for hop in (*self._across, self._within[-1])]
        returned_YB = form.allocate(sum(lengths), first.device)
        into = returned_YB.split(lengths)
        pending = self._return_within(0, first, into)
        del first
        crossings = []
        for chunk, hop in enumerate(self._across):
            following = self._return_within(chunk + 1, pack(chunk + 1), into)
            crossings.append(self._start_across(chunk, relay(chunk, pending.wait()), hop.back, into[chunk]))
            pending = following
        for exchange in (pending, *crossings):
            exchange.wait()
        return returned_YB

    def predict(self, traffic: Traffic, bytes_per_row: int, min_rows_across_nodes: int, *, back: bool) -> None:
        """Counts the rows that the plan predicts for the direction to experts or, with `back`, to tokens."""
        layer = None if self._label is None else self._label.layer
        for group, hops, least in ((self._rail, self._across, min_rows_across_nodes), (self._node, self._within, 0)):
            sent = [hop.back.sent if back else hop.sent for hop in hops] or [(0,) * len(group.members)]
            rows = Spread.of(list(map(sum, zip(*sent, strict=True))), group.nodes, group.place)
            traffic.add_predicted(layer, rows, bytes_per_row, least)

    def _return_within(self, message: int, bytes_NB: Tensor, into: Sequence[Tensor]) -> PendingExchange:
        """Starts to return rows within the node: a chunk's to the relay, others to their tokens' ranks."""
        is_home = message == len(self._across)
        return self._start_within(message, bytes_NB, self._within[message].back, into[message] if is_home else None)

    def _start_within(self, message: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> PendingExchange:
        part = "local rows" if message == len(self._across) else f"chunk {message}"
        name = f"{self._name} within the node, {part}"
        return self._node.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)

    def _start_across(self, chunk: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> PendingExchange:
        name = f"{self._name} across nodes, chunk {chunk}"
        return self._rail.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)
