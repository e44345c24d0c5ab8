"""TCP ports for jobs with a rendezvous."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """Yields a port of loopback that only a server which reuses addresses can take, until the block ends.

    A port that was free a moment ago may be taken by any outgoing connection, but no connection gets the port of a
    bound socket. TCPStore and torchrun can still listen there: they set SO_REUSEADDR, and this socket does not listen.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
