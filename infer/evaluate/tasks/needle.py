"""Evaluates retrieval of a number that is hidden in filler text, by depth and length.

Imports no torch.

A needle is right if the greedy continuation of the question is the hidden number. All of it is read in one pass,
because each token is the most probable one exactly if greedy decoding would choose it. Guessing finds it with a
probability of 10^-`num_digits`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any

from infer.evaluate.config import EvaluationError, EvaluationTaskConfig
from infer.evaluate.protocol import (
    EvaluationMetric,
    EvaluationSample,
    Measure,
    ResultGrid,
    ResultTable,
    SimpleTask,
    TaskContext,
    TaskDetails,
)
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.requests import ContinuationAnswer, ContinuationRequest, EvaluationAnswer
from infer.evaluate.statistics import estimate
from infer.evaluate.tasks.haystack import Draws, Fact, Filler, check_lengths, hide, read_filler
from kernels.ranges import Between, PositiveInt

NAME = "needle"
FACT = "The secret number of the {name} is"
Percent = Annotated[float, Between(0, 100)]
NumDigits = Annotated[int, Between(1, 18)]


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig(EvaluationTaskConfig):
    """A needle in a haystack.

    Attributes:
        lengths: numbers of tokens of prompt and answer; None: an eighth, a quarter, half and all of the model's.
        depths: where the needle is, in percent of the filler: 0 is the beginning.
        num_samples: needles of each length and depth.
        num_digits: digits of the hidden number.
        path: text file of the filler; None: plain sentences.
    """

    lengths: tuple[PositiveInt, ...] | None
    depths: tuple[Percent, ...]
    num_samples: PositiveInt
    num_digits: NumDigits
    path: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Needle:
    """A hidden number: its name, its value, and where it is."""

    name: str
    value: str
    length: int
    depth: float
    actual_depth: float


class NeedleTask(SimpleTask):
    """Needles of every length and depth."""

    metrics = (EvaluationMetric(name="accuracy"), EvaluationMetric(name="loglikelihood"))

    def __init__(self, config: NeedleConfig, context: TaskContext) -> None:
        """Builds all prompts.

        Raises:
            EvaluationError, DataError: a length that does not fit, or a file that cannot be read.
        """
        if not config.depths or len(set(config.depths)) < len(config.depths):
            raise EvaluationError(
                f"needle.depths: must have at least one depth, each once, is {list(config.depths)}; nearest valid: [50]"
            )
        lengths = check_lengths("needle.lengths", config.lengths, context.max_tokens)
        filler = read_filler("needle.path", config.path, context.tokenizer, context.seed)
        self._config, self._lengths = config, lengths
        self._samples = [
            self._sample(context, filler, length, depth, number)
            for length in lengths
            for depth in config.depths
            for number in range(config.num_samples)
        ]

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        needle: Needle = sample.source
        (answer,) = answers
        assert isinstance(answer, ContinuationAnswer)
        return {
            "length": needle.length,
            "depth": needle.depth,
            "actual_depth": needle.actual_depth,
            "name": needle.name,
            "value": needle.value,
            "is_right": answer.is_greedy,
            "loglikelihood": answer.log_likelihood,
        }

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`."""
        return {
            "accuracy": Measure(value=float(record["is_right"])),
            "loglikelihood": Measure(value=record["loglikelihood"]),
        }

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: accuracy by length, and a heat map by depth and length."""
        cells = defaultdict[tuple[int, float], list[Mapping[str, Any]]](list)
        by_length = defaultdict[int, list[Mapping[str, Any]]](list)
        for record in records:
            cells[record["length"], record["depth"]].append(record)
            by_length[record["length"]].append(record)
        lengths, depths = sorted(by_length), self._config.depths
        rows = []
        for length in lengths:
            found = estimate([self.measures(record)["accuracy"] for record in by_length[length]])
            likelihood = mean(record["loglikelihood"] for record in by_length[length])
            rows.append((length, found.value, found.standard_error, likelihood, found.num_samples))
        columns = ("length", "accuracy", "standard_error", "loglikelihood", "samples")
        accuracy = {place: mean(float(record["is_right"]) for record in found) for place, found in cells.items()}
        grid = ResultGrid(
            title="Accuracy by depth and length",
            x_name="length in tokens",
            y_name="depth in percent",
            x=tuple(str(length) for length in lengths),
            y=tuple(f"{depth:g}" for depth in depths),
            values=tuple(tuple(accuracy.get((length, depth)) for length in lengths) for depth in depths),
        )
        values = {
            "accuracy_of_guessing": 10.0**-self._config.num_digits,
            "lengths": {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows},
            "cells": [
                {
                    "length": length,
                    "depth": depth,
                    "accuracy": accuracy[length, depth],
                    "standard_error": estimate(
                        [self.measures(record)["accuracy"] for record in cells[length, depth]]
                    ).standard_error,
                    "samples": len(cells[length, depth]),
                }
                for length, depth in sorted(cells)
            ],
        }
        table = ResultTable(title="Accuracy by length", columns=columns, rows=tuple(rows))
        return TaskDetails(values=values, tables=(table,), grids=(grid,))

    def _sample(self, context: TaskContext, filler: Filler, length: int, depth: float, number: int) -> EvaluationSample:
        draws = Draws(context.seed, NAME, length, depth, number)
        (name,), value = draws.names(1), draws.digits(self._config.num_digits)
        answer = tuple(context.tokenizer.encode(f" {value}"))
        fact = FACT.format(name=name)
        prompt = hide(
            context.tokenizer,
            filler,
            [Fact(depth=depth / 100, parts=(f" {fact}", f" {value}", "."))],
            f"\n{fact}",
            length - len(answer),
            draws.below(2**32),
        )
        if prompt is None:
            raise EvaluationError(
                f"needle.lengths: must have room for needle and question, is {length}; nearest valid: "
                f"{min(2 * length, context.max_tokens)}"
            )
        return EvaluationSample(
            key=f"{length}-{depth:g}-{number}",
            requests=(ContinuationRequest(context=prompt.ids, continuation=answer, place=f"needle {number}"),),
            source=Needle(name=name, value=value, length=length, depth=depth, actual_depth=prompt.depths[0]),
        )


def _files(config: NeedleConfig) -> tuple[str, ...]:
    return (config.path,) if config.path else ()


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="a number hidden in text, by depth and length",
        version=1,
        config=NeedleConfig,
        build=NeedleTask,
        files=_files,
    ),
)
