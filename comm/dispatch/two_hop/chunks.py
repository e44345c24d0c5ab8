"""Both hops of rows, there and back: a chunk crosses nodes while the one before spreads within its node.

Messages are numbered: 0 to C - 1 are chunks that cross nodes, C is what need not cross.

Shape legend: X rows that arrive, Y rows that come back, B bytes of a row as sent, M bytes that a message brings.
"""

from collections.abc import Callable, Sequence

from torch import Tensor

from comm.dispatch.process_group import PendingExchange, Wire
from comm.dispatch.row_format import RowFormat
from comm.dispatch.traffic import Spread, Traffic
from comm.dispatch.two_hop.counts import Hop
from comm.protocol import Label

Pack = Callable[[int], Tensor]
"""The bytes of a message, by its number."""

Relay = Callable[[int, Tensor], Tensor]
"""What a relay sends on, from the number of a message and the bytes that it has received."""


class Travel:
    """One exchange. Every rank of the group starts the same messages in the same order, empty ones as well."""

    def __init__(
        self, rail: Wire, node: Wire, across: Sequence[Hop], within: Sequence[Hop], name: str, label: Label | None
    ) -> None:
        """`across` and `within`: by message, each from a token's rank to its experts."""
        self._rail = rail
        self._node = node
        self._across = across
        self._within = within
        self._name = name
        self._label = label

    def spread(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows to their experts' ranks; bytes_XB by message."""
        num_chunks = len(self._across)
        crossings = [self._cross(chunk, pack(chunk), hop, None) for chunk, hop in enumerate(self._across)]
        home = pack(num_chunks)
        lengths = [sum(hop.received) for hop in self._within]
        arrived_XB = form.allocate(sum(lengths), home.device)
        into = arrived_XB.split(lengths)
        fan = self._fan(num_chunks, home, self._within[-1], into[-1])
        del home
        for chunk in range(num_chunks):
            crossed = crossings.pop(0).wait()
            ahead = self._fan(chunk, relay(chunk, crossed), self._within[chunk], into[chunk])
            del crossed
            fan.wait()
            fan = ahead
        fan.wait()
        return arrived_XB

    def collect(self, form: RowFormat, pack: Pack, relay: Relay) -> Tensor:
        """Sends rows back to their tokens' ranks; bytes_YB by message.

        While a relay sums one chunk, the next one is already on its way to it.
        """
        first = pack(0)
        lengths = [sum(hop.sent) for hop in (*self._across, self._within[-1])]
        returned_YB = form.allocate(sum(lengths), first.device)
        into = returned_YB.split(lengths)
        fan = self._fan_back(0, first, into)
        del first
        crossings = []
        for chunk, hop in enumerate(self._across):
            ahead = self._fan_back(chunk + 1, pack(chunk + 1), into)
            crossings.append(self._cross(chunk, relay(chunk, fan.wait()), hop.back, into[chunk]))
            fan = ahead
        for exchange in (fan, *crossings):
            exchange.wait()
        return returned_YB

    def predict(self, traffic: Traffic, bytes_per_row: int, num_least_rows: int, back: bool) -> None:
        """Tells what the plan has in store, of the way there or back."""
        layer = None if self._label is None else self._label.layer
        for wire, hops, least in ((self._rail, self._across, num_least_rows), (self._node, self._within, 0)):
            sent = [hop.back.sent if back else hop.sent for hop in hops] or [(0,) * len(wire.members)]
            rows = Spread.of(list(map(sum, zip(*sent, strict=True))), wire.nodes, wire.place)
            traffic.add_predicted(layer, rows, bytes_per_row, least)

    def _fan_back(self, message: int, bytes_NB: Tensor, into: Sequence[Tensor]) -> PendingExchange:
        """What need not cross comes back to its place at once; a chunk comes to its relay."""
        is_home = message == len(self._across)
        return self._fan(message, bytes_NB, self._within[message].back, into[message] if is_home else None)

    def _fan(self, message: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> PendingExchange:
        part = "what need not cross" if message == len(self._across) else f"chunk {message}"
        name = f"{self._name} within the node, {part}"
        return self._node.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)

    def _cross(self, chunk: int, bytes_NB: Tensor, hop: Hop, into_MB: Tensor | None) -> PendingExchange:
        name = f"{self._name} across nodes, chunk {chunk}"
        return self._rail.start(bytes_NB, hop.sent, hop.received, name, self._label, into_MB)
