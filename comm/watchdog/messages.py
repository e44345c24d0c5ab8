"""Exchanges messages between watchdogs: their fields, the addresses of ranks, and the socket.

A message to all ranks travels along the tree of ranks. An address takes 6 bytes for each rank. Addresses come down the
tree from rank 0 as datagrams: a request names a block, and the reply holds up to 16 consecutive blocks. A job of one
block requests none, because its ranks have all addresses. Datagrams are authenticated, and separate from the job's
other traffic.
"""

import os
import selectors
import socket
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from itertools import cycle
from typing import Annotated, Any, Literal

from base.decode import encode
from comm.exits import EXIT_OTHER
from comm.watchdog.ranks import FANOUT, MAX_TURNS, RankSet, RankTree
from comm.watchdog.verdict import Log, RankState, Started, Verdict
from comm.watchdog.wire import (
    MAX_DATAGRAM_BYTES,
    Datagram,
    DatagramCodec,
    Kind,
    MessageError,
    Name,
    Rank,
    SocketAddress,
    Text,
    decode_fields,
)

MAX_BLOCKS = 16
_MAX_HOST_CHARACTERS = 64
End = Literal["done", "error", "signal"]
Send = Callable[[int, Kind, Mapping[str, Any]], None]
_RELAY = "relay"


@dataclass(frozen=True, slots=True)
class StateRequest:
    """Request for a rank's state, or only for whether it has reached the collective `text`."""

    group: Name | None = None
    number: int = 0
    text: Text = ""

    def short_reply(self, state: RankState) -> "Reached | None":
        """Returns the short reply of a rank in this state, or None if it must reply its whole state."""
        if self.group is None or state.is_busy or state.started.get(self.group, 0) <= self.number:
            return None
        own = Started.of(self.group, self.number, self.text)
        if any((one.group, one.number) == (own.group, own.number) and one != own for one in state.log):
            return None
        is_waiting = any((wait.group, wait.number) == (self.group, self.number) for wait in state.waits)
        return Reached(self.group, self.number, is_waiting)


@dataclass(frozen=True, slots=True)
class Reached:
    """Short reply of a rank that has started the collective of a request and does not compute."""

    group: Name
    number: int
    is_waiting: bool


@dataclass(frozen=True, slots=True)
class Notice:
    """Announcement that the sender holds an inquiry, so that other ranks start none."""


@dataclass(frozen=True, slots=True)
class AddressRequest:
    """Request for the addresses of a block and those after it."""

    block: int


@dataclass(frozen=True, slots=True)
class Addresses:
    """Addresses of consecutive ranks or leaders, which names each host once."""

    hosts: Annotated[tuple[Annotated[str, _MAX_HOST_CHARACTERS], ...], FANOUT]
    host_of: Annotated[tuple[int, ...], FANOUT]
    ports: Annotated[tuple[int, ...], FANOUT]


@dataclass(frozen=True, slots=True)
class AddressReply:
    """Addresses of consecutive blocks from `block` on, None for one that the sender does not know."""

    block: int
    blocks: Annotated[tuple[Addresses | None, ...], MAX_BLOCKS]


@dataclass(frozen=True, slots=True)
class Departure:
    """Announcement that the sender leaves the job: it finished, failed with an error, or got a signal."""

    end: End
    text: Text
    log: Log = ()

    def verdict_on(self, rank: int) -> Verdict:
        """Returns the verdict with which all other ranks end if `rank` failed with an error."""
        return Verdict(code=EXIT_OTHER, text=f"rank {rank}: {self.text}", judge=rank, culprits=RankSet.of((rank,)))


Message = StateRequest | RankState | Verdict | Departure | Reached | Notice | AddressRequest | AddressReply

_TYPES: dict[Kind, type[Message]] = {
    "state_request": StateRequest,
    "state": RankState,
    "verdict": Verdict,
    "departure": Departure,
    "reached": Reached,
    "notice": Notice,
    "address_request": AddressRequest,
    "addresses": AddressReply,
}


def decode_message(kind: Kind, values: Mapping[str, Any], world_size: int, author: int) -> Message:
    """Decodes an authentic message of rank `author`, its judge if a verdict, or raises `MessageError`."""
    message = decode_fields(_TYPES[kind], values, world_size)
    if isinstance(message, Verdict) and message.judge != author:
        raise MessageError(f"judge: must be the sender, rank {author}, is {message.judge}")
    return message


@dataclass(frozen=True, slots=True)
class Route:
    """Way of a message through the tree: its author, and the broadcast's number, which selects the tree."""

    origin: Rank
    turn: Annotated[int, MAX_TURNS] | None


