"""Evaluates a number hidden in long prompts, by length and depth. Imports no torch.

A hidden number is right if the greedy continuation of the question is this number. All of it is read in one
pass, because each token is the most probable one exactly if greedy decoding would choose it. Guessing finds it with a
probability of 10^-`num_digits`. The first part of this file builds prompts of an exact number of tokens: a fact hidden
in filler text.
"""

import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import numpy as np
import yaml

from base.ranges import Between, PositiveInt
from data.corpus import DataError
from data.tokenizer import Tokenizer
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
    checked_file,
    read_text,
)
from evaluation.statistics import Estimate, estimate, group_by

_WORDS: dict[str, str] = yaml.safe_load(Path(__file__).with_name("needle_words.yaml").read_text("utf-8"))
_SENTENCES = re.findall(r"[A-Z][^.]+\.", _WORDS["sentences"])
ADJECTIVES = _WORDS["adjectives"].split()
NOUNS = _WORDS["nouns"].split()
# Its white space, and text up to the end of a line or to a mark before white space.
_SENTENCE = re.compile(r"\s*+(?=\S).*?(?:\n|[.!?](?=\s)|\Z)", re.DOTALL)


class Draws:
    """Random choices that depend only on a seed and names, on every machine."""

    def __init__(self, seed: int, *names: object) -> None:
        digest = hashlib.sha256(repr((seed, *names)).encode()).digest()
        self._bits = np.random.Philox(key=np.frombuffer(digest[:16], dtype="<u8").astype(np.uint64))

    def below(self, limit: int) -> int:
        """Returns a number from 0 to below a limit."""
        return int(self._bits.random_raw()) % limit

    def shuffled(self, items: Sequence[int]) -> list[int]:
        """Returns the items in random order."""
        order = list(items)
        for last in range(len(order) - 1, 0, -1):
            position = self.below(last + 1)
            order[last], order[position] = order[position], order[last]
        return order

    def digits(self, count: int) -> str:
        """Returns a number of so many digits, the first not 0."""
        return str(10 ** (count - 1) + self.below(9 * 10 ** (count - 1)))

    def name(self) -> str:
        """Returns a name of two words."""
        adjective, noun = divmod(self.below(len(ADJECTIVES) * len(NOUNS)), len(NOUNS))
        return f"{ADJECTIVES[adjective]} {NOUNS[noun]}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Filler:
    """Token ids of filler text, and places in them where a sentence ends."""

    ids: tuple[int, ...]
    ends: tuple[int, ...]

    def take(self, count: int, start: int) -> tuple[list[int], list[int]]:
        """Returns repeated tokens from the sentence on that `start` chooses, and where sentences end."""
        first = (0, *self.ends[:-1])[start % len(self.ends)]
        turned = [*self.ids[first:], *self.ids[:first]]
        size = len(turned)
        ids = (turned * (count // size + 1))[:count]
        ends = sorted({(end - first) % size or size for end in self.ends})
        cuts = [turn * size + end for turn in range(count // size + 1) for end in ends]
        return ids, [0, *(cut for cut in cuts if cut <= count)]


def read_filler(key: str, path: str | None, tokenizer: Tokenizer, seed: int) -> Filler:
    """Returns filler: a text file, or plain sentences in a random order."""
    if path is None:
        draws = Draws(seed, "sentences")
        order = [at for _ in range(20) for at in draws.shuffled(range(len(_SENTENCES)))]
        sentences = [f" {_SENTENCES[at]}" for at in order]
    else:
        # With one kind of line ends.
        text = io.StringIO(read_text(key, checked_file(key, path)), newline=None).read()
        sentences = _SENTENCE.findall(text)
    ids: list[int] = []
    ends: list[int] = []
    for tokens in tokenizer.encode_batch(sentences):
        if tokens:
            ids += tokens
            ends.append(len(ids))
    if not ends:
        raise DataError(f"{key}: {path} must have text, has none; nearest: {key}=null")
    return Filler(ids=tuple(ids), ends=tuple(ends))


def hide(
    tokenizer: Tokenizer, filler: Filler, fact: Sequence[str], question: str, *, depth: float, size: int, start: int
) -> tuple[tuple[int, ...], float] | None:
    """Returns a prompt of `size` tokens with a fact in filler and a question, or None if they do not fit.

    Args:
        fact: parts that are tokenized separately.
        depth: where the fact should be, from 0 to 1.

    Returns:
        The token ids without the begin of sentence, and the depth of the fact.
    """
    *parts, end = tokenizer.encode_batch([*fact, question])
    hidden = [token for part in parts for token in part]
    count = size - int(tokenizer.special.bos is not None) - len(hidden) - len(end)
    if count < 0:
        return None
    around, ends = filler.take(count, start)
    position = min(ends, key=lambda cut: abs(cut - depth * count))
    return (*around[:position], *hidden, *around[position:], *end), position / max(1, count)


def check_lengths(key: str, lengths: Sequence[int] | None, max_tokens: int) -> tuple[int, ...]:
    """Returns the lengths of prompts with answers: by default 1/8, 1/4, 1/2 and all of the positions."""
    if lengths is None:
        return tuple(sorted({max(1, max_tokens // part) for part in (8, 4, 2, 1)}))
    for length in lengths:
        if length > max_tokens:
            rule = f"must be at most model.max_position_tokens={max_tokens}"
            raise EvaluationError.broken(key, rule, length, max_tokens)
    if not lengths or len(set(lengths)) < len(lengths):
        raise EvaluationError.broken(key, "must have at least one length, each once", list(lengths), f"[{max_tokens}]")
    return tuple(lengths)


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
        near = min(2 * length, context.max_tokens)
        raise EvaluationError.broken("needle.lengths", "must have room for needle and question", length, near)
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
