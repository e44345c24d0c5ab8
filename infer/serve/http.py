"""Runs the application on uvicorn until a signal, and drains it."""

import asyncio
import logging
import math
import socket
import time
import traceback
from types import FrameType

import uvicorn

from infer.serve.app import Service
from infer.serve.fields import ApiError

EXIT_ENGINE = 1  # the engine failed with an error that has no exit code


class DrainingServer(uvicorn.Server):
    """A server that refuses new requests after a signal, and ends when those in progress have ended.

    A second signal ends those in progress with an error.
    """

    def __init__(self, service: Service, drain_seconds: float) -> None:
        config = uvicorn.Config(
            service.app(), log_level=logging.WARNING, access_log=False, timeout_graceful_shutdown=2, server_header=False
        )
        super().__init__(config)
        logging.getLogger("uvicorn.error").addFilter(_is_no_cancellation)
        self._service = service
        self._drain_seconds = drain_seconds
        self._deadline = math.inf
        self._ends_now = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections, and prints the URL."""
        await super().startup(sockets)
        for bound in sockets or ():
            host, port, *_ = bound.getsockname()
            at = f"[{host}]" if ":" in host else host
            print(f"serving {self._service.served.name} at http://{at}:{port}/v1", flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain, or ends if it drains. uvicorn's own handler would end the process with the signal."""
        self._ends_now = self._service.is_draining
        self._service.is_draining = True

    async def on_tick(self, counter: int) -> bool:
        """Returns whether to end: drained, or too late."""
        service = self._service
        service.engine.fail_if_stalled()
        service.is_draining |= service.engine.failure is not None
        if service.is_draining and self._deadline == math.inf:
            self._deadline = time.monotonic() + self._drain_seconds
            if service.num_calls and service.engine.failure is None:
                service.write_line(f"draining {service.num_calls} requests for at most {self._drain_seconds:g} s")
        if self._ends_now or time.monotonic() > self._deadline:
            service.engine.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
            await asyncio.sleep(0.1)  # until the errors are sent
            return True
        is_idle = service.num_calls == 0 and service.engine.step_began == math.inf
        return await super().on_tick(counter) or (service.is_draining and is_idle)


def _is_no_cancellation(record: logging.LogRecord) -> bool:
    """Returns whether a log record has no traceback of what the end of the server cancelled."""
    return asyncio.CancelledError.__name__ not in f"{record.getMessage()} {record.exc_info}"


def open_socket(host: str, port: int) -> socket.socket:
    """Returns a socket at an address, or raises OSError. It accepts connections once a server listens."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named, or asyncio does not know that its connections are TCP and leaves Nagle's algorithm on: 40 ms for a reply.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except OSError:
        bound.close()
        raise
    return bound


def run_server(service: Service, bound: socket.socket, drain_seconds: float) -> int:
    """Serves at a bound socket, and returns the exit code: 0, or that of the engine's error."""
    server = DrainingServer(service, drain_seconds)
    asyncio.run(server.serve(sockets=[bound]))
    failure = service.engine.failure
    if failure is None:
        return 0
    traceback.print_exception(failure)
    return int(getattr(failure, "exit_code", EXIT_ENGINE))