class Relay:
    """Broadcasts of one rank, and those that it forwards.

    In a job of one block a rank sends to all others itself. In a larger one, a message names its origin and its turn,
    and is valid only if it arrives from the rank above in the tree that these two select. No rank sends more than some
    200 datagrams.
    """

    def __init__(self, rank: int, tree: RankTree, send: Send) -> None:
        self._rank = rank
        self._tree = tree
        self._send = send
        self._turn = 0

    def broadcast(self, kind: Kind, message: Message) -> None:
        """Sends to all other ranks. Repeated messages reach all, as each call has others forward them."""
        route = Route(self._rank, self._turn)
        self._turn = (self._turn + 1) % MAX_TURNS
        values = encode(message)
        if not self._tree.is_flat:
            values[_RELAY] = encode(route)
        self.forward(route, kind, values)

    def send_to_block(self, kind: Kind, message: Message) -> None:
        """Sends to the other ranks of this rank's block only."""
        for rank in self._tree.block(self._rank):
            if rank != self._rank:
                self._send(rank, kind, encode(message))

    def route(self, sender: int, values: Mapping[str, Any]) -> Route:
        """Returns the way of a message; raises MessageError if its sender does not forward it to this rank."""
        if _RELAY not in values:
            return Route(sender, None)
        route = decode_fields(Route, values[_RELAY], self._tree.world_size)
        is_flat = route.turn is None or self._tree.is_flat
        if is_flat or self._tree.parent(self._rank, route.origin, route.turn or 0) != sender:
            raise MessageError(f"{_RELAY}: rank {sender} does not forward messages of rank {route.origin} to this rank")
        return route

    def forward(self, route: Route, kind: Kind, values: Mapping[str, Any]) -> None:
        """Sends a message that came through the tree to the ranks below this one."""
        if route.turn is not None:
            for child in self._tree.children(self._rank, route.origin, route.turn):
                self._send(child, kind, values)


_UNKNOWN = -1
_RETRY_SECONDS = 0.3
_LONGEST_RETRY_SECONDS = 10.0
_TRIES_PER_SOURCE = 3


class AddressBook:
    """Addresses of the ranks of a job, as far as they are known. One rank's own address need not be in it."""

    def __init__(self, tree: RankTree) -> None:
        self.tree = tree
        self._hosts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._host_of = array("i", [_UNKNOWN]) * tree.world_size
        self._ports = array("H", [0]) * tree.world_size

    def address(self, rank: int) -> SocketAddress | None:
        """Returns the address of a rank, or None if it is not known yet."""
        number = self._host_of[rank]
        return None if number == _UNKNOWN else (self._hosts[number], self._ports[rank])

    def add(self, ranks: Iterable[int], addresses: Iterable[SocketAddress]) -> None:
        """Adds addresses. A known one stays: it came through the store, with a tag of the rank itself."""
        for rank, (host, port) in zip(ranks, addresses, strict=True):
            if self._host_of[rank] != _UNKNOWN:
                continue
            if host not in self._numbers:
                self._numbers[host] = len(self._hosts)
                self._hosts.append(host)
            self._ports[rank] = port
            self._host_of[rank] = self._numbers[host]  # last: another thread may read the address from here on

    def missing_blocks(self) -> list[int]:
        """Returns the blocks of which an address is not known."""
        return [block for block in range(self.tree.num_blocks) if self.block(block) is None]

    def block(self, index: int) -> Addresses | None:
        """Returns the addresses of a block, or None if one is not known."""
        addresses = [self.address(rank) for rank in self.tree.group(1, index)]
        complete = [address for address in addresses if address is not None]
        return encode_addresses(complete) if len(complete) == len(addresses) else None


def encode_addresses(addresses: Sequence[SocketAddress]) -> Addresses:
    """Returns addresses as a message or record that names each host once."""
    numbers = {host: number for number, host in enumerate(dict.fromkeys(host for host, _ in addresses))}
    return Addresses(
        tuple(numbers), tuple(numbers[host] for host, _ in addresses), tuple(port for _, port in addresses)
    )


def decode_addresses(addresses: Addresses, num_ranks: int) -> list[SocketAddress]:
    """Returns the addresses of `num_ranks` ranks from a message or record, or raises `MessageError`."""
    if {len(addresses.ports), len(addresses.host_of)} != {num_ranks} or len(addresses.hosts) > num_ranks:
        raise MessageError(f"ports: must be those of {num_ranks} ranks, are {len(addresses.ports)}")
    if max(addresses.host_of) >= len(addresses.hosts) or not all(0 < port < 65536 for port in addresses.ports):
        raise MessageError("ports: not a port, or without a host")
    for host in addresses.hosts:
        try:
            ip_address(host)
        except ValueError as error:  # a name would be looked up when a datagram is sent
            raise MessageError("hosts: not an IP address") from error
    return [(addresses.hosts[number], port) for number, port in zip(addresses.host_of, addresses.ports, strict=True)]


