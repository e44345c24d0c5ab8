"""Runs a problem's tests in a sandbox, with proxies for the program, which another process runs.

Everything that decides, the assertions and the comparisons of values, runs here, where the program cannot change it.
"""

import ast
import builtins
import json
import math
import os
import secrets
import sys
import traceback
import types
from collections.abc import Sequence
from typing import Any

from score.guest.candidate import await_coroutine, take_items
from score.guest.limits import Discarded, apply_limits, read_source
from score.guest.proxies import (
    ARITHMETIC,
    COMPARISONS,
    CONTENT,
    SPECIAL,
    Proxy,
    ProxyClass,
    perform_special,
)
from score.guest.wire import BrokenLinkError, Peer

# Modules whose functions act on their arguments alone. Others may act on the process, which here is not the program's.
_PURE = (
    *("abc", "bisect", "cmath", "collections", "copy", "datetime", "decimal", "enum", "fractions", "functools"),
    *("heapq", "itertools", "json", "math", "numbers", "operator", "re", "solution", "statistics", "string"),
    *("textwrap", "typing"),
)
_OWN = ("callable", "eval", "exec", "globals", "input", "open", "__import__")
_ORDERS = COMPARISONS[2:]
_JUDGED = (*COMPARISONS, *ARITHMETIC, "__contains__")
_PREDICATES = {name for kind in CONTENT for name in dir(kind) if name.startswith("is") or name.endswith("swith")}
_DESCRIPTIONS = ("__name__", "__qualname__", "__doc__", "__module__")
_STATE_BYTES = 256
_STARTED = "started"
_ASKING = "asking"
_TESTING = "testing"


def main(limits: str, request_fd: str, reply_fd: str, verdict_fd: str) -> None:
    """Runs `tests.py` and writes the verdict with the nonce from standard input.

    The numbers of file descriptors are for requests to the program, its replies, and a file that says what is being
    done, and at the end the verdict.
    """
    nonce = sys.stdin.readline().strip()
    values = json.loads(limits)
    source = read_source(values, "tests.py")
    apply_limits(values)
    sys.stdout = Discarded()
    peer = _TestPeer(os.fdopen(int(reply_fd), "rb"), os.fdopen(int(request_fd), "wb"), int(verdict_fd))
    outcome, detail = _run(source, peer)
    if peer.problem:
        outcome = "wrong"
        detail = peer.problem
    if peer.is_tainted and outcome == "correct":
        outcome = "error"
        detail = peer.doubt
    message = {"nonce": nonce, "outcome": outcome, "detail": detail[:200], "doubt": peer.doubt[:200]}
    os.ftruncate(int(verdict_fd), 0)
    os.pwrite(int(verdict_fd), json.dumps(message).encode(), 0)


def _run(source: str, peer: "_TestPeer") -> tuple[str, str]:
    """Runs the tests. Returns correct if all passed, wrong if one failed, or error if they are not Python."""
    try:
        tree = ast.parse(source, "tests.py")
        code = compile(tree, "tests.py", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, RecursionError) as error:
        return "error", f"the tests are not Python: {error}"
    peer.doubt = _impure(tree)
    try:
        peer.meet_program()
        exec(code, _Names(peer))
    except BrokenLinkError as error:
        return "wrong", str(error)
    except BaseException as error:
        if isinstance(error, SystemExit | ImportError) and error is not peer.last_error:
            return "error", f"the tests raise {type(error).__name__} {error}"
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == "tests.py"]
        location = f"line {lines[-1]} of the tests: " if lines else ""
        return "wrong", f"{location}{type(error).__name__} {error}".strip()
    return "correct", ""


