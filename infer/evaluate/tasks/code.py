r"""Evaluates programs: a model completes a function, and the problem's tests decide. Imports no torch.

Programs run in a sandbox (`infer.scoring.code`). The 20 problems next to this file are the project's own; a line of
another file is `{"id": ..., "prompt": "def f(x):\n    ...", "tests": "assert f(1) == 2"}`.
"""

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.chat.messages import user
from data.corpus import DataError
from infer.evaluate.config import EvaluationError
from infer.evaluate.lines import check_unique, key_field, read_lines, text_field
from infer.evaluate.protocol import TaskContext
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.tasks.answering import (
    AnswerJudge,
    AnswerProblem,
    AnswerTask,
    AnswerTaskConfig,
    chat_or_text,
    check_settings,
)
from infer.scoring.answer_text import final_text, last_code
from infer.scoring.code.find import IsolationChoice
from infer.scoring.code.scorer import CodeConfig, CodeScorer
from infer.scoring.score import Answer, Score, ScoringError, failure
from kernels.ranges import PositiveFloat, PositiveInt

NAME = "code"
OWN_PROBLEMS = Path(__file__).with_name("code_problems.jsonl")
STOP = ("\nclass ", "\ndef ", "\nif ", "\nprint(", "\nassert ", "\nimport ", "\nfrom ", "\n#", "\n@", "\n```", '\n"""')
_INSTRUCTION = "Complete this Python program. Answer with the whole program in one block of code.\n\n```python\n{}```"


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeTaskConfig(AnswerTaskConfig):
    """Programs that a model completes.

    Attributes:
        path: `.jsonl` file of problems; None: the project's own.
        isolation: level of isolation of the programs, as in `CodeConfig`.
        cpu_seconds: processor time of a program with all its tests.
        wall_seconds: time after which a program without a verdict is stopped.
        memory_mib: address space of each process.
        num_sandboxes: number of programs that run at the same time.
    """

    path: str | None
    isolation: IsolationChoice
    cpu_seconds: PositiveFloat
    wall_seconds: PositiveFloat
    memory_mib: PositiveInt
    num_sandboxes: PositiveInt


@dataclass(frozen=True, kw_only=True, slots=True)
class CodeProblem:
    """A problem: its `id`, the beginning of a program, and assertions.

    `solution` is a right completion, if the file has one.
    """

    key: str | int
    prompt: str
    tests: str
    place: str
    solution: str | None = None


def read_code_problems(key: str, path: str) -> list[CodeProblem]:
    """Reads a file of problems.

    Args:
        key: configuration key of the path.
        path: a `.jsonl` file.

    Raises:
        DataError: names the file, the line, the field and the rule.
    """
    problems = read_lines(key, path, _problem)
    check_unique([problem.key for problem in problems], [problem.place for problem in problems])
    return problems


def _problem(values: Mapping[str, Any], place: str) -> CodeProblem:
    tests = text_field(values, "tests", place)
    try:
        has_statement = bool(ast.parse(tests).body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise DataError(f"{place}: tests: must be Python, is not: {error}; nearest: assert f(1) == 2") from error
    if not has_statement:
        raise DataError(f"{place}: tests: must have a statement, has none; nearest: assert f(1) == 2")
    prompt = text_field(values, "prompt", place)
    if not prompt.strip():
        raise DataError(f"{place}: prompt: must have text, has none; nearest: the first lines of a function")
    return CodeProblem(
        key=key_field(values, place),
        prompt=prompt,
        tests=tests,
        place=place,
        solution=text_field(values, "solution", place) if values.get("solution") is not None else None,
    )


def build_judge(config: CodeTaskConfig) -> AnswerJudge:
    """Finds a sandbox, and returns what runs programs in it.

    Raises:
        EvaluationError: this machine has no sandbox, and the user does not accept the risk.
    """
    try:
        scorer = CodeScorer(
            CodeConfig(
                kind="code",
                weight=1.0,
                cpu_seconds=config.cpu_seconds,
                wall_seconds=config.wall_seconds,
                memory_mib=config.memory_mib,
                num_sandboxes=config.num_sandboxes,
                isolation=config.isolation,
            )
        )
    except ScoringError as error:
        raise EvaluationError(f"code.{error}") from error

    def score(answer: Answer, problem: CodeProblem) -> Score:
        if config.chat_template is None:
            return scorer.score_program(problem.prompt + answer.text, problem.tests)
        program = last_code(final_text(answer.text))
        if program is None or not program.strip():
            return failure("missing", "no block of code after the thoughts")
        return scorer.score_program(program, problem.tests)

    facts = {"isolation": scorer.isolation}
    return AnswerJudge(score, scorer.close, stop=STOP, num_threads=config.num_sandboxes, facts=facts)


def build_code_task(config: CodeTaskConfig, context: TaskContext) -> AnswerTask:
    """Reads the problems and finds a sandbox.

    Raises:
        EvaluationError, DataError: settings or a line that is not valid, or no sandbox.
    """
    check_settings(NAME, config, context)
    problems = [
        AnswerProblem(
            key=problem.key,
            prompt=chat_or_text(config, context, [user(_INSTRUCTION.format(problem.prompt))], problem.prompt),
            source=problem,
        )
        for problem in read_code_problems("code.path", config.path or str(OWN_PROBLEMS))
    ]
    return AnswerTask(config, context, problems, build_judge(config))


def _files(config: CodeTaskConfig) -> tuple[str, ...]:
    return (config.path or str(OWN_PROBLEMS),)


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="programs that tests in a sandbox judge, with pass@k",
        version=1,
        config=CodeTaskConfig,
        build=build_code_task,
        files=_files,
    ),
)
