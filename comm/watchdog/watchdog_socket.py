"""Sends and receives authenticated datagrams of watchdogs, separately from the job's other traffic."""

import os
import selectors
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from comm.watchdog.messages import AddressBook
from comm.watchdog.ranks import RankTree
from comm.watchdog.wire import MAX_DATAGRAM_BYTES, Datagram, DatagramCodec, Kind, MessageError, SocketAddress

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
