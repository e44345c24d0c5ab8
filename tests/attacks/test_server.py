"""Tests of hostile requests to one server: each gets an error of one line, and the server answers others meanwhile."""

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests import ROOT
from tests.infer.serve.servers import save_weights

MOST_FILES = 256  # descriptors of the server
MOST_GROWTH = 500 * 2**20  # of its memory
INTERNALS = re.compile(
    r"Traceback|panicked|thread '|\.py\b|\.rs\b|site-packages|/work|/home|/usr|recursion|object at 0x|gloo"
)


def chain(length: int) -> dict[str, Any]:
    """Returns a schema in which each definition needs the next one."""
    links = {f"a{at}": {"type": "object", "properties": {"x": {"$ref": f"#/$defs/a{at + 1}"}}} for at in range(length)}
    return {"$defs": {**links, f"a{length}": {"type": "string"}}, "$ref": "#/$defs/a0"}


def rules(count: int) -> str:
    return "start: r0\n" + "".join(f'r{at}: "a" r{at + 1}\n' for at in range(count)) + f'r{count}: "b"'


def nested(value: Any, depth: int, *, name: str = "items") -> Any:
    for _ in range(depth):
        value = {name: value}
    return value


SCHEMAS: tuple[Any, ...] = (
    *(chain(1000), chain(10_000), "[" * 100_000, '{"items":' * 5000 + "{}" + "}" * 5000, nested({}, 60)),
    *({"$ref": "#"}, {"allOf": [{"$ref": "#"}]}, {"$ref": "http://127.0.0.1:1/x"}, {"$ref": "file:///etc/passwd"}),
    {"$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}] * 100}}, "$ref": "#/$defs/a"},
    *({"enum": [f"value {at}" for at in range(15_000)]}, {"enum": ["x" * 200_000]}, {"type": "string", "format": "?"}),
    *({"type": "array", "minItems": 10**9}, {"type": "string", "minLength": 10**9, "maxLength": 10**18}),
    *({"type": "integer", "multipleOf": 1_000_003}, {"type": "integer", "minimum": 10**400}),
    *({"type": "number", "minimum": -1e308, "maximum": 1.00000000001e308}, {"type": "number", "multipleOf": 1e-300}),
    *({"type": "string", "pattern": "^(a|b|c){1,1000}(x?){1000}$"}, {"type": "string", "pattern": "(?=a)b"}),
    *({"type": "string", "pattern": "(" * 50_000}, {"type": "string", "pattern": r"^(\w+\s?)*$"}),
    {"anyOf": [{"properties": {f"p{at}_{number}": {} for number in range(10)}} for at in range(200)]},
    {"allOf": [{"anyOf": [{"properties": {f"p{at}_{n}": {"const": n}}} for n in range(6)]} for at in range(12)]},
    {"oneOf": [{"type": "object", "properties": {f"p{at}": {"type": "string"}}} for at in range(300)]},
    {"patternProperties": {f"^a{at}.*b$": {"type": "string"} for at in range(200)}},
    {"type": "array", "prefixItems": [{"type": "integer"}] * 20_000},
    {"type": "object", "properties": {"é" * 50 + str(at): {} for at in range(500)}},
    *("null", "", "true", "\ufeff{}", '{"type": "string"', "x" * 300_000),
)
LARK = (
    *(rules(4000), rules(20_000), 'start: start start | "a"', 'start: a\na: a a a | a a | "x" |', "", "\0" * 10_000),
    *("start: " + "(" * 3000 + '"a"' + ")" * 3000, "start: /a/{1000000000}", 'start: "a"{1,1000000}', "start: @a"),
    "start: T\nT: /.*a.{20}/ & /.*b.{20}/ & /.*c.{15}/ & ~/.*d.{18}/",
    "start: a0\n" + "".join(f"a{at}: a{at + 1} a{at + 1}\n" for at in range(60)) + 'a60: "x"',
    'start: a{100}\na: b{100}\nb: c{100}\nc: "x"{100}',
    'start: %json {"type": "string", "minLength": 1000000000}',
    "root ::= " + "(" * 5000 + '"a"',
    'root ::= root root | "a"',
    "# " + "\\" * 100_000,
)
PATTERNS = (
    *("(" * 100_000, "(a|aa)*" * 2000, "(?:(?:(?:a{1,100}){1,100}){1,100}){1,100}", "(?s:.{1,2000}a.{1,2000}b)"),
    *(r"\p{L}{500}\p{Lu}{500}(\w|\W){500}", "[^\\x00-\\U0010ffff]", "((a?){100}){100}", ""),
)
CHOICES: tuple[Any, ...] = (
    *([1, {"a": 2}], [""], ["a" * 100_000, "b"], [str(at) for at in range(30_000)], [["a"]], ["\0", "\ufffe"]),
)


def grammar_bodies() -> Iterator[dict[str, Any]]:
    for kind, values in (("json", SCHEMAS), ("grammar", LARK), ("regex", PATTERNS), ("choice", CHOICES)):
        for value in values:
            yield {"prompt": "a", "max_tokens": 8, f"guided_{kind}": value}
    for schema in SCHEMAS[:3]:
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
        yield {"messages": [{"role": "user", "content": "a"}], "max_tokens": 8, "response_format": form}
    tool = {"type": "function", "function": {"name": "f", "parameters": chain(1000)}}
    yield {"messages": [{"role": "user", "content": "a"}], "tools": [tool], "tool_choice": "required"}


@dataclass
class Victim:
    """A server in a process."""

    url: str
    process: psutil.Process
    folder: Path

    @property
    def address(self) -> tuple[str, int]:
        host, port = self.url.removeprefix("http://").split(":")
        return host, int(port)

    def post(self, body: Any, timeout: float = 30) -> httpx.Response:
        endpoint = "chat/completions" if "messages" in body else "completions"
        return httpx.post(f"{self.url}/v1/{endpoint}", json=body, timeout=timeout)


def start_server(folder: Path, *choices: str, most_files: int = MOST_FILES) -> "subprocess.Popen[str]":
    """Starts the command with few descriptors. Its standard error is a file in the folder."""
    command = [sys.executable, "-m", "launch.serve", f"ckpt={folder / 'tiny'}", "port=0", "dtype=float32", "chat=v3_1"]
    with (folder / "errors.txt").open("w") as errors:
        return subprocess.Popen(
            [*command, *choices],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (most_files, most_files)),
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Victim]:
    """Yields a server that must be alive after all tests, and end soon although clients hold connections."""
    folder = tmp_path_factory.mktemp("server")
    save_weights(folder / "tiny")
    with start_server(folder) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving tiny at"), (folder / "errors.txt").read_text()
            victim = Victim(line.split()[-1].removesuffix("/v1"), psutil.Process(process.pid), folder)
            yield victim
            assert process.poll() is None, (folder / "errors.txt").read_text()[-2000:]
            content = json.dumps({**SHORT, "guided_json": {"type": "integer", "multipleOf": 10**6 + 3}}).encode()
            with ExitStack() as stack:
                for _ in range(12):  # grammars whose builds take a second or more, two at a time
                    client = stack.enter_context(socket.create_connection(victim.address, timeout=30))
                    client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
                time.sleep(0.3)
                process.send_signal(signal.SIGTERM)
                assert process.wait(10) == 0, (folder / "errors.txt").read_text()[-2000:]
            assert "Traceback" not in (folder / "errors.txt").read_text()
        finally:
            process.kill()


