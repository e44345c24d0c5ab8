"""Evaluates a number hidden in long prompts, by length and depth. Imports no torch.

A hidden number is right if the greedy continuation of the question is this number. All of it is read in one
pass, because each token is the most probable one exactly if greedy decoding would choose it. Guessing finds it with a
probability of 10^-`num_digits`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Annotated, Any

from base.ranges import Between, PositiveInt
from evaluation.haystack import Draws, Filler, check_lengths, hide, read_filler
from evaluation.protocol import (
    ContinuationRequest,
    EvaluationError,
    EvaluationMetric,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    Measure,
    ResultGrid,
    ResultTable,
    TaskContext,
    TaskDetails,
)
from evaluation.statistics import Estimate, estimate, group_by

_FACT = "The secret number of the {} is"


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig(EvaluationTaskConfig):
    """A needle in a haystack. Keys are explained in conf/evaluate.yaml."""

    lengths: tuple[PositiveInt, ...] | None
    depths: tuple[Annotated[float, Between(0, 100)], ...]
    num_samples: PositiveInt
    num_digits: Annotated[int, Between(1, 18)]
    path: str | None


def build_needle(config: NeedleConfig, context: TaskContext) -> EvaluationTask:
    """Builds the task `needle`, with all prompts."""
    if not config.depths or len(set(config.depths)) < len(config.depths):
        rule = "must have at least one depth, each once"
        raise EvaluationError.broken("needle.depths", rule, list(config.depths), "[50]")
    lengths = check_lengths("needle.lengths", config.lengths, context.max_tokens)
    filler = read_filler("needle.path", config.path, context.tokenizer, context.seed)
    samples = [
        _needle(config, context, filler, length, depth, number)
        for length in lengths
        for depth in config.depths
        for number in range(config.num_samples)
    ]
    return EvaluationTask(
        metrics=(EvaluationMetric(name="accuracy"), EvaluationMetric(name="loglikelihood")),
        samples=lambda: samples,
        record=lambda sample, answers: {
            **sample.source,
            "is_right": answers[0].is_greedy,
            "loglikelihood": answers[0].log_likelihood,
        },
        measures=lambda record: {
            "accuracy": Measure(value=float(record["is_right"])),
            "loglikelihood": Measure(value=record["loglikelihood"]),
        },
        details=lambda records: _needle_details(config, records),
    )


def _needle(
    config: NeedleConfig, context: TaskContext, filler: Filler, length: int, depth: float, number: int
) -> EvaluationSample:
    draws = Draws(context.seed, "needle", length, depth, number)
    name = draws.name()
    value = draws.digits(config.num_digits)
    answer = tuple(context.tokenizer.encode(f" {value}"))
    question = f"\n{_FACT.format(name)}"
    fact = (f" {_FACT.format(name)}", f" {value}", ".")
    size = length - len(answer)
    prompt = hide(context.tokenizer, filler, fact, question, depth=depth / 100, size=size, start=draws.below(2**32))
    if prompt is None:
        raise EvaluationError.broken(
            "needle.lengths", "must have room for needle and question", length, min(2 * length, context.max_tokens)
        )
    ids, actual_depth = prompt
    source = {"length": length, "depth": depth, "actual_depth": actual_depth, "name": name, "value": value}
    request = ContinuationRequest(context=ids, continuation=answer, place=f"needle {number}")
    return EvaluationSample(key=f"{length}-{depth:g}-{number}", requests=(request,), source=source)


def _needle_details(config: NeedleConfig, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    rows = []
    for length, group in sorted(group_by(records, "length").items()):
        accuracy = _accuracy(group)
        likelihood = mean(record["loglikelihood"] for record in group)
        rows.append((length, accuracy.value, accuracy.standard_error, likelihood, accuracy.num_samples))
    columns = ("length", "accuracy", "standard_error", "loglikelihood", "samples")
    cells = {cell: _accuracy(group) for cell, group in group_by(records, "depth", "length").items()}
    plain = {key: (cell.value, cell.standard_error, cell.num_samples) for key, cell in cells.items()}
    values = {
        "accuracy_of_guessing": 10.0**-config.num_digits,
        "lengths": {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows},
        "cells": [
            {"length": length, "depth": depth, **dict(zip(columns[1:3] + columns[4:], cell, strict=True))}
            for (depth, length), cell in sorted(plain.items(), key=lambda item: item[0][::-1])
        ],
    }
    table = ResultTable(title="Accuracy by length", columns=columns, rows=tuple(rows))
    lengths = [row[0] for row in rows]
    grid = ResultGrid(
        title="Accuracy by depth and length",
        x_name="length in tokens",
        y_name="depth in percent",
        x=tuple(map(str, lengths)),
        y=tuple(f"{depth:g}" for depth in config.depths),
        values=tuple(tuple(plain.get((depth, length), (None,))[0] for length in lengths) for depth in config.depths),
    )
    return TaskDetails(values=values, tables=(table,), grids=(grid,))


def _accuracy(records: Sequence[Mapping[str, Any]]) -> Estimate:
    return estimate([Measure(value=float(record["is_right"])) for record in records])
