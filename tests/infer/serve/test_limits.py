"""What a server refuses, and how it ends: errors in OpenAI's form, limits, clients that disconnect, signals."""

import asyncio
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
import psutil
import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from base.refusal import ConfigError
from infer.config import GenerateError
from infer.continuous import SequenceUpdate
from infer.serve.app import MOST_BODY_BYTES, Service
from infer.serve.engine import EngineThread
from infer.serve.http import open_socket, run_server
from launch.generate import Prompt, Transcript
from launch.serve import API_KEY, main
from tests import ROOT
from tests.infer.continuing import generate
from tests.infer.models import make_model
from tests.infer.serve.servers import (
    MODEL,
    MOST_OPEN,
    TOKENIZER,
    RunningServer,
    describe,
    make_engine,
    save_weights,
    serving,
)

COMPLETION: dict[str, Any] = {"prompt": "hello", "max_tokens": 4}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
WRONG: tuple[Any, ...] = (
    *(True, -1, 3.5, 10**30, 1e400, float("nan"), "", "x" * 99, "\ud800"),
    *([], [[]], [None], {}, {"a": 1}, {"type": "x"}),
    *([{"role": "user"}], [[1, "a"]], [-1], [10**9], [{"role": "robot", "content": "a"}], ["", 3]),
)
_FIELDS = (
    "model prompt messages temperature top_p top_k min_p presence_penalty logit_bias seed frequency_penalty "
    "repetition_penalty n best_of stop stop_token_ids stream_options logprobs top_logprobs echo max_tokens "
    "tools tool_choice response_format structured_outputs suffix guided_json guided_regex guided_choice "
    "chat_template_kwargs stream"
)
FIELDS = _FIELDS.split()
RAW = (
    *(b"", b"{", b"[]", b"null", b"\xff\xfe"),
    *(b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "\\ud800"}', b"[" * 10**5),
    *(b'{"metadata": ' + b'{"a":' * 500 + b"1" + b"}" * 501, b'{"seed": ' + b"9" * 5000 + b"}"),
    *(b'{"n": 1e999}', b"\0"),
)


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    torch.set_num_threads(1)
    with serving(make_engine()) as running:
        yield running


def bodies(count: int) -> Iterator[tuple[str, bytes]]:
    """Yields endpoints and bodies that are wrong, most in one field."""
    draw = random.Random(0)
    for content in RAW:
        yield draw.choice(["completions", "chat/completions"]), content
    for _ in range(count - len(RAW)):
        endpoint, body = draw.choice([("completions", COMPLETION), ("chat/completions", CHAT)])
        changed = {**body, draw.choice(FIELDS): draw.choice(WRONG)}
        yield endpoint, json.dumps(changed, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")


def test_200_wrong_bodies_are_refused_in_the_form_of_openai(server: RunningServer) -> None:
    """A few of the values are valid by chance; none of the others is an error of the server."""
    statuses: list[int] = []
    with httpx.Client(base_url=server.url) as client:
        for endpoint, content in bodies(260):
            response = client.post(f"/v1/{endpoint}", content=content)
            statuses.append(response.status_code)
            if response.status_code == 200:
                continue
            assert 400 <= response.status_code < 500, (endpoint, content[:200], response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, content[:200]
            assert isinstance(error["message"], str)
            assert error["message"]
    assert sum(status != 200 for status in statuses) >= 200
    assert all(status != 200 for status in statuses[: len(RAW)])


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/completions", 405), ("POST", "/v1/models", 405), ("GET", "/v2", 404), ("GET", "/v1/models/x", 404)],
)
def test_unknown_routes_have_errors_of_the_same_form(
    server: RunningServer, method: str, path: str, status: int
) -> None:
    response = httpx.request(method, server.url + path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_too_large_body_is_refused(server: RunningServer) -> None:
    response = httpx.post(f"{server.url}/v1/completions", content=b" " * (MOST_BODY_BYTES + 1))
    assert response.status_code == 413
    assert response.json()["error"]["code"] == "body_too_large"


def test_names_and_numbers_of_large_bodies_are_refused_in_a_short_message(server: RunningServer) -> None:
    for body in ({"k" * 10**6: 1}, {"prompt": ["a"] * 10**5}):
        message = httpx.post(f"{server.url}/v1/completions", json=body).json()["error"]["message"]
        assert len(message) < 1000


def test_long_prompt_is_refused_before_it_is_encoded_while_others_are_answered(server: RunningServer) -> None:
    """15 MB took 11 s of a CPU and 2.5 GiB."""
    content = json.dumps({"prompt": "hello, world " * 1_200_000}).encode()
    answers: list[httpx.Response] = []
    url = f"{server.url}/v1/completions"
    long = threading.Thread(target=lambda: answers.append(httpx.post(url, content=content, timeout=60)))
    began = time.process_time()
    slowest = 0.0
    with httpx.Client(base_url=server.url) as client:
        long.start()
        while long.is_alive():
            slowest = max(slowest, client.get("/health").elapsed.total_seconds())
            time.sleep(0.01)
    assert time.process_time() - began < 3
    assert slowest < 1
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (400, "context_length_exceeded")


def test_structured_output_without_its_package_names_the_extra(server: RunningServer) -> None:
    with mock.patch.dict(sys.modules, {"llguidance": None}):
        response = httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, "guided_regex": "a"})
    assert response.status_code == 400
    assert "extra structured" in response.json()["error"]["message"]


