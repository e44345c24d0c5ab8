"""Evaluates weights as a judge, by votes on pairs of answers. Imports no torch.

judge: `{"id": ..., "subset": ..., "prompt": ..., "chosen": ..., "rejected": ...}`, as RewardBench (arXiv:2403.13787).
versus: `{"id": ..., "prompt": ..., "answer_a": ..., "answer_b": ..., "baseline": ...}`, as Arena-Hard
(arXiv:2406.11939) and, with length control, AlpacaEval 2.0 (arXiv:2404.04475). Source of both uses: arXiv:2412.19437,
tables 7 and 8.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from statistics import fmean
from typing import Annotated, Any, Literal

from base.ranges import NonNegativeFloat, PositiveInt
from data.chat.encode import check_tokens
from data.chat.templates import CHAT_TEMPLATES
from evaluation.judge import Judge, JudgePrompt, check_critiques
from evaluation.protocol import (
    EvaluationError,
    EvaluationMetric,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    GenerationAnswer,
    GenerationRequest,
    Measure,
    Record,
    ResultTable,
    TaskContext,
    TaskDetails,
    needed_path,
    path_of,
    read_samples,
    text_field,
)
from evaluation.statistics import NoEstimateError, estimate, group_by, length_controlled_rate, wilson_interval
from infer.config import Sampling
from score.score import Problem, ScoringError, TextAnswer
from score.scorers import JUDGE, JudgeConfig, read_constitution

Details = Callable[[Sequence[Mapping[str, Any]]], TaskDetails]


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedTaskConfig(EvaluationTaskConfig):
    """Pairs of answers, and how they are judged. Keys are explained in conf/evaluate.yaml."""

    path: str | None
    chat_template: Annotated[str, CHAT_TEMPLATES]
    form: Literal["single", "pairs"]
    samples: PositiveInt
    constitution: str
    constitution_path: str | None
    question: str
    mark: str
    accept: str
    reject: str
    thinking: bool
    max_new_tokens: PositiveInt
    temperature: NonNegativeFloat
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedPair:
    """Two answers to a problem, and the part of the file that the pair counts for."""

    problem: Problem
    answers: tuple[TextAnswer, TextAnswer]
    part: str

    @property
    def length_difference(self) -> int:
        """Characters of the first answer minus those of the second."""
        return len(self.answers[0].text) - len(self.answers[1].text)


def judged_files(config: JudgedTaskConfig) -> tuple[str, ...]:
    """Returns the files of pairs and of the constitution."""
    return (*path_of(config), *([config.constitution_path] if config.constitution_path else []))


def _build(
    name: str, names: tuple[str, str, str], rate: str, details: Details, config: JudgedTaskConfig, context: TaskContext
) -> EvaluationTask:
    """Builds a task, given its fields of both answers and of the part, and the name of its first metric."""
    example = f'lines {{"id": "1", "prompt": "1+1?", "{names[0]}": "2", "{names[1]}": "3"}}'
    read = partial(_read_pair, names)
    lines = read_samples(f"{name}.path", needed_path(f"{name}.path", config.path, example), read)[: config.limit]
    judge = _open_judge(name, config, context)
    sampling = Sampling(temperature=config.temperature, seed=context.seed)
    samples = []
    for line in lines:
        prompts = judge.prompts([line.value], [0])
        requests = tuple(
            GenerationRequest(
                prompt=prompt.prompt.tokens,
                max_new_tokens=config.max_new_tokens,
                samples=config.samples,
                sampling=sampling,
            )
            for prompt in prompts
        )
        samples.append(EvaluationSample(key=line.key, requests=requests, source=(line.value, prompts)))
    return EvaluationTask(
        metrics=(EvaluationMetric(name=rate), EvaluationMetric(name="one_vote")),
        samples=lambda: samples,
        record=lambda sample, answers: _record(judge, sample.source[0], sample.source[1], answers),
        measures=lambda record: {
            rate: Measure(value=record["preference"]),
            "one_vote": Measure(value=(1 + record["scores"][0] - record["scores"][1]) / 2),
        },
        details=details,
    )


def _open_judge(name: str, config: JudgedTaskConfig, context: TaskContext) -> Judge:
    """Returns the judge, or refuses settings with which the weights cannot judge."""
    if config.samples > 1 and config.temperature == 0:
        rule = f"must be above 0 if {name}.samples={config.samples}"
        raise EvaluationError.broken(f"{name}.temperature", rule, "0, with which all votes are equal", "1")
    template = CHAT_TEMPLATES.get(config.chat_template)
    check_tokens(template.required_tokens, config.chat_template, context.tokenizer, f"{name}.chat_template")
    keys = [key.name for key in fields(JudgeConfig) if hasattr(config, key.name)]
    try:
        settings = JudgeConfig(
            kind="judge", weight=1.0, weights="policy", **{key: getattr(config, key) for key in keys}
        )
        check_critiques(settings, context.max_tokens, template)
        constitution = read_constitution(settings)
    except ScoringError as error:
        raise EvaluationError(str(error).replace(JUDGE, name)) from error
    return Judge(settings, template, context.tokenizer, constitution, context.max_tokens - config.max_new_tokens)


def _read_pair(names: tuple[str, str, str], values: Mapping[str, Any], place: str) -> JudgedPair:
    first, second, part = names
    answers = [text_field(values, name, place) for name in (first, second)]
    return JudgedPair(
        problem=Problem(prompt=text_field(values, "prompt", place)),
        answers=(TextAnswer(text=answers[0], num_tokens=0), TextAnswer(text=answers[1], num_tokens=0)),
        part=text_field(values, part, place) if values.get(part) is not None else "all",
    )


def _record(
    judge: Judge, pair: JudgedPair, prompts: Sequence[JudgePrompt], answers: Sequence[GenerationAnswer]
) -> Record:
    """Returns which answer the majority of the votes prefers: 1 the first, 0 the second, 0.5 neither."""
    critiques = [text for answer in answers for text in answer.continuations]
    finishes = [finish for answer in answers for finish in answer.finishes]
    votes = [judge.vote(text, finish) for text, finish in zip(critiques, finishes, strict=True)]
    (scores,) = judge.count([pair], prompts, votes)
    values = [score.value for score in scores]
    is_decided = all(score.outcome == "rated" for score in scores)
    margin = values[0] - values[1] if is_decided else 0.0
    return {
        "part": pair.part,
        "preference": 0.5 if margin == 0 else float(margin > 0),
        "scores": values if is_decided else [0.5, 0.5],
        "is_decided": is_decided,
        "votes": votes,
        "critiques": critiques,
        "length_difference": pair.length_difference,
    }


def _undecided(records: Sequence[Mapping[str, Any]]) -> list[str]:
    count = sum(not record["is_decided"] for record in records)
    return [f"{count} pairs have too few valid votes, and count half"] if count else []


def _rates(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the rate of the first answers with its standard error and its interval of 95 %."""
    found = estimate([Measure(value=record["preference"]) for record in records])
    assert found.value is not None
    low, high = wilson_interval(found.value, found.num_samples)
    return {
        "rate": found.value,
        "standard_error": found.standard_error,
        "low": low,
        "high": high,
        "samples": found.num_samples,
    }