def check_error(response: httpx.Response, request: object) -> None:
    """Checks that a response is an error of one line, in OpenAI's form, without what only the server should know."""
    assert 400 <= response.status_code < 500 or response.status_code == 503, (str(request)[:200], response.text[:300])
    message = response.json()["error"]["message"]
    assert "\n" not in message, str(request)[:200]
    assert len(message) < 1000, str(request)[:200]
    assert not INTERNALS.search(message), (str(request)[:200], message)


def test_hostile_grammars_end_only_their_request(server: Victim) -> None:
    """A grammar that can be built gets an answer, or one that is no longer possible."""
    before = server.process.memory_info().rss
    failures = []
    with ThreadPoolExecutor(4) as pool:
        for body, response in zip(grammar_bodies(), pool.map(server.post, grammar_bodies()), strict=True):
            if response.status_code != 200:
                try:
                    check_error(response, body)
                except AssertionError as error:
                    failures.append(str(error))
    assert not failures
    assert server.post({"prompt": "a", "guided_json": {"type": "object"}, "max_tokens": 4}).status_code == 200
    assert server.process.memory_info().rss - before < MOST_GROWTH


SHORT: dict[str, Any] = {"prompt": "a", "max_tokens": 2}
VALID = json.dumps(SHORT).encode()