class AddressFetch:
    """Fetch of the addresses that one rank does not have yet. Used on one thread."""

    def __init__(self, rank: int, book: AddressBook, send: Send) -> None:
        tree = book.tree
        parents = []
        parent = tree.parent(rank)
        while parent is not None:
            parents.append(parent)
            parent = tree.parent(parent)
        # Another rank of the block has the addresses if all leaders are lost.
        others = [member for member in tree.block(rank) if member != rank and member not in parents]
        self._sources = cycle([*parents, *others] or [rank])
        self._source = next(self._sources)
        self._book = book
        self._send = send
        self._missing = book.missing_blocks()
        self._num_tries = 0
        self._retry_at = 0.0
        self._retry_seconds = _RETRY_SECONDS

    def advance(self, now: float) -> None:
        """Requests the next missing blocks, again if no reply has arrived in time."""
        if not self._missing or now < self._retry_at:
            return
        if self._num_tries == _TRIES_PER_SOURCE:
            self._source = next(self._sources)
            self._num_tries = 0
            self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        self._num_tries += 1
        self._retry_at = now + self._retry_seconds
        self._send(self._source, "address_request", encode(AddressRequest(self._missing[0])))

    def handle(self, message: AddressRequest | AddressReply) -> AddressReply | None:
        """Handles a message of another rank, and returns the reply to a request if addresses are known."""
        if isinstance(message, AddressReply):
            self._take(message)
            return None
        indices = range(message.block, min(message.block + MAX_BLOCKS, self._book.tree.num_blocks))
        blocks = tuple(map(self._book.block, indices))
        return AddressReply(message.block, blocks) if any(blocks) else None

    def _take(self, reply: AddressReply) -> None:
        tree = self._book.tree
        received = range(reply.block, reply.block + len(reply.blocks))
        if received.stop > tree.num_blocks:
            raise MessageError("block: not one of the job")
        for index, addresses in zip(received, reply.blocks, strict=True):
            if addresses is not None:
                ranks = tree.group(1, index)
                self._book.add(ranks, decode_addresses(addresses, len(ranks)))
        left = [index for index in self._missing if index not in received or self._book.block(index) is None]
        if len(left) < len(self._missing):
            self._num_tries = 0
            self._retry_at = 0.0
            self._retry_seconds = _RETRY_SECONDS
        self._missing = left


# Limits for one read of one socket, so that a flood does not block the watchdog.
_MAX_DATAGRAMS_PER_READ = 256
_MAX_BYTES_PER_READ = 1 << 20


