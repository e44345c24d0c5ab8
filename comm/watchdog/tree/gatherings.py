"""Defines what ranks gather through the store at the start: first nonces, then addresses."""

from collections.abc import Callable, Sequence

from comm.watchdog.authentication import derive
from comm.watchdog.decode import MessageError, text_of
from comm.watchdog.tree.address_book import (
    AddressBook,
    SocketAddress,
    decode_addresses,
    encode_addresses,
    host_of,
    port_of,
)
from comm.watchdog.tree.rank_tree import RankTree
from comm.watchdog.tree.store_gather import Values

_DIGEST_CHARACTERS = 64
_BLOCKS_PER_READ = 64


class NonceGathering:
    """Gather of nonces into a digest of all, which has this rank's nonce in it.

    Attributes:
        name: first part of the records' keys.
        own: this rank's record.
        digest: digest of the nonces of all ranks, after `accept`.
        remote_host: a host of the job that is no loopback address, after `accept`; None if there is none.
    """

    name = "nonce"

    def __init__(self, tree: RankTree, rank: int, key: bytes, host: str, nonce: bytes) -> None:
        """Stores the arguments."""
        self.own: Values = {"host": host, "nonce": nonce.hex()}
        self.digest = b""
        self.remote_host: str | None = None
        self._tree = tree
        self._rank = rank
        self._key = key

    def combine(self, level: int, index: int, records: Sequence[Values]) -> Values:
        """Returns the digests of a group's members and a host among them that is no loopback address."""
        digests = [self._digest_of(level - 1, each).hex() for each in records]
        hosts = [host_of(each, "host") for each in records]
        return {
            "digests": "".join(digests),
            "host": next((host for host in hosts if not is_loopback(host)), hosts[0]),
        }

    def accept(self, path: Sequence[Values]) -> None:
        """Follows the digests from this rank's nonce to the root."""
        digest = self._digest_of(0, self.own)
        for level, record in enumerate(path, 1):
            place = self._rank // self._tree.fanout ** (level - 1) % self._tree.fanout
            digests = text_of(record, "digests", self._tree.fanout * _DIGEST_CHARACTERS)
            size = len(self._tree.group(level, self._rank // self._tree.fanout**level))
            is_whole = len(digests) == size * _DIGEST_CHARACTERS
            if not is_whole or digests[place * _DIGEST_CHARACTERS :][:_DIGEST_CHARACTERS] != digest.hex():
                raise MessageError("digests: without this rank's nonce")
            digest = self._digest_of(level, record)
        host = host_of(path[-1], "host")
        self.digest, self.remote_host = digest, None if is_loopback(host) else host

    def _digest_of(self, level: int, record: Values) -> bytes:
        content = text_of(record, "digests" if level else "nonce", self._tree.fanout * _DIGEST_CHARACTERS)
        return derive(self._key, f"nonces of level {level}", content.encode())


class AddressGathering:
    """Gather of addresses into a book.

    Attributes:
        name: first part of the records' keys.
        own: this rank's record.
        read_blocks: returns the combined records of blocks; set on rank 0, which needs the addresses of all ranks.
    """

    name = "address"
    read_blocks: Callable[[Sequence[int]], list[Values | None]] | None = None

    def __init__(self, book: AddressBook, rank: int, own: SocketAddress) -> None:
        """Stores the arguments; `book` receives the addresses of this rank's groups."""
        self.own: Values = {"host": own[0], "port": own[1]}
        self._book = book
        self._rank = rank
        self._address = own

    def combine(self, level: int, index: int, records: Sequence[Values]) -> Values:
        """Returns the addresses of a block, or those of the leaders of blocks or larger groups."""
        if level == 1:
            return encode_addresses([(host_of(each, "host"), port_of(each, "port")) for each in records])
        if level == self._book.tree.num_levels and self.read_blocks is not None:
            self._add_all(self.read_blocks)
        members = self._book.tree.group(level, index)
        return encode_addresses([
            self._decode(level - 1, member, each)[0] for member, each in zip(members, records, strict=True)
        ])  # fmt: skip

    def accept(self, path: Sequence[Values]) -> None:
        """Adds the addresses of this rank's groups to the book."""
        tree, found, leader = self._book.tree, [], self._address
        for level, record in enumerate(path, 1):
            addresses = self._decode(level, self._rank, record)
            place = self._rank // tree.fanout ** (level - 1) % tree.fanout
            if addresses[place] != leader:
                raise MessageError("ports: without the address of this rank or its leader")
            found.append(addresses)
            leader = addresses[0]
        for level, addresses in enumerate(found, 1):
            self._book.add(tree.group(level, self._rank // tree.fanout**level), addresses)

    def _add_all(self, read_blocks: Callable[[Sequence[int]], list[Values | None]]) -> None:
        """Adds the addresses of all blocks to the book of rank 0, from which the other ranks receive them."""
        missing = self._book.missing_blocks()
        for first in range(0, len(missing), _BLOCKS_PER_READ):
            indices = missing[first : first + _BLOCKS_PER_READ]
            for index, record in zip(indices, read_blocks(indices), strict=True):
                if record is None:
                    raise MessageError(f"level_1/{index}: not authenticated")
                self._book.add(self._book.tree.group(1, index), self._decode(1, index * self._book.tree.fanout, record))

    def _decode(self, level: int, member: int, record: Values) -> list[SocketAddress]:
        tree = self._book.tree
        return decode_addresses(record, len(tree.group(level, member // tree.fanout**level)))


def is_loopback(host: str) -> bool:
    """Returns whether only this machine reaches the host."""
    return host == "::1" or host.startswith("127.")