@pytest.mark.parametrize("streamed", [False, True])
def test_grammar_that_fails_within_an_answer_is_an_error_of_the_client(server: RunningServer, streamed: bool) -> None:
    body = {**COMPLETION, "guided_regex": "(a?){5000}a{5000}", "stream": streamed}
    response = httpx.post(f"{server.url}/v1/completions", json=body)
    # A stream has begun with the first token, and ends with an event of the error.
    assert response.status_code == (200 if streamed else 400)
    assert '"code":"structure_failed"' in response.text


def test_grammar_that_takes_minutes_to_build_is_refused(server: RunningServer) -> None:
    choices = [str(number) for number in range(40_000)]
    response = httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, "guided_choice": choices})
    assert response.status_code == 400
    assert "at most 262144 characters" in response.json()["error"]["message"]


def test_model_without_a_template_refuses_chats() -> None:
    with serving(make_engine(), describe(template=None)) as running:
        response = httpx.post(f"{running.url}/v1/chat/completions", json=CHAT)
        assert (response.status_code, response.json()["error"]["code"]) == (400, "no_chat_template")


def test_api_key_is_demanded_of_requests() -> None:
    with serving(make_engine(), api_key="secret") as running:
        for headers, status in (
            ({}, 401),
            ({"authorization": "Bearer wrong"}, 401),
            ({"authorization": "secret"}, 401),
            ({"authorization": "bearer secret"}, 200),
            ({"authorization": "Bearer secret"}, 200),
        ):
            response = httpx.post(f"{running.url}/v1/completions", json=COMPLETION, headers=headers)
            assert response.status_code == status, headers
        assert httpx.get(f"{running.url}/health").status_code == 200
        assert httpx.get(f"{running.url}/v1/models").status_code == 401


def test_pages_of_named_origins_read_answers_and_errors() -> None:
    named, other = "http://localhost:3000", "http://elsewhere"
    preflight = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-a"}
    with serving(make_engine(), api_key="secret", cors_origins=(named,)) as running:
        url = f"{running.url}/v1/completions"
        before = httpx.options(url, headers={"origin": named, **preflight})
        assert (before.status_code, before.headers["access-control-allow-headers"]) == (200, "authorization,x-a")
        key = {"authorization": "Bearer secret"}
        for headers, status in ((key, 200), ({}, 401)):
            answer = httpx.post(url, json=COMPLETION, headers={"origin": named, **headers})
            assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, named)
        refused = httpx.options(url, headers={"origin": other, **preflight})
        assert refused.status_code == 400
        answer = httpx.post(url, json=COMPLETION, headers={"origin": other, **key})
        assert "access-control-allow-origin" not in answer.headers


def test_no_page_reads_answers_unless_its_origin_is_named(server: RunningServer) -> None:
    answer = httpx.get(f"{server.url}/v1/models", headers={"origin": "http://localhost:3000"})
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_full_queue_is_refused_with_429() -> None:
    with serving(make_engine(), most_open=2) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        response = client.post("/v1/completions", json={**COMPLETION, "n": 3})
        assert response.status_code == 429
        assert response.headers["retry-after"]
        assert response.json()["error"]["type"] == "rate_limit_error"
        assert client.post("/v1/completions", json={**COMPLETION, "n": 2}).status_code == 200