def _table(title: str, part: str, rows: Mapping[str, Mapping[str, Any]]) -> ResultTable:
    columns = (part, *next(iter(rows.values()), {}))
    return ResultTable(title=title, columns=columns, rows=tuple((name, *row.values()) for name, row in rows.items()))


def _judge_details(records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    subsets = {subset: _rates(group) for subset, group in sorted(group_by(records, "part").items())}
    values: dict[str, Any] = {"subsets": subsets, "accuracy_of_guessing": 0.5}
    notes = _undecided(records)
    if subsets:
        mean = fmean(row["rate"] for row in subsets.values())
        errors = [row["standard_error"] for row in subsets.values()]
        error = None if None in errors else math.hypot(*errors) / len(errors)
        values |= {"mean_accuracy_of_subsets": mean, "standard_error_of_mean": error}
        spread = "" if error is None else f" +- {error:.4f}"
        notes.append(f"mean accuracy of {len(subsets)} subsets {mean:.4f}{spread}")
    table = _table("Accuracy by subset, with intervals of 95 %", "subset", subsets)
    return TaskDetails(values=values, tables=(table,), notes=tuple(notes))


def _versus_details(records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    baselines: dict[str, dict[str, Any]] = {}
    notes = _undecided(records)
    for baseline, group in sorted(group_by(records, "part").items()):
        controlled: Sequence[float | None] = (None, None, None)
        try:
            controlled = length_controlled_rate(
                [record["preference"] for record in group], [record["length_difference"] for record in group]
            )
            note = "length-controlled win rate {:.4f} (95 %: {:.4f} to {:.4f})".format(*controlled)
        except NoEstimateError as error:
            note = f"no length-controlled win rate: {error}"
        notes.append(f"{baseline}: {note}")
        names = ("length_controlled", "length_controlled_low", "length_controlled_high")
        baselines[baseline] = {**_rates(group), **dict(zip(names, controlled, strict=True))}
    table = _table("Win rate by baseline, with intervals of 95 %", "baseline", baselines)
    return TaskDetails(values={"baselines": baselines}, tables=(table,), notes=tuple(notes))


build_judge = partial(_build, "judge", ("chosen", "rejected", "subset"), "accuracy", _judge_details)
build_versus = partial(_build, "versus", ("answer_a", "answer_b", "baseline"), "win_rate", _versus_details)
