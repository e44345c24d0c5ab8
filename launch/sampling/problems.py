"""Reads the problems of `launch.sample`: JSON lines, or generated arithmetic. Imports no torch."""

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data.arithmetic.problems import problems as arithmetic_problems
from data.chat.fields import decode_line, describe, list_of, nearest_name, object_of, text_of
from data.chat.messages import ChatMessage, user
from data.chat.records import read_prompt
from data.corpus import DataError
from infer.scoring.score import Problem, StdinTest
from kernels.ranges import NonNegativeInt, PositiveInt

LARGEST_LINE_BYTES = 2**24
_NAMES = ("prompt", "answer", "tests")
_LONGEST_OUTPUT = 2**16  # what the sandbox reads of a program's output


@dataclass(frozen=True, kw_only=True, slots=True)
class FileProblemsConfig:
    """Problems of a file.

    Attributes:
        path: a file of JSON lines with `prompt` and `answer`, or `prompt` and `tests`.
    """

    kind: Literal["file"]
    path: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ArithmeticProblemsConfig:
    """Generated problems: sort the digits of a number.

    Attributes:
        count: number of problems.
        num_digits: digits of each.
        part: problems that runs hold out, or those that they may train on.
        generator_seed: seed of the choice.
    """

    kind: Literal["arithmetic"]
    count: PositiveInt
    num_digits: PositiveInt
    part: Literal["train", "held_out"]
    generator_seed: NonNegativeInt


ProblemsConfig = FileProblemsConfig | ArithmeticProblemsConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleProblem:
    """A problem as the model and the scorers see it.

    Attributes:
        messages: what the model is asked.
        problem: what the scorers compare with.
        place: file and line, for errors.
    """

    messages: tuple[ChatMessage, ...]
    problem: Problem
    place: str


def load_problems(config: ProblemsConfig) -> list[SampleProblem]:
    """Returns the problems in order.

    Raises:
        DataError: a file is missing or empty, or a line is no problem; names the file, the line and the field.
    """
    match config:
        case FileProblemsConfig(path=path):
            return _read_file(Path(path).expanduser())
        case ArithmeticProblemsConfig():
            made = arithmetic_problems(config.generator_seed, config.count, config.num_digits, config.part)
            return [
                SampleProblem(
                    messages=(user(each.prompt),),
                    problem=Problem(prompt=each.prompt, answer=each.answer),
                    place=f"problems: number {number}",
                )
                for number, each in enumerate(made)
            ]


def digest_problems(problems: Sequence[SampleProblem]) -> str:
    """Returns a hash of the problems, which identifies them when sampling is resumed."""
    content = [[repr(each.messages), each.problem.answer, repr(each.problem.tests)] for each in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read_file(path: Path) -> list[SampleProblem]:
    found = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(line) > LARGEST_LINE_BYTES:
                    raise DataError(f"{path}:{number}: must have at most {LARGEST_LINE_BYTES} bytes, has {len(line)}")
                if line.strip():
                    place = f"{path}:{number}"
                    found.append(_read_problem(decode_line(line, place), place))
    except OSError as error:
        raise DataError(
            f"problems.path: must be a file of JSON lines, {str(path)!r} cannot be read: {error}"
        ) from error
    if not found:
        raise DataError(f"problems.path: must have at least one problem, {str(path)!r} has none")
    return found


def _read_problem(values: Mapping[str, Any], place: str) -> SampleProblem:
    if "prompt" not in values:
        raise _missing(values, place, "prompt")
    if values.get("answer") is None and values.get("tests") is None:
        raise _missing(values, place, "answer")
    messages = read_prompt(values["prompt"], f"{place}: prompt")
    answer = None if values.get("answer") is None else text_of(values["answer"], f"{place}: answer")
    if answer is not None and not answer.strip():
        raise DataError(f"{place}: answer: must have text, is {json.dumps(answer)}; nearest: leave the line out")
    tests = None if values.get("tests") is None else _read_tests(values["tests"], f"{place}: tests")
    problem = Problem(prompt=messages[-1].content, answer=answer, tests=tests)
    return SampleProblem(messages=messages, problem=problem, place=place)


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
    """Returns the error of an object that lacks a field."""
    others = [other for other in values if other not in _NAMES]
    needed = name if name == "prompt" else "answer or tests"
    hint = f"{name} instead of {nearest_name(name, others)}" if others else name
    return DataError(
        f"{place}: {needed}: must be given, has the fields {', '.join(list(values)[:8]) or 'none'}; nearest: {hint}"
    )
