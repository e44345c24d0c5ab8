"""Runs the application on uvicorn until a signal, and drains it."""

import asyncio
import json
import logging
import math
import os
import resource
import socket
import time
import traceback
from functools import partial
from operator import attrgetter
from types import FrameType
from typing import Any

import uvicorn
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from infer.serve.app import Service
from infer.serve.constraint import MOST_DESCRIPTORS
from infer.serve.fields import ApiError

EXIT_ENGINE = 1  # the engine failed with an error that has no exit code
HEADER_SECONDS = 10.0  # for the header of a request
READ_SECONDS = 30.0  # for 48 KiB of an answer
_LINGER_SECONDS = 1.0  # after a refusal
_LEAST_CONNECTIONS = 16
_ACCEPTED = 16  # connections that are accepted before they are counted
_BACKLOG = 2048  # connections that the system keeps until they are accepted


class LimitedConnection(H11Protocol):
    """A connection with limits of time. If there are too many, the oldest that waits for its client ends."""

    def __init__(self, most: int, **options: Any) -> None:
        """Takes the maximum number of connections, and uvicorn's options."""
        super().__init__(**options)
        self._most = most
        self._began = self.loop.time()
        self._is_refused = False
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @property
    def is_between(self) -> bool:
        """Whether no request is in progress."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Ends the oldest connection without a request, or without all of its body, if there are too many."""
        super().connection_made(transport)
        self._watch_header()
        if len(self.connections) <= self._most:
            return
        waiting = [other for other in self.connections if other.is_waiting]  # type: ignore[union-attr]
        oldest = min(waiting, key=attrgetter("is_sending", "_began"), default=self)
        self.connections.discard(oldest)
        oldest.end(503, "the server has too many connections; try again later", "too_many_connections")  # type: ignore[union-attr]
        oldest.transport.abort()

    @property
    def is_sending(self) -> bool:
        """Whether the body of a request arrives."""
        return not self.is_between and bool(self.cycle.more_body)

    @property
    def is_waiting(self) -> bool:
        """Whether the client is expected to send something."""
        return self._is_refused or self.is_between or self.is_sending

    def end(self, status: int, message: str, code: str) -> None:
        """Ends the connection, with an error if a request has begun that has no answer yet."""
        if self._is_refused or (self.is_between and not self.conn.trailing_data[0]):
            self.transport.abort()
        else:
            self._refuse(status, message, code)

    def _refuse(self, status: int, message: str, code: str) -> None:
        if not self.is_between:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self.is_between or not self.cycle.response_started:
            content = json.dumps(ApiError(status, message, code=code).values)
            head = f"HTTP/1.1 {status} \r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
            self.transport.write(f"{head}\r\nconnection: close\r\n\r\n{content}".encode())
        # What still arrives is dropped: data that is not read would reset the connection, and the error would be lost.
        self._is_refused = True
        self.transport.write_eof()
        self.loop.call_later(_LINGER_SECONDS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        """Reads a part of a request."""
        if not self._is_refused:
            super().data_received(data)
            self._watch_header()

    def send_400_response(self, msg: str) -> None:
        """Refuses what is no HTTP."""
        self._refuse(400, msg, "invalid_http")

    def on_response_complete(self) -> None:
        """Waits for the next request."""
        super().on_response_complete()
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stops all timers."""
        super().connection_lost(exc)
        for name in list(self._timers):
            self._stop(name)

    def pause_writing(self) -> None:
        """Limits the time for which the client does not read."""
        super().pause_writing()
        self._timers["answer"] = self.loop.call_later(READ_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """Continues to write."""
        super().resume_writing()
        self._stop("answer")

    def _watch_header(self) -> None:
        """Limits the time until the next header is complete, also for the rest of a body that is not read."""
        if self._is_refused or not self.is_between:
            self._stop("header")
        elif "header" not in self._timers:
            message = f"the header must arrive within {HEADER_SECONDS:g} s"
            end = partial(self.end, 408, message, "header_too_slow")
            self._timers["header"] = self.loop.call_later(HEADER_SECONDS, end)

    def _stop(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()


def _most_connections() -> int:
    """Returns how many connections the descriptors allow, next to those of files and grammars."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    num_open = len(os.listdir("/dev/fd"))
    return max(_LEAST_CONNECTIONS, limit - num_open - MOST_DESCRIPTORS - 4 * _ACCEPTED)


def _refuse_ambiguous(app: ASGIApp) -> ASGIApp:
    """Returns an application that refuses other versions, and bodies that a proxy may end elsewhere."""

    async def check(scope: Scope, receive: Receive, send: Send) -> None:
        names = {name for name, _ in scope.get("headers", ())}
        version = scope.get("http_version", "1.1")
        error = None
        if version not in ("1.0", "1.1"):
            error = ApiError(400, f"the version must be HTTP/1.1 or HTTP/1.0, is HTTP/{version}")
        elif b"transfer-encoding" in names and (b"content-length" in names or version != "1.1"):
            error = ApiError(400, "a body must have either Content-Length or, in HTTP/1.1, Transfer-Encoding")
        refusal = None if error is None else JSONResponse(error.values, error.status, {"connection": "close"})
        await (refusal or app)(scope, receive, send)

    return check


class _LogLimit(logging.Filter):
    """Passes one record a second, without tracebacks of what a client or the end of the server causes."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -math.inf

    def filter(self, record: logging.LogRecord) -> bool:
        """Returns whether a record is printed."""
        now = time.monotonic()
        is_end = asyncio.CancelledError.__name__ in f"{record.getMessage()} {record.exc_info}"
        if is_end or now < self._last + 1:
            return False
        self._last = now
        if record.exc_info and isinstance(record.exc_info[1], OSError):
            record.msg = f"{record.getMessage().splitlines()[0]}: {record.exc_info[1]}"
            record.args = record.exc_info = None
        return True


class DrainingServer(uvicorn.Server):
    """A server that refuses new requests after a signal, and ends when those in progress have ended.

    A second signal ends those in progress with an error.
    """

    def __init__(self, service: Service, drain_seconds: float) -> None:
        config = uvicorn.Config(
            _refuse_ambiguous(service.app()),
            http=partial(LimitedConnection, _most_connections()),  # type: ignore[arg-type]
            ws="none",
            log_level=logging.WARNING,
            access_log=False,
            timeout_graceful_shutdown=2,
            server_header=False,
            backlog=_ACCEPTED,
        )
        super().__init__(config)
        for name in ("uvicorn.error", "asyncio"):
            logging.getLogger(name).addFilter(_LogLimit())
        self._service = service
        self._drain_seconds = drain_seconds
        self._deadline = math.inf
        self._ends_now = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Starts to accept connections, and prints the URL."""
        await super().startup(sockets)
        for bound in sockets or ():
            bound.listen(_BACKLOG)  # uvicorn's `backlog` is also how many it accepts at once
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
            service.served.grammars.is_draining = True
            if service.num_calls and service.engine.failure is None:
                service.write_line(f"draining {service.num_calls} requests for at most {self._drain_seconds:g} s")
        if self._ends_now or time.monotonic() > self._deadline:
            service.engine.fail_all(ApiError(503, "the server is shutting down", code="shutting_down"))
            await asyncio.sleep(0.1)  # until the errors are sent
            return True
        is_idle = service.num_calls == 0 and service.engine.step_began == math.inf
        return await super().on_tick(counter) or (service.is_draining and is_idle)


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
    if not hasattr(failure, "exit_code"):
        traceback.print_exception(failure)
    return int(getattr(failure, "exit_code", EXIT_ENGINE))
