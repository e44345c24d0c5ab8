"""Tests of hostile requests to one server: each gets an error of one line, and the server answers others meanwhile."""

import os
import re
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
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
            yield Victim(line.split()[-1].removesuffix("/v1"), psutil.Process(process.pid))
            assert process.poll() is None, (folder / "errors.txt").read_text()[-2000:]
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
    assert len(message) < 600, str(request)[:200]
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