LONG: dict[str, Any] = {"prompt": "hello", "max_tokens": 450, "ignore_eos": True}


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_disconnects_frees_its_blocks(stream: bool) -> None:
    engine = make_engine()
    step = engine.step

    def slow_step() -> list[SequenceUpdate]:
        time.sleep(0.005)
        return step()

    with serving(engine) as running, mock.patch.object(engine, "step", slow_step):
        free = engine.counts()["free_blocks"]
        url = f"{running.url}/v1/completions"
        body = {**LONG, "stream": stream, "n": 4}
        if stream:
            with httpx.stream("POST", url, json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.5)
        deadline = time.monotonic() + 10
        while running.service.engine.num_open or not engine.is_idle:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert engine.counts()["tokens"] < 4 * LONG["max_tokens"], "the answers were completed for no client"
        assert engine.counts()["free_blocks"] == free
        assert " 499, " in running.lines[-1]
        samples = httpx.get(f"{running.url}/metrics").text.splitlines()
        assert {"serve_engine_active 0.0", f"serve_engine_free_blocks {float(free)}"} <= {*samples}
        assert httpx.post(f"{running.url}/v1/completions", json=COMPLETION).status_code == 200


def test_signal_drains_what_is_in_progress_and_refuses_the_rest() -> None:
    with serving(make_engine()) as running, httpx.Client(base_url=running.url, timeout=30) as client:
        client.get("/health")  # a connection that stays open
        answers: list[httpx.Response] = []
        body = {**LONG, "max_tokens": 120}
        asking = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{running.url}/v1/completions", json=body, timeout=30))
        )
        asking.start()
        while not running.service.engine.num_open:
            time.sleep(0.01)
        running.server.handle_exit(signal.SIGTERM, None)
        response = client.post("/v1/completions", json=COMPLETION)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "shutting_down")
        assert client.get("/health").status_code == 503
        asking.join()
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] == 120


def test_second_signal_ends_requests_with_an_error() -> None:
    answers: list[httpx.Response] = []
    with serving(make_engine()) as running:
        ask = partial(httpx.post, f"{running.url}/v1/completions", json=LONG, timeout=30)
        asking = threading.Thread(target=lambda: answers.append(ask()))
        asking.start()
        while not running.service.engine.num_open:
            time.sleep(0.01)
        running.server.handle_exit(signal.SIGINT, None)
        while not running.lines:
            time.sleep(0.01)
        assert running.lines[0].startswith("draining 1 requests for at most 5 s")
        running.server.handle_exit(signal.SIGINT, None)
        asking.join()
    assert (answers[0].status_code, answers[0].json()["error"]["code"]) == (503, "shutting_down")


def test_step_that_does_not_end_answers_503(caplog: pytest.LogCaptureFixture) -> None:
    released = threading.Event()
    with serving(engine := make_engine(), stall_seconds=0.2) as running:
        with mock.patch.object(engine, "step", side_effect=lambda: released.wait() and []):
            response = httpx.post(f"{running.url}/v1/completions", json=COMPLETION, timeout=30)
        released.set()
    assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_died")
    reason = "StalledEngineError: a step takes more than stall_seconds=0.2"
    check_internal(response.json()["error"]["message"], "the engine has ended", reason, caplog)


def test_server_ends_after_the_step_of_a_client_that_disconnected() -> None:
    released = threading.Event()
    hanging = mock.patch.object(engine := make_engine(), "step", side_effect=lambda: released.wait() and [])
    with serving(engine) as running, mock.patch("infer.serve.engine._STOP_SECONDS", 0.01):
        with hanging, pytest.raises(httpx.TimeoutException):
            httpx.post(f"{running.url}/v1/completions", json=COMPLETION, timeout=0.5)
        running.server.handle_exit(signal.SIGTERM, None)
        time.sleep(0.5)
        released.set()
        running.service.engine._thread.join(10)
    assert running.service.engine.failure is None


PARTIAL = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"


