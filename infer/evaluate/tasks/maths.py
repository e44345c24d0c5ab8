r"""Evaluates answers to questions of mathematics: they must be proven equal. Imports no torch.

A line of the file is `{"id": ..., "question": ..., "answer": ...}`. Without a file, problems are generated: sums, which
any model may solve, or digits to sort or reverse, which `data=arithmetic` trains.
"""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np

from data.arithmetic.problems import problems as arithmetic_problems
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
from infer.scoring.answer_text import final_text, last_boxed
from infer.scoring.maths import MathsConfig, MathsScorer
from infer.scoring.ratings import ExactConfig, score_exact
from infer.scoring.score import Answer, FunctionScorer, Problem, Score, Scorer
from kernels.ranges import NonNegativeInt, PositiveFloat, PositiveInt

NAME = "maths"
PLACE = "{question}"
Generator = Literal["sums", "sort", "reverse"]
_OPERATIONS = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True, kw_only=True, slots=True)
class MathsTaskConfig(AnswerTaskConfig):
    """Questions of mathematics.

    Attributes:
        path: `.jsonl` file of questions; None: problems are generated.
        generator: which problems are generated.
        num_problems: number of generated problems.
        num_digits: digits of the numbers in generated problems.
        prompt: text around the question, with `{question}` in it; None: the question alone in a chat, or else
            `Question: ... Answer:`.
        num_shots: solved examples before each question, the first ones of the file; without a chat template only.
        boxed: whether the last box is the answer; otherwise it is the first line with text.
        seconds: deadline of a comparison.
        num_workers: number of processes that compare.
        memory_gib: address space of each of them.
    """

    path: str | None
    generator: Generator
    num_problems: PositiveInt
    num_digits: PositiveInt
    prompt: str | None
    num_shots: NonNegativeInt
    boxed: bool
    seconds: PositiveFloat
    num_workers: PositiveInt
    memory_gib: PositiveFloat


@dataclass(frozen=True, kw_only=True, slots=True)
class MathsQuestion:
    """A question with its answer."""

    key: str | int
    question: str
    answer: str
    place: str


class MathsTask(AnswerTask):
    """Questions of mathematics, perhaps with solved examples."""

    def __init__(self, config: MathsTaskConfig, context: TaskContext) -> None:
        """Reads or generates the questions.

        Raises:
            EvaluationError, DataError, ScoringError: settings or a line that is not valid, or no math-verify.
        """
        check_settings(NAME, config, context)
        questions = _questions(config, context.seed)
        shots = questions[: config.num_shots]
        if config.num_shots and config.chat_template is not None:
            raise EvaluationError(
                f"maths.num_shots: must be 0 with maths.chat_template={config.chat_template}, is {config.num_shots}; "
                f"nearest valid: 0"
            )
        if len(questions) <= config.num_shots:
            raise EvaluationError(
                f"maths.num_shots: must be below the number of questions, {len(questions)}, is {config.num_shots}; "
                f"nearest valid: {len(questions) - 1}"
            )
        form = _form(config)
        prefix = "".join(f"{form.replace(PLACE, each.question)} {each.answer}\n\n" for each in shots)

        def problem(each: MathsQuestion) -> AnswerProblem:
            text = form.replace(PLACE, each.question)
            return AnswerProblem(
                key=each.key, prompt=chat_or_text(config, context, [user(text)], prefix + text), source=each
            )

        super().__init__(config, context, [problem(each) for each in questions[config.num_shots :]], _judge(config))
        self.num_shots = config.num_shots


def _form(config: MathsTaskConfig) -> str:
    if config.prompt is None:
        return PLACE if config.chat_template is not None else f"Question: {PLACE}\nAnswer:"
    if PLACE not in config.prompt:
        raise EvaluationError(
            f"maths.prompt: must have {PLACE} in it, is {config.prompt!r}; nearest valid: 'Question: {PLACE} Answer:'"
        )
    return config.prompt