def _impure(tree: ast.AST) -> str:
    """Returns why tests may need the process of the program; empty if they only use pure modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                if name not in _PURE:
                    return f"the tests import {name}"
        elif isinstance(node, ast.Name) and node.id in _OWN:
            return f"the tests use {node.id}"
    return ""


class _Names(dict[str, Any]):
    """The tests' global names. Those that they do not define are the program's; builtins never are."""

    def __init__(self, peer: "_TestPeer") -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._peer = peer
        module = sys.modules["solution"] = types.ModuleType("solution")
        module.__getattr__ = self._get  # type: ignore[method-assign]

    def __missing__(self, name: str) -> Any:
        try:
            return self._get(name)
        except AttributeError:
            raise KeyError(name) from None

    def _get(self, name: str) -> Any:
        if hasattr(builtins, name) or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        value = self._peer.ask("get", None, name)
        if isinstance(value, type):
            self._peer.named_classes.add(value)
        return value


class _TestPeer(Peer):
    """The tests' end of the link.

    Attributes:
        problem: why the program is wrong regardless of what the tests find; empty if it is not.
        is_tainted: whether tests that pass prove nothing.
        named_classes: classes of the program that the tests name, so that its operators are what is tested.
    """

    def __init__(self, incoming: Any, outgoing: Any, verdict_fd: int) -> None:
        super().__init__(incoming, outgoing, parity=0)
        self._verdict_fd = verdict_fd
        self.problem = ""
        self.is_tainted = False
        self.named_classes: set[type] = set()
        self.last_error: BaseException | None = None

    def write_state(self, state: str) -> None:
        """Replaces what the file of the verdict says."""
        os.pwrite(self._verdict_fd, state.encode()[:_STATE_BYTES].ljust(_STATE_BYTES), 0)

    def meet_program(self) -> None:
        """Waits until the program has run."""
        self.write_state(_ASKING)
        if problem := self.receive().get("problem", "no beginning"):
            raise BrokenLinkError(str(problem))
        self.write_state(_STARTED)

    def ask(self, name: str, number: int | None, /, *arguments: Any, **named: Any) -> Any:
        target = self._remote.get(-1 if number is None else number)
        is_plain = type(target) is Proxy or not isinstance(target, Proxy) or isinstance(target, (*self.named_classes,))
        if name == "get" and not is_plain and arguments[0] in _PREDICATES:
            self._taint(target)
        self.write_state(f"{_ASKING} {self.doubt}")
        try:
            return super().ask(name, number, *arguments, **named)
        except BrokenLinkError as error:
            self.problem = self.problem or str(error)
            raise
        except BaseException as error:
            self.last_error = error
            if isinstance(error, NameError):
                self.doubt = self.doubt or f"the program raises {error}"  # it may use names of the tests
            raise
        finally:
            self.write_state(f"{_TESTING} {self.doubt}")

    def perform(self, name: str, target: Any, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Performs what a program may do with what the tests pass to it.

        It may call, iterate and await anything, and use public attributes and operators of objects whose class the
        tests define. Everything else, such as a function's globals, would give it this process.
        """
        first = arguments[0] if arguments else ""
        is_defined_here = type(target).__module__ == "tests"
        is_public = isinstance(first, str) and (not first.startswith("_") or first in _DESCRIPTIONS)
        match name:
            case "special" if first == "__call__" or (is_defined_here and first in SPECIAL):
                return perform_special(target, first, arguments[1:], named)
            case "get" if is_public and (is_defined_here or getattr(target, "__module__", "") == "tests"):
                if first in _DESCRIPTIONS or not isinstance(target, types.FunctionType | types.MethodType):
                    return getattr(target, first)
            case "set" if is_public and is_defined_here and not callable(getattr(type(target), first, None)):
                return setattr(target, *arguments)
            case "next":
                return take_items(target, *arguments)
            case "await":
                return await_coroutine(target)
        self.doubt = self.doubt or f"the program uses {first or name} of an object of the tests"
        raise AttributeError(f"{first or name} of an object of the tests cannot be used")

    def operate(self, target: Any, name: str, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
        """Performs an operator of the program, which does not learn which of several operands the tests have.

        An object that is equal to any operand makes the program wrong. If the tests do not name the object's class,
        they expect a plain value, and an operator of the program does not show that it is right.
        """
        if name not in _JUDGED or self.is_remote(arguments[0]):
            return super().operate(target, name, arguments, named)
        operand = arguments[0]
        is_named = isinstance(target, (ProxyClass, *self.named_classes))
        if isinstance(target, CONTENT) and not is_named:
            return getattr(next(kind for kind in type(target).__mro__ if kind in CONTENT), name)(target, operand)
        if name in ("__eq__", "__ne__") and (content := self.ask("content", target._number)) is not None:
            return (content == operand) is (name == "__eq__")
        if is_named and name not in ("__eq__", "__ne__"):
            return super().operate(target, name, arguments, named)
        operands = [operand, *_decoys(operand, name)]
        secrets.SystemRandom().shuffle(operands)
        results = self.ask("try", target._number, name, operands)
        result = next(value for number, value in enumerate(results) if operands[number] is operand)
        others = [value for number, value in enumerate(results) if operands[number] is not operand]
        if isinstance(result, Exception):
            raise result
        accepted = name != "__ne__"  # what an object says to a value that it accepts
        numbers = [value for value in others if {type(value), type(result)} <= {int, float}]
        has_no_value = name.endswith("sub__") and any(abs(value - result) < 0.5 for value in numbers)
        if has_no_value or (name in (*COMPARISONS, "__contains__") and any(value is accepted for value in others)):
            self.problem = self.problem or "an object of the program that is equal to everything"
            raise BrokenLinkError(self.problem)
        if not is_named and result is not (not accepted) and result is not NotImplemented:
            self._taint(target)
        return result

    def _taint(self, target: Any) -> None:
        self.doubt = f"an operator of the program's class {type(target).__name__} decides"
        self.is_tainted = True


def _decoys(value: Any, name: str) -> list[Any]:
    """Returns operands for which a comparison that accepts a value must not hold."""
    token = secrets.token_hex(8)
    is_below = name in ("__lt__", "__le__")
    match value:
        case bool():
            return [token]
        case int() | float() if name in _ORDERS:
            return [-math.inf if is_below else math.inf]
        case str() if name in _ORDERS:
            return ["" if is_below else "\U0010ffff" * 9]
        case _ if name in _ORDERS:
            return []
        case int() | float():
            return [value + 1 + secrets.randbelow(9), token]
        case str():
            return [value + token, token]
        case list() | tuple():
            return [type(value)([*value, token]), token]
        case dict():
            return [{**value, token: token}, token]
        case set() | frozenset():
            return [value | {token}, token]
    return [token]