def field(name: str, value: str) -> bytes:
    """Returns a body with a field whose JSON is given."""
    return VALID[:-1] + f', "{name}": {value}}}'.encode()


BODIES: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"\0" * 1000, b"[" * 10**6),
    *(b'{"a":' * 10**5, b'"' * 10**6, b'{"prompt": "\\ud800"}', b'{"prompt": "\xed\xa0\x80"}'),
    *(b'{"prompt": "a", "prompt": "b"}', b'{"prompt": "a"} {}', b"[" + b"[]," * 10**6 + b"1]"),
    *(b'{"prompt": [' + b"1," * 10**6 + b"1]}", b'{"prompt": [' + b'"",' * 10**5 + b'""]}'),
    *(b'{"prompt": [[' + b"9" * 4000 + b"]]}", b'{"prompt": [[-1]]}', b'{"prompt": [[1.5]]}', b'{"prompt": {"a": 1}}'),
    *(field(name, "1" + "0" * 5000) for name in ("seed", "n", "max_tokens", "top_k")),
    *(field(name, value) for name in ("temperature", "top_p", "min_p") for value in ("NaN", "Infinity", "1e400", "-1")),
    *(field("n", value) for value in ("1e9", "1000000000", "-1", "0", "true", '"1"')),
    *(field("max_tokens", value) for value in ("-1", "1e9", "2147483648", "100000")),
    *(field("stop", json.dumps(["a"] * 10**5)), field("stop", '[""]'), field("stop", "[[]]"), field("stop", "7")),
    *(field("logit_bias", json.dumps({str(at): 1 for at in range(10**6)})), field("logit_bias", '{"-1": 1}')),
    *(field("logit_bias", '{"1": 1e400}'), field("logit_bias", '{"1e3": 1}'), field("logit_bias", '{"\u0661": 1}')),
    *(field("stop_token_ids", "[1e9]"), field("stop_token_ids", "[[]]"), field("stream_options", "[]")),
    *(field("logprobs", "1000000"), field("best_of", "99"), field("k" * 10**6, "1")),
    *(field("metadata", "[" * 70 + "]" * 70), field("guided_json", "{}")[:-1] + b', "guided_regex": "a"}'),
    *(field("guided_choice", "[]"), field("guided_json", "[" * 60 + "]" * 60)),
    *(field("structured_outputs", '{"json": 7}'), field("model", '"/etc/passwd"')),
    json.dumps({"prompt": "hello, world " * 1_000_000}).encode(),
    json.dumps({"prompt": ["hello, world " * 20_000] * 60}).encode(),
    json.dumps({"prompt": "a" * 15_000_000}).encode(),
    json.dumps({"prompt": " " * 15_000_000}).encode(),
    json.dumps({"prompt": "\U0001f600" * 1_000_000}).encode(),
    b" " * (2**24 + 1),
)
USER = {"role": "user", "content": "a"}
CHATS: tuple[Any, ...] = (
    *([], [7], [{}], [USER] * 100_000, [{"role": "user", "content": "a b " * 10**6}]),
    [{"role": "robot", "content": "a"}],
    *([{"role": "user", "content": [{"type": "image_url", "image_url": "file:///etc/passwd"}]}], [{"role": "user"}]),
    *([{"role": "user", "content": [{"type": "text", "text": "a"}] * 50_000}]),
    [{**USER, "name": "\0" * 1000, "x": 1}],
)
TOOLS: tuple[Any, ...] = (
    *([7], [{"type": "function"}], [{"type": "function", "function": {"name": "a\n" * 1000}}]),
    [{"type": "function", "function": {"name": "f", "parameters": nested({}, 63)}}],
    [{"type": "function", "function": {"name": f"f{at}", "parameters": {"type": "object"}}} for at in range(20_000)],
)
CALL_ITEM = {"type": "function_call", "name": "f", "arguments": "{}"}
INPUTS: tuple[Any, ...] = (
    *([CALL_ITEM] * 100_000, [CALL_ITEM, {"role": "assistant", "content": "a"}] * 60_000),
    *(7, [], [[]], [None], "a" * 10**7),
    *([{"type": ["message"]}], [{"type": "file:///etc/passwd"}], [{"type": "function_call_output", "output": {}}]),
    *([{"type": "reasoning", "content": nested({}, 60)}], [{"role": "user", "content": [{"type": "input_file"}]}]),
)


