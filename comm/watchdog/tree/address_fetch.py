"""Fetches the addresses of all blocks as datagrams after the start of the job.

The addresses come down the tree from rank 0. A request names a block, and the reply holds up to 16 consecutive blocks
as far as the sender knows them. A job of one block sends nothing, because its ranks have all addresses from the start.
"""

from collections.abc import Callable, Mapping
from itertools import cycle
from typing import Any

from comm.watchdog.decode import MessageError, integer_of, list_of, object_of
from comm.watchdog.messages import Addresses, AddressRequest
from comm.watchdog.tree.address_book import AddressBook, decode_addresses, encode_addresses

MAX_BLOCKS = 16
_RETRY_SECONDS = 0.3
_LONGEST_RETRY_SECONDS = 10.0
_TRIES_PER_SOURCE = 3

Send = Callable[[int, Any, Mapping[str, Any]], None]


class AddressFetch:
    """Fetch of the addresses that one rank does not have yet. Used on one thread."""

    def __init__(self, rank: int, book: AddressBook, send: Send) -> None:
        """Prepares the fetch.

        Args:
            book: addresses that are known; receives the others.
            send: sends a message to a rank.
        """
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
            self._source, self._num_tries = next(self._sources), 0
            self._retry_seconds = min(2 * self._retry_seconds, _LONGEST_RETRY_SECONDS)
        self._num_tries += 1
        self._retry_at = now + self._retry_seconds
        self._send(self._source, "address_request", {"block": self._missing[0]})

    def handle(self, message: AddressRequest | Addresses) -> dict[str, Any] | None:
        """Handles a message of another rank, and returns the reply if it is a request.

        Raises:
            MessageError: if a field is missing or invalid, or the requested addresses are not known here.
        """
        if isinstance(message, AddressRequest):
            return addresses_from(self._book, message.values)
        self._take(message.values)
        return None

    def _take(self, values: Mapping[str, Any]) -> None:
        tree = self._book.tree
        block = integer_of(values, "block", tree.num_blocks)
        records = list_of(values, "blocks", min(MAX_BLOCKS, tree.num_blocks - block))
        for index, record in enumerate(records, block):
            if record is not None:
                ranks = tree.group(1, index)
                self._book.add(ranks, decode_addresses(object_of(record, "blocks"), len(ranks)))
        received = range(block, block + len(records))
        left = [index for index in self._missing if index not in received or self._book.block(index) is None]
        if len(left) < len(self._missing):
            self._num_tries, self._retry_at, self._retry_seconds = 0, 0.0, _RETRY_SECONDS
        self._missing = left


def addresses_from(book: AddressBook, values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the reply to a request: the named block and those after it, None for one that is not known.

    Raises:
        MessageError: if a field of the request is missing or invalid.
    """
    first = integer_of(values, "block", book.tree.num_blocks)
    blocks = [book.block(index) for index in range(first, min(first + MAX_BLOCKS, book.tree.num_blocks))]
    if not any(blocks):
        raise MessageError("block: its addresses are not known here yet")
    return {"block": first, "blocks": [None if block is None else encode_addresses(block) for block in blocks]}
