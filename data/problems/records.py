"""Reads problems from JSON objects. Imports no torch.

    {"prompt": ..., "answer": "..."}
    {"prompt": ..., "tests": "assert f(1) == 2"}
    {"prompt": ..., "tests": [{"stdin": "1", "stdout": "2"}]}

A prompt is a string, or a list of messages. Other fields of the object are ignored.
"""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data.chat.fields import describe, list_of, nearest_name, object_of, text_of
from data.chat.messages import ChatMessage
from data.chat.records import read_prompt
from data.corpus import DataError

_NAMES = ("prompt", "answer", "tests")
_LONGEST_OUTPUT = 2**16  # what the sandbox reads of a program's output


@dataclass(frozen=True, kw_only=True, slots=True)
class StdinTest:
    """A test of a whole program: its standard input, and the standard output that it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemRecord:
    """A problem: what the model is asked, and what a right answer must satisfy."""

    key: str  # equal on every machine; its hash decides whether the problem is held out
    messages: tuple[ChatMessage, ...]  # the prompt; the last message is the user's or a tool's
    answer: str | None  # the expected answer, if there is one
    # assertions as Python source, or inputs with outputs, if the answer is a program.
    tests: str | tuple[StdinTest, ...] | None
    place: str  # file and line, or number, for errors
    origin: str | None = None  # from what a generator made the problem, as JSON text, if its own verifier must find it

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content


def read_problem(values: Mapping[str, Any], key: str, place: str, *, needs_answer: bool) -> ProblemRecord:
    """Returns the problem of an object with a field for answer or tests; if `needs_answer`, not null."""
    if "prompt" not in values:
        raise _missing(values, place, "prompt")
    if all(values.get(name) is None if needs_answer else name not in values for name in ("answer", "tests")):
        raise _missing(values, place, "answer")
    messages = read_prompt(values["prompt"], f"{place}: prompt")
    answer = None if values.get("answer") is None else text_of(values["answer"], f"{place}: answer")
    if answer is not None and not answer.strip():
        raise DataError(f"{place}: answer: must have text, is {json.dumps(answer)}; nearest: leave the line out")
    tests = None if values.get("tests") is None else _read_tests(values["tests"], f"{place}: tests")
    return ProblemRecord(key=key, messages=messages, answer=answer, tests=tests, place=place)


def _read_tests(value: object, place: str) -> str | tuple[StdinTest, ...]:
    if isinstance(value, str):
        source = text_of(value, place)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"{place}: must be Python, is not: {error}; nearest: assert f(1) == 2") from error
        if not tree.body:
            raise DataError(f"{place}: must have at least one statement, has none; nearest: assert f(1) == 2")
        return source
    if not isinstance(value, list):
        raise DataError(
            f"{place}: must be Python source, or a list of objects with stdin and stdout, is {describe(value)}; "
            f'nearest: [{{"stdin": "1", "stdout": "2"}}]'
        )
    return tuple(_read_test(item, f"{place}[{index}]") for index, item in enumerate(list_of(value, place)))


def _read_test(value: object, place: str) -> StdinTest:
    values = object_of(value, place, ("stdin", "stdout"), required=("stdin", "stdout"))
    test = StdinTest(
        stdin=text_of(values["stdin"], f"{place}.stdin"), stdout=text_of(values["stdout"], f"{place}.stdout")
    )
    if len(test.stdout.encode()) >= _LONGEST_OUTPUT:
        raise DataError(
            f"{place}.stdout: must have fewer than {_LONGEST_OUTPUT} bytes, has {len(test.stdout.encode())}"
        )
    return test


def _missing(values: Mapping[str, Any], place: str, name: str) -> DataError:
    others = [other for other in values if other not in _NAMES]
    needed = name if name == "prompt" else "answer or tests"
    hint = f"{name} instead of {nearest_name(name, others)}" if others else name
    return DataError(
        f"{place}: {needed}: must be given, has the fields {', '.join(list(values)[:8]) or 'none'}; nearest: {hint}"
    )