def test_hostile_bodies_are_refused_in_one_line(server: Victim) -> None:
    before = server.process.memory_info().rss
    began = sum(server.process.cpu_times()[:2])
    chats = [json.dumps({"messages": messages, "max_tokens": 2}).encode() for messages in CHATS]
    chats += [json.dumps({"messages": [USER], "max_tokens": 2, "tools": tools}).encode() for tools in TOOLS]
    cases = [("completions", body) for body in BODIES] + [("chat/completions", body) for body in chats]
    cases += [("responses", json.dumps({"input": items}).encode()) for items in INPUTS]
    tokens = ([1] * 5_000_000, [10**400], [[1]], {"a": 1}, ["1"])
    cases += [(f"{server.url}/detokenize", json.dumps({"tokens": item}).encode()) for item in tokens]
    cases += [(f"{server.url}/tokenize", json.dumps({"prompt": item}).encode()) for item in ("a" * 10**7, ["a"], 7)]
    failures = []
    slowest = 0.0
    with httpx.Client(base_url=f"{server.url}/v1", timeout=60) as client, httpx.Client(base_url=server.url) as other:
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(client.post, endpoint, content=body) for endpoint, body in cases]
            while not all(answer.done() for answer in answers):
                slowest = max(slowest, other.get("/health").elapsed.total_seconds())
                time.sleep(0.02)
        for (_, body), answer in zip(cases, answers, strict=True):
            try:
                if answer.result().status_code != 200:
                    check_error(answer.result(), body[:200])
                else:
                    failures.append(f"accepted: {body[:100]!r}")
            except (AssertionError, httpx.HTTPError) as error:
                failures.append(f"{error!r}: {body[:100]!r}")
    assert not failures, "\n".join(failures)
    assert slowest < 10  # 0.5 on an idle machine
    used = server.process.cpu_times()
    assert used.user + used.system - began < 30  # 8 on an idle machine
    assert server.process.memory_info().rss - before < MOST_GROWTH


HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\n"
SIZED = HEAD + b"Content-Length: %d\r\n\r\n" % len(VALID) + VALID
CHUNKED = b"Transfer-Encoding: chunked\r\n"
CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(VALID), VALID)
RAW: tuple[bytes, ...] = (
    HEAD + CHUNKED + b"Content-Length: 5\r\n\r\n" + CHUNKS,
    HEAD + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n" + CHUNKS,
    HEAD.replace(b"1.1", b"1.0") + CHUNKED + b"\r\n" + CHUNKS,
    *(
        HEAD + b"Content-Length: %s\r\n\r\n" % size + VALID
        for size in (b"-1", b"+5", b"0x10", b"9" * 30, b"1e3", b"5, 6", b"")
    ),
    HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + VALID,
    HEAD + b"Content-Length: 99999999999\r\n\r\n",
    *(
        HEAD + b"Transfer-Encoding: %s\r\n\r\n" % kind + CHUNKS
        for kind in (b"gzip", b"xchunked", b"chunked, chunked", b"\x0bchunked")
    ),
    *(
        HEAD + CHUNKED + b"\r\n" + chunks
        for chunks in (b"zz\r\n", b"-1\r\n", b"f" * 40 + b"\r\n", b"5\r\nabcdefgh", b"1;" + b"a" * 10**5)
    ),
    *(HEAD + b"A" * size + b": b\r\n\r\n" for size in (70_000, 10**6)),
    HEAD + b"A: b\r\n" * 20_000 + b"\r\n",
    *(b"GET " + b"/" * 10**5 + b" HTTP/1.1\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n"),
    *(b"\x16\x03\x01\x02\x00\x01" * 50, b"\0" * 100, b"GET /health\r\n\r\n"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", HEAD + b" folded: a\r\n\r\n", HEAD + b"A\x00: b\r\n\r\n"),
    *(
        b"GET /v1/models/%s HTTP/1.1\r\nHost: x\r\n\r\n" % name
        for name in (b"..%2f..%2fetc%2fpasswd", b"%00", b"%ff%fe", b"%0d%0aX: y")
    ),
    *(b"%s /v1/completions HTTP/1.1\r\nHost: x\r\n\r\n" % method for method in (b"PUT", b"TRACE", b"X" * 1000)),
    b"GET /v1/completions HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n" + b"garbage\r\n\r\n" * 10,
    SIZED + b"garbage\r\n\r\n",
)


def answer_of(server: Victim, content: bytes) -> bytes:
    """Returns what the server sends to raw bytes, up to an error or the end of the connection."""
    received = b""
    with socket.create_connection(server.address, timeout=30) as client, suppress(ConnectionError):
        client.sendall(content)
        while (part := client.recv(2**16)) and not re.search(
            rb"HTTP/1.1 [45].*}}", received := received + part, re.DOTALL
        ):
            pass
    return received


def test_hostile_http_is_refused_in_one_line(server: Victim) -> None:
    """Some begin with a valid request: the answer to what follows it is refused."""
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda content: answer_of(server, content), RAW))
    for content, answer in zip(RAW, answers, strict=True):
        statuses = [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+)", answer)]
        assert statuses, (content[:200], answer)
        assert 400 <= statuses[-1] < 500, (content[:200], answer)
        assert not INTERNALS.search(answer.decode(errors="replace")), (content[:200], answer)


@pytest.mark.parametrize("sent", [b"", HEAD, SIZED, SIZED[:-1], SIZED.replace(b"completions", b"models")[:-1]])
def test_500_connections_that_wait_leave_room_for_others(server: Victim, sent: bytes) -> None:
    """The server has 256 descriptors: without a limit of connections, nobody else is served."""
    with ExitStack() as stack:
        for _ in range(500):
            client = stack.enter_context(socket.create_connection(server.address, timeout=30))
            with suppress(ConnectionError):
                client.sendall(sent)
        for _ in range(5):
            assert server.post(SHORT).status_code == 200
        assert server.process.num_fds() < MOST_FILES - 50
    assert (server.folder / "errors.txt").stat().st_size < 200_000


def test_clients_that_disconnect_at_any_moment_leave_nothing(server: Victim) -> None:
    body = json.dumps({"prompt": "a", "max_tokens": 400, "ignore_eos": True, "n": 4, "stream": True}).encode()
    grammar = json.dumps({"prompt": "a", "max_tokens": 400, "guided_regex": "[ab]*", "ignore_eos": True}).encode()
    for content in (body, grammar):
        request = HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content
        for size in (1, len(HEAD), len(request) - 1, *[len(request)] * 5):
            with socket.create_connection(server.address, timeout=30) as client:
                client.sendall(request[:size])
                if size == len(request):
                    client.settimeout(0.1)
                    with suppress(TimeoutError):
                        client.recv(1)
    assert server.post(SHORT).status_code == 200
    deadline = time.monotonic() + 10
    while "serve_engine_active 0.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    # The process that forks those of grammars remains.
    while len(server.process.children(recursive=True)) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_endless_grammar_ends_with_its_client(server: Victim) -> None:
    """It took all memory and time, and outlived its client."""
    content = json.dumps({**SHORT, "guided_json": {"type": "integer", "multipleOf": 10**6 + 3}}).encode()
    with socket.create_connection(server.address, timeout=30) as client:
        client.sendall(HEAD + b"Content-Length: %d\r\n\r\n" % len(content) + content)
        deadline = time.monotonic() + 10
        while len(server.process.children(recursive=True)) < 2:
            assert time.monotonic() < deadline
    while len(server.process.children(recursive=True)) > 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert server.post(SHORT).status_code == 200
