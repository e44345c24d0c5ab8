"""Evaluates facts spread over long prompts, by length and by depth or subtask. Imports no torch.

needle: a hidden number is right if the greedy continuation of the question is this number. All of it is read in one
pass, because each token is the most probable one exactly if greedy decoding would choose it. Guessing finds it with a
probability of 10^-`num_digits`.
ruler: the greedy answer is searched for all that it must name, and a sample's accuracy is the share that it names.
Source: RULER (arXiv:2404.06654), section 3, in short forms that a base model can complete.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import mean
from typing import Annotated, Any, Literal, get_args

from data.tokenizer import Tokenizer
from infer.evaluate.haystack import (
    Draws,
    Fact,
    Filler,
    HaystackPrompt,
    check_lengths,
    hide,
    num_begin,
    read_filler,
)
from infer.evaluate.protocol import (
    ContinuationRequest,
    EvaluationError,
    EvaluationMetric,
    EvaluationSample,
    EvaluationTask,
    EvaluationTaskConfig,
    GenerationAnswer,
    GenerationRequest,
    Measure,
    Record,
    ResultGrid,
    ResultTable,
    TaskContext,
    TaskDetails,
)
from infer.evaluate.statistics import Estimate, estimate, group_by
from kernels.ranges import Between, PositiveInt

Subtask = Literal["multi_key", "multi_value", "multi_query", "variable_tracking", "common_words"]
SUBTASKS: tuple[Subtask, ...] = get_args(Subtask)
_FACT = "The secret number of the {} is"
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedleConfig(EvaluationTaskConfig):
    """A needle in a haystack. Keys are explained in conf/evaluate.yaml."""

    lengths: tuple[PositiveInt, ...] | None
    depths: tuple[Annotated[float, Between(0, 100)], ...]
    num_samples: PositiveInt
    num_digits: Annotated[int, Between(1, 18)]
    path: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerConfig(EvaluationTaskConfig):
    """Facts spread over a long prompt. Keys are explained in conf/evaluate.yaml."""

    subtasks: tuple[Subtask, ...]
    lengths: tuple[PositiveInt, ...] | None
    num_samples: PositiveInt
    num_facts: Annotated[int, Between(1, 100)]
    num_hops: Annotated[int, Between(1, 100)]
    num_common: Annotated[int, Between(1, 100)]
    num_digits: Annotated[int, Between(3, 18)]
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
    (name,) = draws.names(1)
    value = draws.digits(config.num_digits)
    answer = tuple(context.tokenizer.encode(f" {value}"))
    question = f"\n{_FACT.format(name)}"
    facts = [_secret(name, value, depth / 100)]
    prompt = hide(context.tokenizer, filler, facts, question, length - len(answer), draws.below(2**32))
    if prompt is None:
        raise EvaluationError.broken(
            "needle.lengths", "must have room for needle and question", length, min(2 * length, context.max_tokens)
        )
    source = {"length": length, "depth": depth, "actual_depth": prompt.depths[0], "name": name, "value": value}
    request = ContinuationRequest(context=prompt.ids, continuation=answer, place=f"needle {number}")
    return EvaluationSample(key=f"{length}-{depth:g}-{number}", requests=(request,), source=source)


def _needle_details(config: NeedleConfig, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
    rows = []
    for length, group in sorted(group_by(records, "length").items()):
        accuracy = _accuracy(group)
        likelihood = mean(record["loglikelihood"] for record in group)
        rows.append((length, accuracy.value, accuracy.standard_error, likelihood, accuracy.num_samples))
    columns = ("length", "accuracy", "standard_error", "loglikelihood", "samples")
    cells = {cell: _accuracy(group) for cell, group in group_by(records, "depth", "length").items()}
    values = {
        "accuracy_of_guessing": 10.0**-config.num_digits,
        "lengths": {str(row[0]): dict(zip(columns[1:], row[1:], strict=True)) for row in rows},
        "cells": [
            {"length": length, "depth": depth, **_plain(cells[depth, length])}
            for length, depth in sorted((length, depth) for depth, length in cells)
        ],
    }
    table = ResultTable(title="Accuracy by length", columns=columns, rows=tuple(rows))
    labels = {depth: f"{depth:g}" for depth in config.depths}
    return TaskDetails(
        values=values,
        tables=(table,),
        grids=(_grid("depth", "depth in percent", labels, [row[0] for row in rows], cells),),
    )


def _accuracy(records: Sequence[Mapping[str, Any]]) -> Estimate:
    return estimate([Measure(value=float(record["is_right"])) for record in records])


def _plain(cell: Estimate) -> dict[str, Any]:
    return {"accuracy": cell.value, "standard_error": cell.standard_error, "samples": cell.num_samples}


def _grid(
    row: str, y_name: str, labels: Mapping[Any, str], lengths: Sequence[int], cells: Mapping[tuple[Any, int], Estimate]
) -> ResultGrid:
    return ResultGrid(
        title=f"Accuracy by {row} and length",
        x_name="length in tokens",
        y_name=y_name,
        x=tuple(map(str, lengths)),
        y=tuple(labels.values()),
        values=tuple(
            tuple(cells[key, length].value if (key, length) in cells else None for length in lengths) for key in labels
        ),
    )


def build_ruler(config: RulerConfig, context: TaskContext) -> EvaluationTask:
    """Builds the task `ruler`, with all prompts."""
    if not config.subtasks or len(set(config.subtasks)) < len(config.subtasks):
        raise EvaluationError.broken(
            "ruler.subtasks", "must have at least one subtask, each once", list(config.subtasks), "[multi_key]"
        )
    lengths = check_lengths("ruler.lengths", config.lengths, context.max_tokens)
    filler = read_filler("ruler.path", config.path, context.tokenizer, context.seed)
    samples = [sample for name in config.subtasks for sample in _subtask(config, context, filler, lengths, name)]
    return EvaluationTask(
        metrics=(EvaluationMetric(name="accuracy"),),
        samples=lambda: samples,
        record=_ruler_record,
        measures=lambda record: {"accuracy": _share(record)},
        details=lambda records: _ruler_details(config.subtasks, lengths, records),
    )


def _ruler_record(sample: EvaluationSample, answers: Sequence[GenerationAnswer]) -> Record:
    text = answers[0].continuations[0]
    named = [name for name in sample.source["expected"] if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)]
    return {**sample.source, "found": named, "answer": text}


def _share(record: Mapping[str, Any]) -> Measure:
    return Measure(value=len(record["found"]) / len(record["expected"]))


def _ruler_details(
    subtasks: Sequence[Subtask], lengths: Sequence[int], records: Sequence[Mapping[str, Any]]
) -> TaskDetails:
    groups = group_by(records, "subtask", "length")
    cells = {cell: estimate([_share(record) for record in group]) for cell, group in groups.items()}
    order = [(subtask, length) for subtask in subtasks for length in lengths if (subtask, length) in cells]
    values = [{"subtask": cell[0], "length": cell[1], **_plain(cells[cell])} for cell in order]
    columns = ("subtask", "length", "accuracy", "standard_error", "samples")
    rows = tuple(tuple(cell.values()) for cell in values)
    table = ResultTable(title="Accuracy by subtask and length", columns=columns, rows=rows)
    grid = _grid("subtask", "subtask", dict(zip(subtasks, subtasks, strict=True)), lengths, cells)
    return TaskDetails(values={"cells": values}, tables=(table,), grids=(grid,))


def _subtask(
    config: RulerConfig, context: TaskContext, filler: Filler, lengths: Sequence[int], subtask: Subtask
) -> list[EvaluationSample]:
    """Builds the samples of a subtask. All have equally many tokens for the answer."""
    tokenizer = context.tokenizer
    draws = {
        (length, number): Draws(context.seed, "ruler", subtask, length, number)
        for length in lengths
        for number in range(config.num_samples)
    }
    problems = {cell: _PROBLEMS[subtask](drawn, config) for cell, drawn in draws.items()}
    longest = max(len(tokenizer.encode(" " + ", ".join(problem.expected))) for problem in problems.values())
    answer_tokens = longest * 3 // 2 + 8
    samples = []
    for (length, number), problem in problems.items():
        prompt = _build_prompt(tokenizer, filler, problem, draws[length, number], length - answer_tokens)
        if prompt is None:
            raise EvaluationError(
                f"ruler.lengths: must have room for a problem of {subtask}, is {length}; nearest valid: "
                f"{min(2 * length, context.max_tokens)}, or other ruler.subtasks"
            )
        request = GenerationRequest(prompt=tuple(tokenizer.prompt(prompt.ids)), max_new_tokens=answer_tokens)
        source = {"subtask": subtask, "length": length, "expected": list(problem.expected)}
        samples.append(EvaluationSample(key=f"{subtask}-{length}-{number}", requests=(request,), source=source))
    return samples


@dataclass(frozen=True, kw_only=True, slots=True)
class _Problem:
    """A problem of `ruler`: facts in filler, or frequent words in a list that replaces it, and answers."""

    facts: tuple[Fact, ...]
    question: str
    expected: tuple[str, ...]
    words: tuple[str, ...] = ()


def _hidden_numbers(subtask: Subtask, draws: Draws, config: RulerConfig) -> _Problem:
    """Draws numbers of one name or of several, and asks for one of them or for all."""
    count = config.num_facts
    names = draws.names(1) * count if subtask == "multi_value" else draws.names(count)
    values = _values(draws, config, count)
    expected = tuple(values)
    if subtask == "multi_key":
        asked = draws.below(count)
        expected = (values[asked],)
        question = _FACT.format(names[asked])
    elif subtask == "multi_value":
        question = f"All secret numbers of the {names[0]} are"
    else:
        question = f"The secret numbers of {', '.join(f'the {name}' for name in names)} are"
    facts = [_secret(name, value, draws.below(1001) / 1000) for name, value in zip(names, values, strict=True)]
    return _Problem(facts=tuple(facts), question=f"\n{question}", expected=expected)


def _variable_tracking(draws: Draws, config: RulerConfig) -> _Problem:
    """Draws two chains of assignments, and asks for the variables of one."""
    count = config.num_hops + 1
    codes = draws.different(26**5, 2 * count)
    names = ["".join(_LETTERS[code // 26**digit % 26] for digit in range(5)) for code in codes]
    values = _values(draws, config, 2)
    facts = []
    for chain, value in enumerate(values):
        members = names[chain * count : (chain + 1) * count]
        depths = sorted(draws.below(1001) / 1000 for _ in members)
        sources = [value, *(f"VAR {before}" for before in members)]
        for depth, name, source in zip(depths, members, sources, strict=False):
            facts.append(Fact(depth=depth, parts=(f" VAR {name} =", f" {source}", ".")))
    question = f"\nAll variables with the value {values[0]} are"
    return _Problem(facts=tuple(facts), question=question, expected=tuple(names[:count]))


def _common_words(draws: Draws, config: RulerConfig) -> _Problem:
    common = tuple(draws.names(config.num_common))
    return _Problem(facts=(), question="\nThe most frequent names are", expected=common, words=common)


_PROBLEMS: Mapping[Subtask, Callable[[Draws, RulerConfig], _Problem]] = {
    "multi_key": partial(_hidden_numbers, "multi_key"),
    "multi_value": partial(_hidden_numbers, "multi_value"),
    "multi_query": partial(_hidden_numbers, "multi_query"),
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
}


def _values(draws: Draws, config: RulerConfig, count: int) -> list[str]:
    least = 10 ** (config.num_digits - 1)
    return [str(least + value) for value in draws.different(9 * least, count)]


def _secret(name: str, value: str, depth: float) -> Fact:
    return Fact(depth=depth, parts=(f" {_FACT.format(name)}", f" {value}", "."))


def _build_prompt(
    tokenizer: Tokenizer, filler: Filler, problem: _Problem, draws: Draws, size: int
) -> HaystackPrompt | None:
    """Returns a prompt of `size` tokens, a few less with words as these are whole, or None if too short."""
    if not problem.words:
        return hide(tokenizer, filler, problem.facts, problem.question, size, draws.below(2**32))
    question = tokenizer.encode(problem.question)
    room = size - num_begin(tokenizer) - len(question)
    names = [*problem.words, *(name for name in draws.names(400) if name not in problem.words)]
    encoded = tokenizer.encode_batch([f" {name}," for name in names])
    num_items = room // min(map(len, encoded))
    while (order := _word_list(len(problem.words), len(names), num_items)) is not None:
        if sum(len(encoded[word]) for word in order) <= room:
            ids = [token for word in draws.shuffled(order) for token in encoded[word]]
            return HaystackPrompt(ids=(*ids, *question), depths=())
        num_items -= max(1, num_items // 100)
    return None


def _word_list(num_common: int, num_words: int, num_items: int) -> list[int] | None:
    """Returns about `num_items` words by number, or None if that is too short.

    About half are the first `num_common` ones. Each of these occurs at least twice as often as any other word.
    """
    often = num_items // (2 * num_common)
    if often < 2:
        return None
    num_others = num_items - often * num_common
    rare = max(1, often // 10, -(-num_others // (num_words - num_common)))
    if 2 * rare > often:
        return None
    return [
        *(word for word in range(num_common) for _ in range(often)),
        *(num_common + word for word in range(num_others // rare) for _ in range(rare)),
    ]
