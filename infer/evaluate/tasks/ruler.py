"""Evaluates long prompts beyond retrieval of one fact, by subtask and length. Imports no torch.

The greedy answer is searched for all that it must name. A sample's accuracy is the share that it names.
Source: RULER (arXiv:2404.06654).
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from infer.evaluate.requests import EvaluationAnswer, GenerationAnswer, GenerationRequest
from infer.evaluate.statistics import estimate
from infer.evaluate.tasks.haystack import Draws, check_lengths, read_filler
from infer.evaluate.tasks.ruler_problems import RulerProblem, RulerSizes, Subtask, build_prompt, draw_problem
from kernels.ranges import Between, PositiveInt

NAME = "ruler"


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerConfig(EvaluationTaskConfig):
    """Facts spread over a long prompt.

    Attributes:
        subtasks: what is asked.
        lengths: numbers of tokens of prompt and answer; None: an eighth, a quarter, half and all of the model's.
        num_samples: problems of each subtask and length.
        num_facts: facts of multi_key, multi_value and multi_query.
        num_hops: variables after the first one of a chain of variable_tracking.
        num_common: most frequent words of common_words.
        num_digits: digits of each hidden number.
        path: text file of the filler; None: plain sentences.
    """

    subtasks: tuple[Subtask, ...]
    lengths: tuple[PositiveInt, ...] | None
    num_samples: PositiveInt
    num_facts: Annotated[int, Between(1, 100)]
    num_hops: Annotated[int, Between(1, 100)]
    num_common: Annotated[int, Between(1, 100)]
    num_digits: Annotated[int, Between(3, 18)]
    path: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class RulerSample:
    """A problem of a subtask, and its length."""

    subtask: Subtask
    length: int
    problem: RulerProblem


class RulerTask(SimpleTask):
    """Problems of every subtask and length."""

    metrics = (EvaluationMetric(name="accuracy"),)

    def __init__(self, config: RulerConfig, context: TaskContext) -> None:
        """Builds all prompts.

        Raises:
            EvaluationError, DataError: a length that does not fit, or a file that cannot be read.
        """
        if not config.subtasks or len(set(config.subtasks)) < len(config.subtasks):
            raise EvaluationError(
                f"ruler.subtasks: must have at least one subtask, each once, is {list(config.subtasks)}; nearest "
                f"valid: [multi_key]"
            )
        self._config, self._context = config, context
        self._lengths = check_lengths("ruler.lengths", config.lengths, context.max_tokens)
        self._filler = read_filler("ruler.path", config.path, context.tokenizer, context.seed)
        self._samples = [sample for subtask in config.subtasks for sample in self._subtask(subtask)]

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        source: RulerSample = sample.source
        (answer,) = answers
        assert isinstance(answer, GenerationAnswer)
        found = [name for name in source.problem.expected if _names(answer.continuations[0], name)]
        return {
            "subtask": source.subtask,
            "length": source.length,
            "expected": list(source.problem.expected),
            "found": found,
            "answer": answer.continuations[0],
        }

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`."""
        return {"accuracy": Measure(value=len(record["found"]) / len(record["expected"]))}

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: accuracy of each subtask at each length."""
        cells = defaultdict[tuple[Subtask, int], list[Measure]](list)
        for record in records:
            cells[record["subtask"], record["length"]].append(self.measures(record)["accuracy"])
        found = {place: estimate(measures) for place, measures in cells.items()}
        columns = ("subtask", "length", "accuracy", "standard_error", "samples")
        rows = tuple(
            (subtask, length, each.value, each.standard_error, each.num_samples)
            for subtask in self._config.subtasks
            for length in self._lengths
            for each in [found.get((subtask, length))]
            if each is not None
        )
        grid = ResultGrid(
            title="Accuracy by subtask and length",
            x_name="length in tokens",
            y_name="subtask",
            x=tuple(map(str, self._lengths)),
            y=self._config.subtasks,
            values=tuple(
                tuple(found[place].value if place in found else None for place in [(subtask, n) for n in self._lengths])
                for subtask in self._config.subtasks
            ),
        )
        values = {"cells": [dict(zip(columns, row, strict=True)) for row in rows]}
        table = ResultTable(title="Accuracy by subtask and length", columns=columns, rows=rows)
        return TaskDetails(values=values, tables=(table,), grids=(grid,))

    def _subtask(self, subtask: Subtask) -> list[EvaluationSample]:
        """Builds the samples of a subtask. All have equally many tokens for the answer."""
        config, tokenizer = self._config, self._context.tokenizer
        sizes = RulerSizes(
            num_facts=config.num_facts,
            num_hops=config.num_hops,
            num_common=config.num_common,
            num_digits=config.num_digits,
        )
        drawn = {
            (length, number): (draws, draw_problem(subtask, draws, sizes))
            for length in self._lengths
            for number in range(config.num_samples)
            for draws in [Draws(self._context.seed, NAME, subtask, length, number)]
        }
        longest = max(len(tokenizer.encode(" " + ", ".join(each.expected))) for _, each in drawn.values())
        answer_tokens = longest * 3 // 2 + 8
        begin = [] if tokenizer.begin_of_sentence_id is None else [tokenizer.begin_of_sentence_id]
        samples = []
        for (length, number), (draws, problem) in drawn.items():
            prompt = build_prompt(tokenizer, self._filler, problem, draws, length - answer_tokens)
            if prompt is None:
                raise EvaluationError(
                    f"ruler.lengths: must have room for a problem of {subtask}, is {length}; nearest valid: "
                    f"{min(2 * length, self._context.max_tokens)}, or other ruler.subtasks"
                )
            request = GenerationRequest(prompt=(*begin, *prompt.ids), max_new_tokens=answer_tokens)
            source = RulerSample(subtask=subtask, length=length, problem=problem)
            samples.append(EvaluationSample(key=f"{subtask}-{length}-{number}", requests=(request,), source=source))
        return samples


def _names(text: str, name: str) -> bool:
    """Returns whether a text has a name as a whole word."""
    return re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text) is not None


def _files(config: RulerConfig) -> tuple[str, ...]:
    return (config.path,) if config.path else ()


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="several keys, values and queries, variables, and frequent words in long prompts",
        version=1,
        config=RulerConfig,
        build=RulerTask,
        files=_files,
    ),
)