def test_body_that_does_not_arrive_is_refused_and_delays_no_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    with serving(make_engine()) as running, mock.patch("infer.serve.app.BODY_SECONDS", 0.2):
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=30) as client:
            client.sendall(PARTIAL)
            assert b"408 Request Timeout" in client.recv(1000)
    with serving(make_engine()) as running:
        running.server._drain_seconds = 60  # longer than `serving` waits for the end
        address = running.url.removeprefix("http://").split(":")
        client = socket.create_connection((address[0], int(address[1])), timeout=30)
        client.sendall(PARTIAL)
        while not running.server.server_state.tasks:
            time.sleep(0.01)
    client.close()
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    "half", [b"POST /v1", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\nGET", PARTIAL.replace(b"POST", b"GET")]
)
def test_request_that_does_not_arrive_ends_its_connection(half: bytes) -> None:
    """A half header, one after an answer, and the rest of a body whose request has its answer."""
    with serving(make_engine()) as running, mock.patch("infer.serve.http.HEADER_SECONDS", 0.3):
        address = running.url.removeprefix("http://").split(":")
        with socket.create_connection((address[0], int(address[1])), timeout=10) as client:
            client.sendall(half)
            received = b""
            for _ in range(20):
                time.sleep(0.05)
                with suppress(ConnectionError):
                    client.sendall(b"x")
            with suppress(ConnectionError):
                while part := client.recv(2**16):
                    received += part
        assert b"HTTP/1.1 4" in received
        deadline = time.monotonic() + 10
        while running.server.server_state.connections:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_client_that_does_not_read_is_disconnected() -> None:
    with serving(make_engine()) as running, mock.patch("infer.serve.http.READ_SECONDS", 0.3):
        address = running.url.removeprefix("http://").split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.settimeout(0.2)
            client.connect((address[0], int(address[1])))
            with suppress(TimeoutError):
                client.sendall(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
            deadline = time.monotonic() + 10
            while running.server.server_state.connections:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def check_internal(message: str, sentence: str, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    """Checks that a client receives a sentence and an id, under which the log has the reason."""
    matched = re.fullmatch(rf"{re.escape(sentence)}; the server's log has the reason of error (\w{{8}})", message)
    assert matched, message
    assert sum(line.startswith(f"error {matched[1]}: {reason}") for line in caplog.messages) == 1, caplog.messages


def test_errors_have_no_words_of_a_library(server: RunningServer, caplog: pytest.LogCaptureFixture) -> None:
    def post(**fields: object) -> Any:
        return httpx.post(f"{server.url}/v1/completions", json={**COMPLETION, **fields}).json()["error"]

    error = post(guided_regex="(a")
    rule = "guided_regex: must be a grammar that can be built, is not; nearest valid: a simpler one"
    check_internal(error["message"], rule, 'at 1(8): invalid regex "(a"', caplog)
    assert error["param"] == "guided_regex"
    engine = server.service.engine._engine
    step = engine.step
    failed = GenerateError("/srv/model: CUDA error")
    with mock.patch.object(engine, "step", side_effect=lambda: [replace(item, error=failed) for item in step()]):
        check_internal(post()["message"], "the answer failed", str(failed), caplog)


class LostEngineError(RuntimeError):
    exit_code = 78


def test_engine_that_fails_answers_503_and_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine()
    service = Service(
        describe(), EngineThread(engine, most_open=8, stall_seconds=60), api_key=None, write_line=lambda line: None
    )
    codes: list[int] = []
    with (
        open_socket("127.0.0.1", 0) as bound,
        mock.patch.object(engine, "step", side_effect=LostEngineError("gloo: /usr/lib/rank.cc")),
    ):
        bound.listen()
        url = f"http://127.0.0.1:{bound.getsockname()[1]}/v1/completions"
        runner = threading.Thread(target=lambda: codes.append(run_server(service, bound, drain_seconds=5)))
        runner.start()
        response = httpx.post(url, json=COMPLETION, timeout=30)
        runner.join(20)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"
    assert codes == [LostEngineError.exit_code]
    health = asyncio.run(service._health(mock.Mock()))
    for message in (response.json()["error"]["message"], json.loads(bytes(health.body))["status"]):
        check_internal(message, "the engine has ended", "LostEngineError: gloo: /usr/lib/rank.cc", caplog)


def text_of(prompt: list[int], tokens: Sequence[int]) -> str:
    """Returns what `launch.generate` prints."""
    transcript = Transcript(Prompt(prompt, prompt), TOKENIZER, ())
    for token in tokens:
        transcript.push(token)
    transcript.end("length")
    return transcript.text


def random_prompts() -> list[list[int]]:
    draw = random.Random(3)
    return [[draw.randrange(6, 300) for _ in range(draw.randint(1, 90))] for _ in range(50)]


def ask_together(url: str, prompts: list[list[int]]) -> dict[int, str]:
    """Returns greedy answers by number of the prompt. All are asked at once, in random order."""
    order = random.Random(4).sample(range(len(prompts)), len(prompts))

    async def ask() -> list[str]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            bodies = [{"prompt": prompts[at], "temperature": 0, "max_tokens": 16} for at in order]
            answers = await asyncio.gather(*(client.post("/v1/completions", json=body) for body in bodies))
            return [answer.json()["choices"][0]["text"] for answer in answers]

    return dict(zip(order, asyncio.run(ask()), strict=True))


def test_50_prompts_in_random_order_get_the_text_of_generate(server: RunningServer) -> None:
    prompts = random_prompts()
    end = TOKENIZER.special.eos
    made = generate(make_model(MODEL), prompts, max_new_tokens=16, stop=[end], speculative=False)
    answers = ask_together(server.url, prompts)
    for at, (prompt, continuation) in enumerate(zip(prompts, made.continuations, strict=True)):
        assert answers[at] == text_of(prompt, continuation.tokens), at


@pytest.mark.long
def test_50_prompts_get_the_text_of_transformers_on_the_export(tmp_path: Path) -> None:
    folder = save_weights(tmp_path / "tiny")
    settings: dict[str, Any] = {"dtype": torch.float64, "experts_implementation": "eager"}
    reference = DeepseekV3ForCausalLM.from_pretrained(folder, **settings)
    end = TOKENIZER.special.eos
    prompts = random_prompts()
    expected = {}
    for at, prompt in enumerate(prompts):
        limits = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": end, "pad_token_id": end}
        made = reference.generate(torch.tensor([prompt]), **limits)[0, len(prompt) :].tolist()
        expected[at] = text_of(prompt, [token for token in made if token != end])
    variants: tuple[dict[str, Any], ...] = ({}, {"speculative": True, "prefix_cache": False})
    for options in variants:
        with serving(make_engine(**options)) as running:
            assert ask_together(running.url, prompts) == expected, options


def test_replies_are_sent_at_once(server: RunningServer) -> None:
    """A reply has two packets. With Nagle's algorithm the second one waits 40 ms for the client's acknowledgment."""
    (bound,) = [bound for listening in server.server.servers for bound in listening.sockets]
    assert bound.proto == socket.IPPROTO_TCP


@pytest.mark.slow
def test_command_serves_and_ends_with_0_on_sigterm(tmp_path: Path) -> None:
    folder = save_weights(tmp_path / "tiny")
    command = [sys.executable, "-m", "launch.serve", f"ckpt={folder}", "port=0", "dtype=float32", "chat=v3_1"]
    environment = {**os.environ, API_KEY: "secret", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving tiny at http://127.0.0.1:"), line
            url = line.split()[-1]
            headers = {"authorization": "Bearer secret"}
            answer = httpx.post(f"{url}/chat/completions", json=CHAT, headers=headers, timeout=60)
            assert answer.status_code == 200, answer.text
            assert httpx.post(f"{url}/completions", json=COMPLETION).status_code == 401
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
            assert process.returncode == 0, errors
            assert time.monotonic() - began < 10
            assert "chat/completions 200" in errors
            assert "weights in float32, cache of 65,536 tokens in 15.7 MB\nchat template v3_1\n" in errors
            assert "hello" not in errors
        finally:
            process.kill()


@pytest.mark.long
def test_10_000_short_requests_keep_memory() -> None:
    """In one process without sockets, so that only the server's own memory grows."""

    async def ask() -> int:
        engine = EngineThread(
            make_engine(replace(MODEL, num_layers=1, num_dense_layers=1)), most_open=MOST_OPEN, stall_seconds=60
        )
        service = Service(describe(), engine, api_key=None, write_line=lambda line: None)
        engine.start()
        transport = httpx.ASGITransport(service.app())
        process = psutil.Process()
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:

            async def some(count: int) -> None:
                for number in range(count):
                    body = {"prompt": f"{number} hello", "max_tokens": 1}
                    assert (await client.post("/v1/completions", json=body)).status_code == 200

            await asyncio.gather(*(some(125) for _ in range(8)))
            before = process.memory_info().rss
            await asyncio.gather(*(some(1250) for _ in range(8)))
            grown = process.memory_info().rss - before
        engine.stop()
        return grown

    assert asyncio.run(ask()) < 20 * 2**20


def test_port_in_use_is_a_user_error(tmp_path: Path) -> None:
    folder = save_weights(tmp_path / "tiny")
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(ConfigError, match="port=0"):
        main([f"ckpt={folder}", f"port={taken.getsockname()[1]}"])


@pytest.mark.parametrize("host", ["no.invalid", "192.0.2.1"])
def test_host_that_is_no_address_is_a_user_error(tmp_path: Path, host: str) -> None:
    with pytest.raises(ConfigError, match=f"host: must be an address of this machine, is '{host}'"):
        main([f"ckpt={save_weights(tmp_path / 'tiny')}", f"host={host}"])


def test_empty_key_is_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY, "")
    with pytest.raises(ConfigError, match="SERVE_API_KEY: must have at least one character"):
        main(["ckpt=nowhere"])
