"""Calls a function of a user's file. Runs as a worker of a pool.

Arguments: the file, the name of the function, and the SHA-256 of the file. It imports nothing from this project, so
that it starts quickly.
"""

import hashlib
import importlib.util
import inspect
import json
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, TextIO

_OUTCOMES = ("correct", "wrong", "missing", "rated")
_FIELDS = ("score", "outcome", "detail")
_LONGEST_DETAIL = 300


class FunctionError(Exception):
    """A file without a function to call, or a result that is no score."""


def main() -> None:
    """Answers requests until the input ends."""
    requests, replies = _take_streams()
    path = Path(sys.argv[1])
    name = sys.argv[2]
    digest = sys.argv[3]
    try:
        function = load_function(path, name, digest)
    except FunctionError as error:
        _print(replies, {"error": str(error)})
        return
    _print(replies, {"ready": True})
    for line in requests:
        message = json.loads(line)
        try:
            reply = to_reply(function(message["prompt"], message["answer"], message["expected"]))
        except FunctionError as error:
            reply = {"error": str(error)}
        except (Exception, SystemExit) as error:
            reply = {"error": _describe(error, path)}
        _print(replies, reply)


def load_function(path: Path, name: str, digest: str) -> Callable[..., object]:
    """Returns a function of a file, or raises `FunctionError` if it has none or its SHA-256 changed."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FunctionError(f"cannot be read: {error.strerror}") from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise FunctionError("changed during the run")
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise FunctionError("must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise FunctionError(f"cannot be imported: {_describe(error, path)}") from error
    return _find(module, name)


def to_reply(result: object) -> dict[str, Any]:
    """Returns the reply of a function's result: a number, or a dict with `score`."""
    if not isinstance(result, dict):
        return {"value": _number(result), "outcome": "rated", "detail": ""}
    unknown = [name for name in result if name not in _FIELDS]
    if unknown or "score" not in result:
        wrong = f"has {unknown[0]!r}" if unknown else "has no 'score'"
        raise FunctionError(f"must return a number or a dict with {', '.join(_FIELDS)}, {wrong}"[:_LONGEST_DETAIL])
    outcome = result.get("outcome", "rated")
    if outcome not in _OUTCOMES:
        raise FunctionError(f"outcome must be one of {', '.join(_OUTCOMES)}, is {outcome!r}"[:_LONGEST_DETAIL])
    detail = str(result.get("detail", ""))[:_LONGEST_DETAIL]
    return {"value": _number(result["score"]), "outcome": outcome, "detail": detail}


def _number(value: object) -> float:
    if not isinstance(value, numbers.Real):
        kind = "None" if value is None else f"a value of type {type(value).__name__}"
        raise FunctionError(f"must return a number, returned {kind}")
    number = float(value)
    if not math.isfinite(number):
        raise FunctionError(f"must return a finite number, returned {number}")
    return number


def _find(module: ModuleType, name: str) -> Callable[..., object]:
    function = getattr(module, name, None)
    if callable(function):
        try:
            inspect.signature(function).bind("", "", None)
        except TypeError as error:
            raise FunctionError(f"{name} must take prompt, answer and expected, does not: {error}") from error
        except ValueError:
            pass  # a builtin without a signature
        return function  # type: ignore[no-any-return]
    names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    raise FunctionError(f"has no function {name}; nearest valid: {', '.join(names[:5]) or 'a file with one'}")


def _describe(error: BaseException, path: Path) -> str:
    """Returns an error in one line, with the last line of the user's file that it passed."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    text = " ".join(f"{type(error).__name__}: {error}".split())[:_LONGEST_DETAIL]
    return f"line {lines[-1]}: {text}" if lines else text


def _take_streams() -> tuple[TextIO, TextIO]:
    """Returns input and output for messages. What the user's function prints or reads never reaches them."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1):
        os.dup2(null, descriptor)
    return requests, replies


def _print(replies: TextIO, message: dict[str, Any]) -> None:
    replies.write(json.dumps(message) + "\n")
    replies.flush()


if __name__ == "__main__":
    main()
