"""Evaluates multiple choice: the most likely choice is the answer. Imports no torch.

A line of the file is `{"id": ..., "context": ..., "choices": [...], "answer": 0}`. The begin-of-sentence token, the
context and a choice are joined without anything between them, so a choice begins with the space that it needs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.chat.fields import describe, list_of, text_of
from data.corpus import DataError
from infer.evaluate.config import EvaluationError, EvaluationTaskConfig, needed_path
from infer.evaluate.lines import check_unique, field_of, key_field, read_lines, text_field
from infer.evaluate.protocol import EvaluationMetric, EvaluationSample, Measure, SimpleTask, TaskContext, TaskDetails
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.requests import ContinuationAnswer, ContinuationRequest, EvaluationAnswer
from infer.evaluate.tokens import target_sequence
from kernels.ranges import NonNegativeInt, PositiveInt

NAME = "choice"
EXAMPLE = 'lines {"id": "1", "context": "1+1=", "choices": ["2", "3"], "answer": 0}'
MOST_CHOICES = 1000
SHOT_SEPARATOR = "\n\n"


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceConfig(EvaluationTaskConfig):
    """Multiple choice.

    Attributes:
        path: `.jsonl` file of questions.
        num_shots: solved examples before each question.
        shots_path: file of the examples; None: the first questions of `path`, which are then not asked.
        limit: maximum number of questions; None: all.
    """

    path: str | None
    num_shots: NonNegativeInt
    shots_path: str | None
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ChoiceQuestion:
    """A question.

    Attributes:
        key: its `id`.
        context: what precedes each choice.
        choices: in order.
        answer: number of the right choice, from 0.
        place: file and line.
    """

    key: str | int
    context: str
    choices: tuple[str, ...]
    answer: int
    place: str


class ChoiceTask(SimpleTask):
    """Questions with choices."""

    metrics = (EvaluationMetric(name="accuracy"), EvaluationMetric(name="accuracy_per_byte"))

    def __init__(self, config: ChoiceConfig, context: TaskContext) -> None:
        """Reads and checks all files.

        Raises:
            EvaluationError, DataError: no file, a line that is not valid, too few examples, or a choice that is longer
                than the model has positions.
        """
        questions = read_questions("choice.path", needed_path("choice.path", config.path, EXAMPLE))
        shots = questions[: config.num_shots]
        if config.num_shots and config.shots_path is not None:
            shots = read_questions("choice.shots_path", config.shots_path)[: config.num_shots]
        elif config.num_shots:
            questions = questions[config.num_shots :]
        if len(shots) < config.num_shots or not questions:
            raise EvaluationError(
                f"choice.num_shots: must leave a question and have as many examples, is {config.num_shots}, there are "
                f"{len(shots)} examples; nearest valid: {max(0, len(shots) - (config.shots_path is None))}"
            )
        self.num_shots = config.num_shots
        self._prefix = "".join(f"{shot.context}{shot.choices[shot.answer]}{SHOT_SEPARATOR}" for shot in shots)
        self._samples = [self._sample(question) for question in questions[: config.limit]]
        for sample in self._samples:
            for request in sample.requests:
                assert isinstance(request, ContinuationRequest)
                target_sequence(context.tokenizer, request, context.max_tokens)  # rejects choices that are too long

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        question: ChoiceQuestion = sample.source
        found = [answer for answer in answers if isinstance(answer, ContinuationAnswer)]
        values = [answer.log_likelihood for answer in found]
        per_byte = [
            value / max(1, len(choice.encode())) for value, choice in zip(values, question.choices, strict=True)
        ]
        return {
            "loglikelihoods": values,
            "is_greedy": [answer.is_greedy for answer in found],
            "answer": question.answer,
            "chosen": values.index(max(values)),
            "chosen_per_byte": per_byte.index(max(per_byte)),
            "num_dropped": max(answer.num_dropped for answer in found),
        }

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`."""
        return {
            "accuracy": Measure(value=float(record["chosen"] == record["answer"])),
            "accuracy_per_byte": Measure(value=float(record["chosen_per_byte"] == record["answer"])),
        }

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: truncated contexts, and the accuracy of guessing."""
        truncated = sum(record["num_dropped"] > 0 for record in records)
        guessing = sum(1 / len(record["loglikelihoods"]) for record in records) / max(1, len(records))
        note = f"{truncated} contexts are longer than the model's positions; their first tokens are dropped"
        values = {"num_truncated": truncated, "accuracy_of_guessing": guessing}
        return TaskDetails(values=values, notes=(note,) if truncated else ())

    def _sample(self, question: ChoiceQuestion) -> EvaluationSample:
        requests = tuple(
            ContinuationRequest(
                context=self._prefix + question.context,
                continuation=choice,
                place=f"{question.place}: choices[{number}]",
            )
            for number, choice in enumerate(question.choices)
        )
        return EvaluationSample(key=question.key, requests=requests, source=question)


def read_questions(key: str, path: str) -> list[ChoiceQuestion]:
    """Reads a file of questions.

    Args:
        key: configuration key of the path.
        path: a `.jsonl` file.

    Raises:
        DataError: names the file, the line, the field and the rule.
    """
    questions = read_lines(key, path, _question)
    check_unique([question.key for question in questions], [question.place for question in questions])
    return questions


def _question(values: Mapping[str, Any], place: str) -> ChoiceQuestion:
    given = list_of(field_of(values, "choices", place), f"{place}: choices")
    if len(given) > MOST_CHOICES:
        raise DataError(f"{place}: choices: must have at most {MOST_CHOICES} items, has {len(given)}")
    choices = tuple(text_of(choice, f"{place}: choices[{number}]") for number, choice in enumerate(given))
    for number, choice in enumerate(choices):
        if not choice:
            raise DataError(f'{place}: choices[{number}]: must have text, is ""; nearest: leave the choice out')
    answer = field_of(values, "answer", place)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise DataError(
            f"{place}: answer: must be the number of a choice, from 0 to {len(choices) - 1}, is {describe(answer)}; "
            f"nearest: {min(max(answer, 0), len(choices) - 1) if type(answer) is int else 0}"
        )
    return ChoiceQuestion(
        key=key_field(values, place),
        context=text_field(values, "context", place),
        choices=choices,
        answer=answer,
        place=place,
    )


def _files(config: ChoiceConfig) -> tuple[str, ...]:
    return tuple(path for path in (config.path, config.shots_path if config.num_shots else None) if path)


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="multiple choice by log-likelihood",
        version=1,
        config=ChoiceConfig,
        build=ChoiceTask,
        files=_files,
        required=("path",),
    ),
)
