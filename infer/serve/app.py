"""The HTTP application: routes, access, streams, limits and shutdown."""

import asyncio
import hmac
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from infer.serve.answers import AnswerBuilder, Reply
from infer.serve.calls import Endpoint, ServedModel, read_call
from infer.serve.engine import EngineThread, Subscription
from infer.serve.fields import ApiError
from infer.serve.metrics import Metrics

MOST_BODY_BYTES = 2**24
_DISCONNECTED = 499  # status of log lines and metrics if the client did not wait for the answer
Result = TypeVar("Result")
Events = AsyncGenerator[AnswerBuilder, None]


class Service:
    """A served model with its engine: answers requests, counts them, and drains."""

    def __init__(
        self, served: ServedModel, engine: EngineThread, *, api_key: str | None, write_line: Callable[[str], None]
    ) -> None:
        """Takes an engine that is not started yet.

        Args:
            api_key: that clients must send; None: none is needed.
            write_line: receives a line about each request, without its text.
        """
        self.served = served
        self.engine = engine
        self.metrics = Metrics()
        self.num_calls = 0  # in progress
        self.is_draining = False
        self._api_key = api_key
        self._write_line = write_line
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Returns the ASGI application. Its lifespan starts and stops the engine."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            self.engine.stop()

        answers = [
            Route(f"/v1/{endpoint}", partial(self._answer, endpoint), methods=["POST"])
            for endpoint in ("completions", "chat/completions")
        ]
        others = [
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _as_response, HTTPException: _as_response, Exception: _as_response}
        return Starlette(routes=[*answers, *others], exception_handlers=handlers, lifespan=lifespan)

    async def _models(self, request: Request) -> Response:
        self._check_access(request)
        served = self.served
        about = {"id": served.name, "object": "model", "created": self._started, "owned_by": "local"}
        model = {**about, "max_model_len": served.max_tokens}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        if name != served.name:
            raise ApiError(404, f"the model {name[:80]!r} does not exist", "model", "model_not_found")
        return JSONResponse(model)

    async def _health(self, request: Request) -> Response:
        failure = self.engine.failure
        state = "draining" if self.is_draining else "ok" if failure is None else f"engine died: {failure}"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(self.metrics.text(self.engine.counts), media_type="text/plain; version=0.0.4")

    def _check_access(self, request: Request) -> None:
        if self._api_key is None:
            return
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(key.encode(), self._api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _answer(self, endpoint: Endpoint, request: Request) -> Response:
        record = _Record(self, endpoint)
        try:
            self._check_access(request)
            if self.is_draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            content = await _read_body(request)
            call = await run_in_threadpool(read_call, self.served, endpoint, content)
            record.reply = Reply(call, self.served)
            events = self._events(record, record.reply, self.engine.submit(call.submissions()))
            if call.is_streamed:
                # A refused request has a status of its error: nothing is sent before the first event.
                first = await _while_connected(request, anext(events))
                return _EventStream(record, record.reply, first, events)
            whole = await _while_connected(request, _collect(record.reply, events))
        except ApiError as error:
            record.end(error.status)
            return _as_response(request, error)
        except BaseException as error:
            record.end(
                500 if isinstance(error, Exception) and not isinstance(error, ClientDisconnect) else _DISCONNECTED
            )
            if not isinstance(error, ClientDisconnect):
                raise
            return Response(status_code=_DISCONNECTED)
        record.end(200)
        return Response(_dump(whole), media_type="application/json")

    async def _events(self, record: "_Record", reply: Reply, subscription: Subscription) -> Events:
        """Yields each answer that grows. Sequences that are not read to their end are cancelled."""
        try:
            async for index, news in subscription.read():
                answer = reply.answers[index]
                if answer.finish is not None:
                    continue
                record.count(index, len(news.tokens))
                answer.push(news)
                if answer.finish is not None and news.finish is None:
                    subscription.cancel(index)  # a stop string ended it
                yield answer
        finally:
            subscription.cancel()

    def finish_call(self, record: "_Record", status: int) -> None:
        """Counts a call that has ended, and reports it in one line."""
        self.num_calls -= 1
        self.metrics.requests[(record.endpoint, status)] += 1
        usage = {"prompt_tokens": 0, "completion_tokens": 0} if record.reply is None else record.reply.usage
        self.metrics.tokens["prompt"] += usage["prompt_tokens"]
        self.metrics.tokens["completion"] += usage["completion_tokens"]
        name = "-" if record.reply is None else record.reply.id
        seconds = time.monotonic() - record.began
        tokens = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        self._write_line(f"{name} {record.endpoint} {status}, {tokens}, {seconds:.3f} s")


class _Record:
    """Times of a call in progress."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.reply: Reply | None = None
        self.began = time.monotonic()
        self._service = service
        self._last: dict[int, float] = {}  # time of the last token, by answer
        self._is_ended = False
        service.num_calls += 1

    def count(self, index: int, num_tokens: int) -> None:
        """Records the times of new tokens."""
        now = time.monotonic()
        metrics = self._service.metrics
        if num_tokens and index not in self._last:
            metrics.first_token_seconds.add(now - self.began)
        elif num_tokens:
            metrics.token_seconds.add((now - self._last[index]) / num_tokens)
        if num_tokens:
            self._last[index] = now

    def end(self, status: int) -> None:
        """Reports the call, once."""
        if not self._is_ended:
            self._is_ended = True
            self._service.finish_call(self, status)


class _EventStream(StreamingResponse):
    """Server-sent events of a call whose first tokens have arrived."""

    def __init__(self, record: _Record, reply: Reply, first: AnswerBuilder, events: Events) -> None:
        super().__init__(self._content(first), media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._record = record
        self._reply = reply
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            # Reached also if the client has disconnected: the generator cancels its sequences.
            await self._events.aclose()
            self._record.end(_DISCONNECTED)

    async def _content(self, first: AnswerBuilder) -> AsyncIterator[bytes]:
        reply = self._reply
        try:
            async for answer in _chain(first, self._events):
                choice = answer.take()
                if choice is not None:
                    yield _event(reply.event(choice))
            for event in reply.last_events():
                yield _event(event)
            yield b"data: [DONE]\n\n"
            self._record.end(200)
        except ApiError as error:
            self._record.end(error.status)
            yield _event(error.values)


async def _chain(first: AnswerBuilder, events: Events) -> Events:
    yield first
    async for answer in events:
        yield answer


async def _collect(reply: Reply, events: Events) -> dict[str, Any]:
    async for _ in events:
        pass
    return reply.whole()


async def _while_connected(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """Returns the result of a coroutine, which is cancelled if the client disconnects: ClientDisconnect."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _read_body(request: Request) -> bytes:
    content = bytearray()
    async for part in request.stream():
        content += part
        if len(content) > MOST_BODY_BYTES:
            raise ApiError(413, f"the body must have at most {MOST_BODY_BYTES} bytes", code="body_too_large")
    return bytes(content)


def _as_response(request: Request, error: Exception) -> Response:
    """Returns the response of an error, in OpenAI's form."""
    headers = None
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    if not isinstance(error, ApiError):
        error = ApiError(500, "the server failed; its log has the reason", code="internal_error")
    if error.status == 429:
        headers = {"retry-after": "1"}
    return JSONResponse(error.values, error.status, headers)


def _event(values: dict[str, Any]) -> bytes:
    return b"data: " + _dump(values) + b"\n\n"


def _dump(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
