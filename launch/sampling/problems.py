"""Reads the problems of `launch.sample`: JSON lines, or generated arithmetic. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from data.arithmetic.problems import Domain, check_domains
from data.arithmetic.problems import problems as arithmetic_problems
from data.chat.fields import decode_line
from data.chat.messages import user
from data.corpus import DataError
from data.problems.records import ProblemRecord, read_problem
from kernels.ranges import NonNegativeInt, PositiveInt

LARGEST_LINE_BYTES = 2**24


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
    """Generated problems: sort or reverse the digits of a number.

    Attributes:
        count: number of problems.
        domains: kinds of problems, in turn.
        num_digits: digits of each.
        part: problems that runs hold out, or those that they may train on.
        generator_seed: seed of the choice.
    """

    kind: Literal["arithmetic"]
    count: PositiveInt
    domains: tuple[Domain, ...]
    num_digits: PositiveInt
    part: Literal["train", "held_out"]
    generator_seed: NonNegativeInt


ProblemsConfig = FileProblemsConfig | ArithmeticProblemsConfig


def load_problems(config: ProblemsConfig) -> list[ProblemRecord]:
    """Returns the problems in order."""
    match config:
        case FileProblemsConfig(path=path):
            return _read_file(Path(path).expanduser())
        case ArithmeticProblemsConfig():
            check_domains(config.domains, "problems.domains")
            made = arithmetic_problems(
                config.generator_seed, config.count, config.num_digits, config.part, config.domains
            )
            return [
                ProblemRecord(
                    key=each.prompt,
                    messages=(user(each.prompt),),
                    answer=each.answer,
                    tests=None,
                    place=f"problems: number {number}",
                )
                for number, each in enumerate(made)
            ]


def digest_problems(problems: Sequence[ProblemRecord]) -> str:
    """Returns a hash of the problems, which identifies them when sampling is resumed."""
    content = [[repr(each.messages), each.answer, repr(each.tests)] for each in problems]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def _read_file(path: Path) -> list[ProblemRecord]:
    found = []
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if len(line) > LARGEST_LINE_BYTES:
                    raise DataError(f"{path}:{number}: must have at most {LARGEST_LINE_BYTES} bytes, has {len(line)}")
                if line.strip():
                    place = f"{path}:{number}"
                    found.append(read_problem(decode_line(line, place), str(number), place, needs_answer=True))
    except OSError as error:
        raise DataError(
            f"problems.path: must be a file of JSON lines, {str(path)!r} cannot be read: {error}"
        ) from error
    if not found:
        raise DataError(f"problems.path: must have at least one problem, {str(path)!r} has none")
    return found
