"""Holds the addresses of all ranks in arrays: 6 bytes for each rank, and one text for each machine."""

from array import array
from collections.abc import Iterable, Sequence
from ipaddress import ip_address
from typing import Any

from comm.watchdog.decode import MessageError, integer_of, list_of
from comm.watchdog.tree.rank_tree import RankTree

SocketAddress = tuple[str, int]

_MAX_HOST_CHARACTERS = 64
_UNKNOWN = -1


class AddressBook:
    """Addresses of the ranks of a job, as far as they are known. One rank's own address need not be in it.

    Attributes:
        tree: tree of the job's ranks.
    """

    tree: RankTree

    def __init__(self, tree: RankTree) -> None:
        """Creates a book without addresses."""
        self.tree = tree
        self._hosts: list[str] = []
        self._numbers: dict[str, int] = {}
        self._host_of = array("i", [_UNKNOWN]) * tree.world_size
        self._ports = array("H", [0]) * tree.world_size
        self._num_known = 0

    @classmethod
    def of(cls, addresses: Sequence[SocketAddress], tree: RankTree | None = None) -> "AddressBook":
        """Returns a book with the addresses of all ranks, in order."""
        book = cls(tree or RankTree(len(addresses)))
        book.add(range(len(addresses)), addresses)
        return book

    @property
    def is_complete(self) -> bool:
        """Whether the address of every rank is known."""
        return self._num_known == self.tree.world_size

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
            self._num_known += 1

    def missing_blocks(self) -> list[int]:
        """Returns the blocks of which an address is not known."""
        tree = self.tree
        return [block for block in range(tree.num_blocks) if self.block(block) is None]

    def block(self, index: int) -> list[SocketAddress] | None:
        """Returns the addresses of a block, or None if one is not known."""
        found = [self.address(rank) for rank in self.tree.group(1, index)]
        known = [each for each in found if each is not None]
        return known if len(known) == len(found) else None


def encode_addresses(addresses: Sequence[SocketAddress]) -> dict[str, Any]:
    """Returns addresses as JSON that names each host once."""
    hosts = list(dict.fromkeys(host for host, _ in addresses))
    numbers = {host: number for number, host in enumerate(hosts)}
    return {
        "hosts": hosts,
        "host_of": [numbers[host] for host, _ in addresses],
        "ports": [port for _, port in addresses],
    }


def decode_addresses(values: dict[str, Any], num_ranks: int) -> list[SocketAddress]:
    """Decodes the JSON of `encode_addresses`.

    Raises:
        MessageError: if a field is missing or invalid, a host is no IP address, or the number differs.
    """
    hosts = [host_of({"host": host}, "host") for host in list_of(values, "hosts", num_ranks)]
    numbers, ports = list_of(values, "host_of", num_ranks), list_of(values, "ports", num_ranks)
    if len(numbers) != num_ranks or len(ports) != num_ranks:
        raise MessageError(f"ports: must be those of {num_ranks} ranks, are {len(ports)} of {len(numbers)}")
    return [
        (hosts[integer_of({"host_of": number}, "host_of", len(hosts))], port_of({"port": port}, "port"))
        for number, port in zip(numbers, ports, strict=True)
    ]


def host_of(values: dict[str, Any], key: str) -> str:
    """Returns a field that must be an IP address: a name would be looked up when a datagram is sent.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    host = values.get(key)
    if not isinstance(host, str) or len(host) > _MAX_HOST_CHARACTERS:
        raise MessageError(f"{key}: not an IP address of at most {_MAX_HOST_CHARACTERS} characters")
    try:
        ip_address(host)
    except ValueError as error:
        raise MessageError(f"{key}: not an IP address") from error
    return host


def port_of(values: dict[str, Any], key: str) -> int:
    """Returns a field that must be a port.

    Raises:
        MessageError: if the field is missing or anything else.
    """
    port = integer_of(values, key, 65536)
    if port == 0:
        raise MessageError(f"{key}: not a port")
    return port
