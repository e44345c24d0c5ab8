"""Holds the addresses of all ranks in arrays, and fetches after the start those that a rank misses.

They take 6 bytes for each rank. They come down the tree from rank 0 as datagrams: a request names a block, and the
reply holds up to 16 consecutive blocks. A job of one block sends nothing, because its ranks have all addresses.
"""

from array import array
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from itertools import cycle

from comm.watchdog.messages import MAX_BLOCKS, Addresses, AddressReply, AddressRequest, Send
from comm.watchdog.ranks import RankTree
from comm.watchdog.wire import MessageError, SocketAddress, encode_fields

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
        known = [address for address in addresses if address is not None]
        return encode_addresses(known) if len(known) == len(addresses) else None


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
        others = [other for other in tree.block(rank) if other != rank and other not in parents]
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
        self._send(self._source, "address_request", encode_fields(AddressRequest(self._missing[0])))

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
