"""TCP ports for jobs with a rendezvous."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yields a loopback port that only a server with SO_REUSEADDR can use, until the block ends.

    Any outgoing connection can take a free port, but never the port of a bound socket. TCPStore and torchrun can still
    listen on it, because they set SO_REUSEADDR and this socket does not listen.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