class WatchdogSocket:
    """UDP socket of a rank's watchdog, plus connected probe sockets that detect a closed port.

    The kernel queues a datagram to an open port of a stopped process, loses one to a disconnected machine, and refuses
    one to a port that no process has open. Only a socket that is connected to the port gets the refusal: then `refused`
    names its rank. The socket is bound only to the address with which this rank connects to the others, never to all
    addresses. `num_dropped` counts datagrams that were not authentic or not new. `is_flooded`: the last `receive`
    reached a limit.
    """

    def __init__(self, rank: int, route_host: str) -> None:
        """Opens the socket; `route_host`, on the same network as the other ranks, selects the local address."""
        self._rank = rank
        self._wakeups, self._wake = socket.socketpair()
        self._wakeups.settimeout(0.0)  # non-blocking
        self._wake.settimeout(0.0)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._wakeups, selectors.EVENT_READ)
        self._probes: dict[int, socket.socket] = {}
        self._book: AddressBook | None = None
        self._codec: DatagramCodec | None = None
        self.num_dropped = 0
        self.is_flooded = False
        self.refused: set[int] = set()
        self._socket = self._open_socket(route_host)

    @property
    def host(self) -> str:
        """Address of this rank for the other ranks."""
        return str(self._socket.getsockname()[0])

    @property
    def port(self) -> int:
        """Port of this rank on `host`."""
        return int(self._socket.getsockname()[1])

    @property
    def book(self) -> AddressBook:
        """Addresses of the ranks, as far as they are known."""
        assert self._book is not None, "open comes first"
        return self._book

    @property
    def tree(self) -> RankTree:
        """Tree of all ranks."""
        return self.book.tree

    @property
    def wakeup_file(self) -> int:
        """File descriptor that ends `receive` if a byte is written to it."""
        return self._wake.fileno()

    def rebind(self, route_host: str) -> None:
        """Binds to the local address with which `route_host` is reached. Must be called before `open`."""
        self._selector.unregister(self._socket)
        self._socket.close()
        self._socket = self._open_socket(route_host)

    def open(self, book: AddressBook, key: bytes) -> None:
        """Starts to accept messages authenticated with the attempt's key; `book` may be completed later."""
        self._codec = DatagramCodec(key, self._rank, book.tree.world_size)
        self._book = book

    def send(self, rank: int, kind: Kind, values: Mapping[str, Any]) -> None:
        """Sends to a rank. A datagram that cannot be sent, or has no address yet, is dropped silently."""
        if (address := self.book.address(rank)) is not None:
            self.reply(rank, address, kind, values)

    def reply(self, rank: int, address: SocketAddress, kind: Kind, values: Mapping[str, Any]) -> None:
        """Sends to a rank at the address from which its message arrived."""
        with suppress(OSError):
            self._socket.sendto(self._require_codec().encode(rank, kind, values), address)

    def probe(self, rank: int, values: Mapping[str, Any]) -> None:
        """Sends a state request from a socket that detects a closed port. `receive` returns the reply."""
        if (address := self.book.address(rank)) is None:
            return
        try:
            if rank not in self._probes:
                self._probes[rank] = self._open_probe(address)
            self._probes[rank].send(self._require_codec().encode(rank, "state_request", values))
        except ConnectionRefusedError:
            self.refused.add(rank)
        except OSError:  # too many open files for this many silent ranks, or the network is down
            self.send(rank, "state_request", values)

    def close_probes(self) -> None:
        """Closes the sockets that `probe` opened, and clears `refused`."""
        for probe in self._probes.values():
            self._selector.unregister(probe)
            probe.close()
        self._probes.clear()
        self.refused.clear()

    def receive(self, seconds: float) -> tuple[list[Datagram], bytes]:
        """Waits for messages or bytes in `wakeup_file`; reads a limited number, to return in time in a flood."""
        messages: list[Datagram] = []
        self.is_flooded = False
        woken = b""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._wakeups:
                woken += self._wakeups.recv(64)
            else:
                assert isinstance(key.fileobj, socket.socket)
                messages += self._read(key.fileobj)
        return messages, woken

    def wake(self) -> None:
        """Ends `receive` now."""
        with suppress(BlockingIOError):
            os.write(self.wakeup_file, b"\0")

    def close(self) -> None:
        """Closes all sockets."""
        self.close_probes()
        self._selector.close()
        for opened in (self._socket, self._wakeups, self._wake):
            opened.close()

    def _open_socket(self, route_host: str) -> socket.socket:
        family, _, _, _, address = socket.getaddrinfo(route_host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as route:
            route.connect(address)  # sends nothing
            host, _, *scope = route.getsockname()
        return self._register(socket.socket(family, socket.SOCK_DGRAM), (host, 0, *scope))

    def _open_probe(self, address: SocketAddress) -> socket.socket:
        probe = socket.socket(self._socket.family, socket.SOCK_DGRAM)
        return self._register(probe, (self.host, 0, *self._socket.getsockname()[2:]), address)

    def _register(
        self, opened: socket.socket, local: tuple[Any, ...], remote: SocketAddress | None = None
    ) -> socket.socket:
        """Binds a socket, connects it to `remote`, and lets `receive` read it."""
        try:
            opened.bind(local)
            opened.settimeout(0.0)  # non-blocking
            if remote is not None:
                opened.connect(remote)
        except OSError:
            opened.close()
            raise
        self._selector.register(opened, selectors.EVENT_READ)
        return opened

    def _read(self, source: socket.socket) -> list[Datagram]:
        messages: list[Datagram] = []
        num_bytes = 0
        num_dropped = self.num_dropped
        for _ in range(_MAX_DATAGRAMS_PER_READ):
            if num_bytes >= _MAX_BYTES_PER_READ:
                break
            try:
                data, sender = source.recvfrom(MAX_DATAGRAM_BYTES)
            except ConnectionRefusedError:
                self.refused |= {rank for rank, probe in self._probes.items() if probe is source}
                return messages
            except OSError:  # nothing more to read, or the network is down
                return messages
            num_bytes += len(data)
            try:
                messages.append(self._require_codec().decode(data, sender[:2]))
            except MessageError:
                self.num_dropped += 1
        self.is_flooded |= self.num_dropped > num_dropped
        return messages

    def _require_codec(self) -> DatagramCodec:
        assert self._codec is not None, "open comes first"
        return self._codec
