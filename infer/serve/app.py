"""The HTTP application: routes, access, streams, limits and shutdown."""

import asyncio
import hmac
import json
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast, get_args

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, Counter, Histogram, generate_latest
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from base.prometheus import Gauges
from infer.serve.answers import Reply
from infer.serve.calls import CONVERSIONS, Endpoint, ServedModel, convert, read_call
from infer.serve.engine import EngineThread, Subscription
from infer.serve.fields import ApiError, internal_error
from infer.serve.responses import ResponseReply

MOST_BODY_BYTES = 2**24
_SMALL_BYTES = 2**16  # size of bodies of which any number may arrive
_LARGE_BYTES = 2**20  # size above which bodies are decoded one at a time
MOST_BODIES_BYTES = 2**27  # of all bodies that are not small
BODY_SECONDS = 60.0
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_PAGE_POLICY = "default-src 'none'; connect-src 'self'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"
_DISCONNECTED = 499  # status of log lines and metrics if the client did not wait for the answer


class Metrics:
    """Counters and histograms of a server. A request has the status 499 if its client disconnected."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        self._registry = registry
        self.requests = Counter(
            "serve_requests", "Requests by endpoint and HTTP status.", ["endpoint", "status"], registry=registry
        )
        self.tokens = {
            kind: Counter(f"serve_{kind}_tokens", f"Tokens of requests: {kind}.", registry=registry)
            for kind in ("prompt", "completion")
        }
        self.first_token_seconds = Histogram(
            "serve_first_token_seconds", "Time to the first token.", buckets=_SECONDS, registry=registry
        )
        self.token_seconds = Histogram(
            "serve_token_seconds", "Time between tokens.", buckets=_SECONDS, registry=registry
        )

    def text(self, counts: Mapping[str, int]) -> bytes:
        """Returns all samples, with the counts of an engine."""
        engine = CollectorRegistry()
        engine.register(Gauges("serve_engine", "Of the engine", counts, {}))
        return generate_latest(self._registry) + generate_latest(engine)


class Service:
    """A served model with its engine: answers requests, counts them, and drains."""

    def __init__(
        self,
        served: ServedModel,
        engine: EngineThread,
        *,
        api_key: str | None,
        write_line: Callable[[str], None],
        cors_origins: Sequence[str] = (),
    ) -> None:
        """Takes an engine that is not started yet.

        Args:
            api_key: that clients must send; None: none is needed.
            write_line: receives a line about each request, without its text.
            cors_origins: origins of pages that may read answers.
        """
        self.served = served
        self.engine = engine
        self.metrics = Metrics()
        self.bodies_bytes = 0  # of bodies that are not small
        self.decoding_large = asyncio.Lock()
        self.num_calls = 0  # in progress, without those whose body has not arrived
        self.is_draining = False
        self._api_key = api_key
        self._cors_origins = cors_origins
        self.write_line = write_line
        self._started = int(time.time())

    def app(self) -> Starlette:
        """Returns the ASGI application. Its lifespan starts and stops the engine."""

        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            self.engine.start()
            yield
            self.engine.stop()
            self.served.grammars.close()

        answers = [
            Route(f"/v1/{endpoint}", partial(self._answer, endpoint), methods=["POST"])
            for endpoint in get_args(Endpoint)
        ]
        answers += [Route(f"/{name}", partial(self._answer, name), methods=["POST"]) for name in CONVERSIONS]
        others = [
            Route("/", _page, methods=["GET"]),
            Route("/version", _version, methods=["GET"]),
            Route("/v1/models", self._models, methods=["GET"]),
            Route("/v1/models/{name:path}", self._models, methods=["GET"]),
            Route("/health", self._health, methods=["GET"]),
            Route("/metrics", self._metrics, methods=["GET"]),
        ]
        handlers: dict[Any, Any] = {ApiError: _as_response, HTTPException: _as_response, Exception: _as_response}
        app = Starlette(routes=[*answers, *others], exception_handlers=handlers, lifespan=lifespan)
        if self._cors_origins:
            app.add_middleware(
                CORSMiddleware, allow_origins=self._cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"]
            )
        return app

    async def _models(self, request: Request) -> Response:
        self.check_access(request)
        served = self.served
        about = {"id": served.name, "object": "model", "created": self._started, "owned_by": "local"}
        model = {**about, "max_model_len": served.max_tokens}
        name = request.path_params.get("name")
        if name is None:
            return JSONResponse({"object": "list", "data": [model]})
        served.check_name(name)
        return JSONResponse(model)

    async def _health(self, request: Request) -> Response:
        error = self.engine.error
        state = error.message if error is not None else "draining" if self.is_draining else "ok"
        return JSONResponse({"status": state}, 200 if state == "ok" else 503)

    async def _metrics(self, request: Request) -> Response:
        return Response(self.metrics.text(self.engine.counts), media_type=CONTENT_TYPE_PLAIN_0_0_4)

    def check_access(self, request: Request) -> None:
        """Raises ApiError without the API key that clients must send."""
        if self._api_key is None:
            return
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.encode(), self._api_key.encode()):
            raise ApiError(401, "the API key is missing or wrong", code="invalid_api_key")

    async def _answer(self, endpoint: str, request: Request) -> "_Call":
        return _Call(self, endpoint, request)


class _Call:
    """A call in progress: the ASGI application that reads it, answers it and counts it."""

    def __init__(self, service: Service, endpoint: str, request: Request) -> None:
        self._service = service
        self._endpoint = endpoint
        self._request = request
        self._reply: Reply | None = None
        self._began = time.monotonic()
        self._last: dict[int, float] = {}  # time of the last token, by answer
        self._is_streaming = False
        self._has_begun = False  # whether its body has arrived

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the answer or an error. If the client disconnects, its sequences are cancelled."""
        status = _DISCONNECTED
        try:
            content = await self._answer(send)
            status = 200
        except ApiError as error:
            status = error.status
            if not self._is_streaming:
                await _as_response(self._request, error)(scope, receive, send)
                return
            assert self._reply is not None
            content = _event(self._reply.error_event(error))
        except ClientDisconnect:
            return
        except Exception:
            status = 500
            raise
        finally:
            self._count_call(status)
        if self._is_streaming:
            await send({"type": "http.response.body", "body": content})
        else:
            await Response(content, media_type="application/json")(scope, receive, send)

    async def _answer(self, send: Send) -> bytes:
        """Returns the whole answer, or the end of a stream after its other events were sent."""
        service = self._service
        service.check_access(self._request)
        async with self._read_body() as content:
            if service.is_draining:
                raise ApiError(503, "the server is shutting down", code="shutting_down")
            service.num_calls += 1
            self._has_begun = True
            async with service.decoding_large if len(content) > _LARGE_BYTES else nullcontext():
                if self._endpoint in CONVERSIONS:
                    return _dump(await run_in_threadpool(convert, service.served, self._endpoint, content))
                call = await run_in_threadpool(read_call, service.served, cast("Endpoint", self._endpoint), content)
        reply = (Reply if call.response is None else ResponseReply)(call, service.served)
        self._reply = reply
        await _while_connected(self._request, self._continue(reply, send))
        if not call.is_streamed:
            return _dump(reply.whole())
        end = b"data: [DONE]\n\n" if call.response is None else b""
        return b"".join((*map(_event, reply.last_events()), end))

    @asynccontextmanager
    async def _read_body(self) -> AsyncIterator[bytes]:
        """Yields the body; its bytes count until the end of the context."""
        service = self._service
        content = bytearray()
        counted = 0
        too_large = ApiError(413, f"the body must have at most {MOST_BODY_BYTES} bytes", code="body_too_large")
        if int(self._request.headers.get("content-length", 0)) > MOST_BODY_BYTES:
            raise too_large
        try:
            try:
                async with asyncio.timeout(BODY_SECONDS):
                    async for part in self._request.stream():
                        content += part
                        if len(content) > MOST_BODY_BYTES:
                            raise too_large
                        fresh = len(content) - counted if len(content) > _SMALL_BYTES else 0
                        counted += fresh
                        service.bodies_bytes += fresh
                        if service.bodies_bytes > MOST_BODIES_BYTES:
                            raise ApiError(503, "other large bodies arrive; try again later", code="too_many_bodies")
            except TimeoutError as error:
                raise ApiError(408, f"the body must arrive within {BODY_SECONDS} s", code="body_too_slow") from error
            yield bytes(content)
        finally:
            service.bodies_bytes -= counted

    async def _continue(self, reply: Reply, send: Send) -> None:
        """Lets the engine complete all answers within their grammar, if they have one."""
        service = self._service
        async with service.served.grammars.open(reply.call.structure) as constraint:
            subscription = service.engine.submit(reply.call.submissions(constraint))
            try:
                await self._follow(reply, subscription, send)
            finally:
                subscription.cancel()

    async def _follow(self, reply: Reply, subscription: Subscription, send: Send) -> None:
        """Completes all answers, and sends what is new in a stream."""
        async for index, news in subscription.read():
            answer = reply.answers[index]
            if answer.finish is not None:
                continue
            self._count_tokens(index, len(news.tokens))
            answer.push(news)
            if answer.finish is not None and news.finish is None:
                subscription.cancel(index)  # a stop string ended it
            choice = answer.take() if reply.call.is_streamed else None
            if choice is None:
                continue
            if not self._is_streaming:
                # A refused request has a status of its error: nothing is sent before the first event.
                self._is_streaming = True
                begin = StreamingResponse((), headers={"cache-control": "no-cache"}, media_type="text/event-stream")
                await send({"type": "http.response.start", "status": 200, "headers": begin.raw_headers})
            await send(
                {"type": "http.response.body", "body": b"".join(map(_event, reply.events(choice))), "more_body": True}
            )

    def _count_tokens(self, index: int, num_tokens: int) -> None:
        """Records the times of new tokens of an answer."""
        if not num_tokens:
            return
        now = time.monotonic()
        metrics = self._service.metrics
        if index in self._last:
            metrics.token_seconds.observe((now - self._last[index]) / num_tokens)
        else:
            metrics.first_token_seconds.observe(now - self._began)
        self._last[index] = now

    def _count_call(self, status: int) -> None:
        """Counts a call that has ended, and reports it in one line."""
        service = self._service
        service.num_calls -= self._has_begun
        service.metrics.requests.labels(self._endpoint, status).inc()
        usage = defaultdict[str, int](int) if self._reply is None else self._reply.usage
        for kind, counter in service.metrics.tokens.items():
            counter.inc(usage[f"{kind}_tokens"])
        name = "-" if self._reply is None else self._reply.id
        tokens = f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out"
        service.write_line(f"{name} {self._endpoint} {status}, {tokens}, {time.monotonic() - self._began:.3f} s")