def _judge(config: MathsTaskConfig) -> AnswerJudge:
    scorer: Scorer
    if config.path is None and config.generator != "sums":
        scorer = FunctionScorer(score_exact, ExactConfig(kind="exact", weight=1.0, boxed=True, ignore_case=False))
    else:
        scorer = MathsScorer(
            MathsConfig(
                kind="maths",
                weight=1.0,
                seconds=config.seconds,
                num_workers=config.num_workers,
                memory_gib=config.memory_gib,
            )
        )
    return AnswerJudge(
        partial(_score, scorer, boxed=config.boxed),
        scorer.close,
        stop=() if config.boxed else ("\n",),
        num_threads=config.num_workers,
    )


def _score(scorer: Scorer, answer: Answer, question: MathsQuestion, *, boxed: bool) -> Score:
    """Scores an answer. Without boxes, its first line with text is put in one for the scorers."""
    if not boxed:
        shown = next((line.strip() for line in final_text(answer.text).splitlines() if line.strip()), "")
        shown = last_boxed(shown) or shown
        answer = Answer(text=f"\\boxed{{{shown}}}" if shown else "", num_tokens=answer.num_tokens)
    return scorer.score(answer, Problem(prompt=question.question, answer=question.answer))


def _questions(config: MathsTaskConfig, seed: int) -> list[MathsQuestion]:
    if config.path is not None:
        questions = read_lines("maths.path", config.path, _question)
        check_unique([each.key for each in questions], [each.place for each in questions])
        return questions
    if config.generator == "sums":
        found = _sums(seed, config.num_problems, config.num_digits)
    else:
        made = arithmetic_problems(seed, config.num_problems, config.num_digits, "held_out", (config.generator,))
        found = [(each.prompt, each.answer) for each in made]
    return [
        MathsQuestion(key=number, question=question, answer=answer, place=f"problem {number}")
        for number, (question, answer) in enumerate(found)
    ]


def _sums(seed: int, count: int, num_digits: int) -> list[tuple[str, str]]:
    """Returns different questions about two numbers, with their answers."""
    if num_digits > 9 or count > 10 ** (2 * num_digits) // 4:
        raise EvaluationError(
            f"maths.num_problems: must be at most {10 ** (2 * min(num_digits, 9)) // 4} with up to 9 digits, is "
            f"{count} with maths.num_digits={num_digits}; nearest valid: 100 with 3"
        )
    generator = np.random.Philox(key=np.array([seed % 2**64, 0x6D61746873], dtype=np.uint64))
    found: dict[str, str] = {}
    while len(found) < count:
        left, right, number = (int(value) for value in generator.random_raw(3))
        symbol = tuple(_OPERATIONS)[number % len(_OPERATIONS)]
        left, right = left % 10**num_digits, right % 10**num_digits
        compute: Callable[[int, int], int] = _OPERATIONS[symbol]
        found.setdefault(f"What is {left} {symbol} {right}?", str(compute(left, right)))
    return list(found.items())


def _question(values: Mapping[str, Any], place: str) -> MathsQuestion:
    answer = values.get("answer")
    # Files of benchmarks have numbers as answers, too.
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        values = {**values, "answer": str(answer)}
    found = MathsQuestion(
        key=key_field(values, place),
        question=text_field(values, "question", place),
        answer=text_field(values, "answer", place),
        place=place,
    )
    for name, text in (("question", found.question), ("answer", found.answer)):
        if not text.strip():
            raise DataError(f'{place}: {name}: must have text, is {text!r}; nearest: "2"')
    return found


def _files(config: MathsTaskConfig) -> tuple[str, ...]:
    return (config.path,) if config.path else ()


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="questions of mathematics, whose answers must be proven equal",
        version=2,
        config=MathsTaskConfig,
        build=MathsTask,
        files=_files,
    ),
)
