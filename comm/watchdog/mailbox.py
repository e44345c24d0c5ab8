"""How ranks' watches talk: small datagrams beside the job's own traffic, readable by this job alone."""

import json
import os
import selectors
import socket
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["question", "answer", "verdict", "farewell"]
Address = tuple[str, int]

_MAX_BYTES = 65507


@dataclass(frozen=True, slots=True)
class Mail:
    """What came: from which rank, sent from where."""

    kind: Kind
    rank: int
    body: dict[str, Any]
    sender: Address


class Mailbox:
    """One rank's socket, and those by which it asks a rank that does not answer whether anybody is there.

    A datagram to an open port of a process that is stopped is kept, to a machine that is cut off is lost, and to a
    port that nobody holds any more is refused: the kernel tells a socket that is bound to that peer. The longest mail,
    which names every rank of a few groups, fits a datagram for jobs of up to some 3000 ranks.
    """

    def __init__(self, rank: int, reach: str) -> None:
        """Opens the socket.

        Args:
            rank: of this process.
            reach: a host by the way to which the other ranks are reached.

        Raises:
            OSError: there is no such host.
        """
        family, _, _, _, address = socket.getaddrinfo(reach, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            self.host = str(probe.getsockname()[0])
        self._reach = str(address[0])
        self._rank = rank
        self._family = family
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        self._socket.bind(("", 0))
        self._socket.setblocking(False)
        self._wakeups, self._wake = socket.socketpair()
        self._wakeups.setblocking(False)
        self._wake.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._socket, selectors.EVENT_READ)
        self._selector.register(self._wakeups, selectors.EVENT_READ)
        self._doorbells: dict[int, socket.socket] = {}
        self._peers: dict[int, Address] = {}
        self._job = ""
        self.refused: set[int] = set()

    @property
    def address(self) -> str:
        """For the other ranks' `open`."""
        return f"{self._socket.getsockname()[1]} {self.host}"

    @property
    def peers(self) -> frozenset[int]:
        """The other ranks."""
        return frozenset(self._peers)

    @property
    def wakeup_file(self) -> int:
        """A byte written here ends `receive`."""
        return self._wake.fileno()

    def open(self, addresses: Sequence[str], job: str) -> None:
        """Learns where the ranks are.

        Args:
            addresses: of all ranks, in order.
            job: a secret of the job; mail without it is thrown away.
        """
        self._job = job
        for rank, text in enumerate(addresses):
            port, _, host = text.partition(" ")
            # A rank beside the host by which all are reached sees itself at an address that only its machine knows.
            is_far = _is_loopback(host) and not _is_loopback(self.host)
            if rank != self._rank:
                self._peers[rank] = (self._reach if is_far else host, int(port))

    def send(self, rank: int, kind: Kind, body: Mapping[str, Any]) -> None:
        """To one rank. What cannot be sent is lost, as any datagram may be."""
        self.reply(self._peers[rank], kind, body)

    def reply(self, address: Address, kind: Kind, body: Mapping[str, Any]) -> None:
        """To where a mail came from."""
        try:
            self._socket.sendto(self._encode(kind, body), address)
        except OSError:
            return

    def ring(self, rank: int) -> None:
        """Asks by a socket that learns whether the peer's port is refused; what it answers comes as any mail."""
        try:
            if rank not in self._doorbells:
                self._doorbells[rank] = self._open_bell(self._peers[rank])
            self._doorbells[rank].send(self._encode("question", {}))
        except ConnectionRefusedError:
            self.refused.add(rank)
        except OSError:  # more silent ranks than files that a process may open, or a network that is down
            self.send(rank, "question", {})

    def hang_up(self) -> None:
        """Closes what `ring` opened and forgets who refused."""
        for bell in self._doorbells.values():
            self._selector.unregister(bell)
            bell.close()
        self._doorbells.clear()
        self.refused.clear()

    def receive(self, seconds: float) -> tuple[list[Mail], bytes]:
        """Mail, and bytes written to `wakeup_file`, as soon as there are any and at most after `seconds`."""
        mails: list[Mail] = []
        woken = b""
        for key, _ in self._selector.select(seconds):
            if key.fileobj is self._wakeups:
                woken += self._wakeups.recv(64)
                continue
            mails += self._read(key.fileobj)  # type: ignore[arg-type]
        return mails, woken

    def wake(self) -> None:
        """Ends `receive` now."""
        try:
            os.write(self.wakeup_file, b"\0")
        except BlockingIOError:
            return

    def close(self) -> None:
        """Closes all sockets."""
        self.hang_up()
        self._selector.close()
        for each in (self._socket, self._wakeups, self._wake):
            each.close()

    def _open_bell(self, address: Address) -> socket.socket:
        bell = socket.socket(self._family, socket.SOCK_DGRAM)
        bell.setblocking(False)
        bell.connect(address)
        self._selector.register(bell, selectors.EVENT_READ)
        return bell

    def _read(self, source: socket.socket) -> list[Mail]:
        mails: list[Mail] = []
        while True:
            try:
                data, sender = source.recvfrom(_MAX_BYTES)
            except BlockingIOError:
                return mails
            except ConnectionRefusedError:
                self.refused |= {rank for rank, bell in self._doorbells.items() if bell is source}
                return mails
            except OSError:
                return mails
            mail = self._decode(data, sender[:2])
            if mail is not None:
                mails.append(mail)

    def _encode(self, kind: Kind, body: Mapping[str, Any]) -> bytes:
        return self._job.encode() + zlib.compress(json.dumps([kind, self._rank, body]).encode(), 1)

    def _decode(self, data: bytes, sender: Address) -> Mail | None:
        job = self._job.encode()
        if not data.startswith(job):
            return None
        kind, rank, body = json.loads(zlib.decompress(data[len(job) :]))
        return Mail(kind, rank, body, sender)


def _is_loopback(host: str) -> bool:
    return host == "::1" or host.startswith("127.")