async def _while_connected(request: Request, work: Coroutine[Any, Any, None]) -> None:
    """Runs a coroutine, which is cancelled if the client disconnects: ClientDisconnect."""
    task = asyncio.ensure_future(work)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait((task, disconnect), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        task.result()
    finally:
        task.cancel()
        disconnect.cancel()
        await asyncio.gather(task, disconnect, return_exceptions=True)


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _as_response(request: Request, error: Exception) -> Response:
    """Returns the response of an error, in OpenAI's form."""
    headers = None
    if isinstance(error, HTTPException):
        headers = dict(error.headers or {})
        error = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}")
    if not isinstance(error, ApiError):
        error = internal_error(500, "the server failed", "internal_error", repr(error))
    if error.status == 429:
        headers = {"retry-after": "1"}
    return JSONResponse(error.values, error.status, headers)


async def _page(request: Request) -> Response:
    content = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return HTMLResponse(content, headers={"content-security-policy": _PAGE_POLICY})


async def _version(request: Request) -> Response:
    try:
        return JSONResponse({"version": version("dualpipe-trainer")})
    except PackageNotFoundError:  # a checkout whose environment has only the dependencies
        return JSONResponse({"version": "unknown"})


def _event(values: dict[str, Any]) -> bytes:
    name = f"event: {values['type']}\n" if "type" in values else ""
    return name.encode() + b"data: " + _dump(values) + b"\n\n"


def _dump(values: dict[str, Any]) -> bytes:
    return json.dumps(values, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
