"""Runs a program in the sandbox, and then calls its functions on request of the tests.

The tests run in another sandbox. This process gets the arguments of each call and returns a value. It never sees an
expected value or a verdict, so a program can pass only by computing the right values.
"""

import builtins
import json
import os
import sys
import types
from typing import Any

from infer.scoring.code.guest.limits import apply_limits, read_source
from infer.scoring.code.guest.wire import WireError, decode, encode, receive, send


def main(limits: str, request_fd: str, reply_fd: str) -> None:
    """Runs `program.py` as a module and serves requests until the tests end.

    Args:
        limits: JSON for `apply_limits`.
        request_fd: number of the file descriptor with the tests' requests.
        reply_fd: number of the file descriptor for the replies.
    """
    values = json.loads(limits)
    source = read_source(values, "program.py")
    apply_limits(values)
    requests, replies = os.fdopen(int(request_fd), "rb"), os.fdopen(int(reply_fd), "wb")
    objects = _Objects()
    module = types.ModuleType("solution")
    sys.modules["solution"] = module
    problem = ""
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"[:200]
    while (message := receive(requests)) is not None:
        send(replies, objects.error("RuntimeError", problem) if problem else objects.answer(module, message))


class _Objects:
    """The program's objects that the tests may refer to, by number."""

    def __init__(self) -> None:
        self._objects: list[Any] = []

    def answer(self, module: types.ModuleType, message: dict[str, Any]) -> dict[str, Any]:
        """Returns the reply to a request: a value, or the error that the program raised."""
        try:
            value = self._run(module, message)
            return {"value": encode(value, self._refer)}
        except Exception as error:
            known = isinstance(getattr(builtins, type(error).__name__, None), type)
            return self.error(type(error).__name__ if known else "RuntimeError", str(error)[:200])

    def error(self, kind: str, text: str) -> dict[str, Any]:
        """Returns a reply with an error."""
        return {"error": kind, "text": text}

    def _run(self, module: types.ModuleType, message: dict[str, Any]) -> Any:
        target: Any = self._objects[message["object"]] if "object" in message else module
        if message["do"] == "get":
            return getattr(target, message["name"])
        if message["do"] != "call":
            raise WireError("an unknown request")
        arguments, named = decode(message["arguments"], self._resolve), decode(message["named"], self._resolve)
        return target(*arguments, **named)

    def _refer(self, value: Any) -> list[Any]:
        self._objects.append(value)
        return ["object", len(self._objects) - 1, type(value).__name__]

    def _resolve(self, data: list[Any]) -> Any:
        if data[0] != "object":
            raise WireError("data that is not a value")
        return self._objects[data[1]]
