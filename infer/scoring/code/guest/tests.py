"""Runs a problem's tests in a sandbox, with proxies for the program, which another process runs.

Everything that decides, the assertions and the operators that they use, runs here, where the program cannot change it.
"""

import ast
import builtins
import json
import os
import sys
import traceback
from typing import Any, NoReturn

from infer.scoring.code.guest.limits import apply_limits, read_source
from infer.scoring.code.guest.wire import WireError, decode, encode, receive, send

_ASKING, _TESTING = b"asking ", b"testing"


def main(limits: str, request_fd: str, reply_fd: str, verdict_fd: str) -> None:
    """Runs `tests.py` and writes the verdict, which begins with the nonce from standard input.

    Args:
        limits: JSON for `apply_limits`.
        request_fd: number of the file descriptor for requests to the program.
        reply_fd: number of the file descriptor with the program's replies.
        verdict_fd: number of the file descriptor of a file: what is being done, and at the end the verdict.
    """
    nonce = sys.stdin.readline().strip()
    values = json.loads(limits)
    source = read_source(values, "tests.py")
    apply_limits(values)
    link = _Link(int(request_fd), int(reply_fd), int(verdict_fd))
    outcome, detail = _run(source, link)
    if link.problem:
        outcome, detail = "wrong", link.problem
    verdict = json.dumps({"nonce": nonce, "outcome": outcome, "detail": detail[:200]})
    os.pwrite(int(verdict_fd), verdict.encode().ljust(len(_ASKING)), 0)


def _run(source: str, link: "_Link") -> tuple[str, str]:
    """Runs the tests. Returns correct if all passed, wrong if one failed, or error if they are not Python."""
    try:
        tree = ast.parse(source, "tests.py")
        code = compile(tree, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        return "error", f"the tests are not Python: {error}"
    try:
        names = {name: link.get(None, name) for name in free_names(tree)}
        exec(code, {"__name__": "tests", **names})
    except _BrokenLinkError as error:
        return "wrong", str(error)
    except SystemExit:
        return "error", "the tests end the process"
    except BaseException as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
        place = f"line {lines[-1]} of the tests: " if lines else ""
        return "wrong", f"{place}{type(error).__name__} {error}".strip()
    return "correct", ""


def free_names(tree: ast.AST) -> list[str]:
    """Returns the names that tests use and do not define: those of the program.

    Builtins are never the program's.
    """
    used: dict[str, None] = {}
    defined: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Load()):
                used[name] = None
            case ast.Name(id=name):
                defined.add(name)
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
                defined.add(name)
            case ast.arg(arg=name):
                defined.add(name)
            case ast.alias(name=name, asname=other):
                defined.add(other or name.partition(".")[0])
            case ast.ExceptHandler(name=str(name)):
                defined.add(name)
    return [name for name in used if name not in defined and not hasattr(builtins, name) and name != "__name__"]


class _BrokenLinkError(BaseException):
    """The program ended or sent something that is not a reply.

    Tests that catch `Exception` do not catch it.
    """


class _Link:
    """The pipes to the process with the program."""

    def __init__(self, request_fd: int, reply_fd: int, verdict_fd: int) -> None:
        self._verdict_fd = verdict_fd
        self._requests, self._replies = os.fdopen(request_fd, "wb"), os.fdopen(reply_fd, "rb")
        self.problem = ""

    def get(self, number: int | None, name: str) -> Any:
        """Returns the program's attribute of this name: a value, or a proxy."""
        return self._ask({"do": "get", "name": name}, number)

    def call(self, number: int, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
        """Calls an object of the program."""
        message = {"do": "call", "arguments": encode(arguments, _refer), "named": encode(named, _refer)}
        return self._ask(message, number)

    def _ask(self, message: dict[str, Any], number: int | None) -> Any:
        try:
            os.pwrite(self._verdict_fd, _ASKING, 0)
            send(self._requests, message if number is None else {**message, "object": number})
            reply = receive(self._replies)
            os.pwrite(self._verdict_fd, _TESTING, 0)
            if reply is None:
                self._break("the program ended")
            if "value" in reply:
                return decode(reply["value"], self._resolve)
        except (OSError, WireError) as error:
            self._break(f"no reply from the program: {error}")
        except RecursionError:
            self._break("no reply from the program: nested too deep")
        kind = getattr(builtins, str(reply.get("error")), None)
        # SystemExit and the like would end the tests, not fail them.
        is_error = isinstance(kind, type) and issubclass(kind, Exception)
        raise _error(kind if is_error else RuntimeError, str(reply.get("text")))

    def _break(self, problem: str) -> NoReturn:
        self.problem = self.problem or problem
        raise _BrokenLinkError(problem)

    def _resolve(self, data: list[Any]) -> "Proxy":
        if data[0] != "object" or len(data) != 3 or type(data[1]) is not int:
            raise WireError("data that is not a value")
        return Proxy(self, data[1], str(data[2]))


class Proxy:
    """An object of the program. Its operators are those of `object`, so it is equal only to itself."""

    def __init__(self, link: _Link, number: int, kind: str) -> None:
        """Refers to an object by its number in the program's process."""
        self._link, self._number, self._kind = link, number, kind

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """Calls the object."""
        return self._link.call(self._number, arguments, named)

    def __getattr__(self, name: str) -> Any:
        """Returns an attribute of the object. Python's own protocols do not reach through a proxy."""
        if name.startswith("__"):
            raise AttributeError(name)
        return self._link.get(self._number, name)

    def __repr__(self) -> str:
        return f"<{self._kind} of the program>"


def _refer(value: Any) -> list[Any]:
    if type(value) is Proxy:
        return ["object", value._number]
    raise WireError(f"an argument of type {type(value).__name__}; tests may pass plain values only")


def _error(kind: Any, text: str) -> Exception:
    """Builds an error; some types need more arguments."""
    try:
        made = kind(text)
    except TypeError:
        made = RuntimeError(text)
    return made if isinstance(made, Exception) else RuntimeError(text)
