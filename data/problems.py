"""Reads problems, and registers their sources: `.jsonl` files and reasoning-gym. Imports no torch.

    {"prompt": ..., "answer": "..."}
    {"prompt": ..., "tests": "assert f(1) == 2"}
    {"prompt": ..., "tests": [{"stdin": "1", "stdout": "2"}]}

A prompt is a string, or a list of messages. `domain` may name the kind of problem, such as maths, and `response` may be
a whole answer from elsewhere, which `launch.sample` can write next to its own. Other fields of the object are ignored.
The samples of all sources are prompts. Source of reasoning-gym: arXiv:2505.24760.
"""

import ast
import hashlib
import importlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from base.ranges import NonNegativeFloat, NonNegativeInt, PositiveInt
from data.chat.encode import encode_prompt
from data.chat.messages import ChatMessage, read_prompt, require_fields, user
from data.chat.sources import ChatLines, lines_entry
from data.chat.templates import CHAT_TEMPLATES
from data.config import DataConfig, with_parts
from data.corpus import DataError, describe, list_of, nearest_name, object_of, optional, refusal, text_of
from data.mix.manifest import Manifest, parse_manifest
from data.mix.mixture import Mixture, hold_out, single_order
from data.pack import WEIGHTS
from data.readers.sources import list_jsonl, read_json_lines
from data.registry import (
    DATA_SOURCES,
    CorpusFile,
    DataSource,
    DataSourceEntry,
    Document,
    SamplePiece,
    TrainingSample,
    field_values,
)
from data.tokenizer import Tokenizer

_ASSERTION = "assert f(1) == 2"
_LONGEST_OUTPUT = 2**16  # what the sandbox reads of a program's output


@dataclass(frozen=True, kw_only=True, slots=True)
class StdinTest:
    """A test of a whole program: its standard input, and the standard output that it must print."""

    stdin: str
    stdout: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemRecord:
    """A problem: what the model is asked, and what a right answer must satisfy."""

    key: str  # equal on every machine; its hash decides whether the problem is held out
    messages: tuple[ChatMessage, ...]  # the prompt; the last message is the user's or a tool's
    answer: str | None  # the expected answer, if there is one
    # assertions as Python source, or inputs with outputs, if the answer is a program.
    tests: str | tuple[StdinTest, ...] | None
    place: str  # file and line, or number, for errors
    origin: str | None = None  # from what a generator made the problem, as JSON text, if its own verifier must find it
    domain: str | None = None  # kind of problem, by which parts of a reward are chosen
    source: str = ""  # name of the source of a mixture
    response: str | None = None  # a whole answer from elsewhere, such as the data that the problem is from

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content


def read_problem(values: Mapping[str, Any], key: str, place: str, *, needs_answer: bool = False) -> ProblemRecord:
    """Returns the problem of an object with a field for answer or tests; if `needs_answer`, not null."""
    require_fields(values, place, ("prompt",))
    if all(values.get(name) is None if needs_answer else name not in values for name in ("answer", "tests")):
        require_fields(values, place, ("answer or tests",))
    messages = read_prompt(values["prompt"], f"{place}: prompt")
    answer = optional(text_of)(values.get("answer"), f"{place}: answer")
    if answer is not None and not answer.strip():
        raise refusal(f"{place}: answer", "must have text", json.dumps(answer), "leave the line out")
    tests = optional(read_tests)(values.get("tests"), f"{place}: tests")
    domain = optional(text_of)(values.get("domain"), f"{place}: domain")
    response = optional(text_of)(values.get("response"), f"{place}: response")
    return ProblemRecord(
        key=key, messages=messages, answer=answer, tests=tests, place=place, domain=domain, response=response
    )


def read_tests(value: object, place: str) -> str | tuple[StdinTest, ...]:
    """Returns the tests of a problem: assertions as Python source, or inputs with outputs."""
    if isinstance(value, list):
        return list_of(value, place, _read_test)
    if not isinstance(value, str):
        rule = "must be Python source, or a list of objects with stdin and stdout"
        raise refusal(place, rule, describe(value), '[{"stdin": "1", "stdout": "2"}]')
    try:
        has_statements = bool(ast.parse(value).body)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise refusal(place, "must be Python", f"not: {error}", _ASSERTION) from error
    if not has_statements:
        raise refusal(place, "must have at least one statement", "without one", _ASSERTION)
    return value


def _read_test(value: object, place: str) -> StdinTest:
    test = StdinTest(**object_of(value, place, {"stdin": text_of, "stdout": text_of}, ("stdin", "stdout")))
    size = len(test.stdout.encode())
    if size >= _LONGEST_OUTPUT:
        raise DataError(f"{place}.stdout: must have fewer than {_LONGEST_OUTPUT} bytes, has {size}")
    return test


def _prompt_samples(
    records: Iterator[ProblemRecord], template_name: str, tokenizer: Tokenizer
) -> Iterator[TrainingSample]:
    """Yields the prompts of problems as samples without targets; an error names the problem's place."""
    for record in records:
        try:
            ids = encode_prompt(record.messages, CHAT_TEMPLATES.get(template_name), tokenizer)
        except DataError as error:
            raise DataError(f"{record.place}: {error}") from error
        tokens = np.asarray(ids, dtype=np.int32)
        piece = SamplePiece(tokens=tokens, values={WEIGHTS: np.zeros(len(tokens), dtype=np.float32)})
        yield TrainingSample(key=record.key, pieces=(piece,), may_be_cut=False)


def _list_problems(source: ChatLines) -> tuple[CorpusFile, ...]:
    return list_jsonl(source.paths, "problems")


def _problems(source: ChatLines) -> Iterator[ProblemRecord]:
    for file in _list_problems(source):
        yield from read_json_lines(file, read_problem, None, "problems")


def _documents(source: DataSource, file: CorpusFile, limit_bytes: int | None) -> Iterator[Document]:
    for record in read_json_lines(file, read_problem, limit_bytes, "problems"):
        text = "\n".join([*(message.content for message in record.messages), record.answer or ""])
        yield Document(key=record.key, text=text)


DATA_SOURCES.register(
    "problems",
    lines_entry(
        summary="problems in .jsonl files, of which the prompts are encoded",
        config=ChatLines,
        files=_list_problems,
        read=_documents,
        samples=lambda source, tokenizer: _prompt_samples(_problems(source), source.template, tokenizer),
        values=lambda source: (WEIGHTS,),
        problems=_problems,
        has_targets=False,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightedProblems:
    """A source of a mixture of problems."""

    name: str  # differs from the other names
    paths: tuple[str, ...]  # .jsonl files, and folders that are searched for them
    weight: NonNegativeFloat  # share of the prompts, relative to the other weights
    domain: str | None = None  # domain of the problems that name none


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemMix(DataSource):
    """Problems of several sources, drawn by weights. A source shorter than its share repeats."""

    sources: tuple[WeightedProblems, ...]
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template

    def __post_init__(self) -> None:
        self.manifest()

    def manifest(self) -> Manifest:
        """Returns the sources as those of a mixture; raises DataError for names or weights that are not valid."""
        sources = [
            {"name": source.name, "paths": list(source.paths), "weight": source.weight} for source in self.sources
        ]
        return parse_manifest({"sources": sources}, "data", Path())

    def plain_weights(self) -> list[object]:
        """Returns what decides the order of prompts and the parts of the reward, without the names of files."""
        return [[source.name, source.weight, source.domain] for source in self.sources]


def _list_mix(source: ProblemMix) -> Iterator[tuple[WeightedProblems, CorpusFile]]:
    names: dict[Path, str] = {}
    for part in source.sources:
        try:
            files = list_jsonl(part.paths, "problems")
        except DataError as error:
            raise DataError(str(error).replace("data.paths", f"data.sources.{part.name}.paths")) from error
        for file in files:
            if (other := names.setdefault(file.path.resolve(), part.name)) != part.name:
                raise DataError(f"data.sources: must name each file once, name {file.path} in {other} and {part.name}")
            yield part, replace(file, key=f"{part.name}/{file.key}")


def _mix_problems(source: ProblemMix) -> Iterator[ProblemRecord]:
    for part, file in _list_mix(source):
        for record in read_json_lines(file, read_problem, None, "problems"):
            yield replace(record, source=part.name, domain=record.domain or part.domain)


def order_problems(source: DataSource, problems: Sequence[ProblemRecord], seed: int) -> Mixture:
    """Returns the order in which a run draws its problems, of which those of one source follow each other."""
    if not isinstance(source, ProblemMix):
        return single_order(len(problems), seed)
    return Mixture(source.manifest(), Counter(problem.source for problem in problems), 1, seed)


def take_turns(problems: Sequence[ProblemRecord], seed: int) -> list[ProblemRecord]:
    """Returns problems of several sources in turns, each permuted; those of one source as they are."""
    counts = list(Counter(problem.source for problem in problems).values())
    return [problems[row] for row in hold_out(counts, seed).rows_N] if len(counts) > 1 else list(problems)


DATA_SOURCES.register(
    "problem_mix",
    lines_entry(
        summary="problems of several .jsonl sources, of which the prompts are drawn by weights",
        config=ProblemMix,
        files=lambda source: tuple(file for _, file in _list_mix(source)),
        read=_documents,
        place=lambda source: "data.sources:",
        settings=lambda source: [source.template, source.plain_weights()],
        samples=lambda source, tokenizer: _prompt_samples(_mix_problems(source), source.template, tokenizer),
        values=lambda source: (WEIGHTS,),
        problems=_mix_problems,
        has_targets=False,
    ),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class GymSource(DataSource):
    """Problems of one of the library's data sets. A prompt that is longer than a sequence is dropped."""

    dataset: str  # name of the data set
    count: PositiveInt  # number of problems, held-out ones included; repeated ones are left out
    generator_seed: NonNegativeInt  # seed of the problems
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template


def _open_dataset(source: GymSource) -> Any:
    """Returns the data set. Raises DataError if the library cannot be imported, or has no such data set."""
    try:
        factory = importlib.import_module("reasoning_gym.factory")
    except ImportError as error:
        rule = f"reasoning_gym needs the library reasoning-gym, which cannot be imported: {error}"
        raise DataError(f"data.kind: {rule}; nearest valid: pip install '.[reasoning]'") from error
    if source.dataset not in factory.DATASETS:
        rule = f"must be one of the {len(factory.DATASETS)} data sets of reasoning-gym"
        near = nearest_name(source.dataset, sorted(factory.DATASETS))
        raise refusal("data.dataset", rule, repr(source.dataset), near)
    return factory.create_dataset(source.dataset, size=source.count, seed=source.generator_seed)


def _gym_problems(source: GymSource) -> Iterator[ProblemRecord]:
    dataset = _open_dataset(source)
    questions = set[str]()
    for index in range(source.count):
        entry = dataset[index]
        question = str(entry["question"])
        if question in questions:
            continue
        questions.add(question)
        origin = {"dataset": source.dataset, "seed": source.generator_seed, "size": source.count, "index": index}
        yield ProblemRecord(
            # The same question from another seed is in the same part.
            key=f"{source.dataset}:{hashlib.sha256(question.encode()).hexdigest()[:16]}",
            messages=(user(question),),
            answer=None if entry["answer"] is None else str(entry["answer"]),
            tests=None,
            place=f"data.dataset={source.dataset}, problem {index}",
            origin=json.dumps(origin),
            domain=source.dataset,
        )


def _check_gym(source: GymSource, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        rule = "must be given with data=reasoning_gym, which has no text to train one on"
        raise refusal("data.tokenizer", rule, "null", "data.tokenizer=FOLDER, or auto with init_from")
    _open_dataset(source)


def _gym_settings(source: GymSource) -> list[object]:
    try:
        library = version("reasoning-gym")
    except PackageNotFoundError:
        library = ""
    return [field_values(source), library]


DATA_SOURCES.register(
    "reasoning_gym",
    DataSourceEntry(
        summary="problems that the library reasoning-gym generates",
        config=GymSource,
        place=lambda source: f"data.dataset: {source.dataset!r}",
        settings=_gym_settings,
        samples=lambda source, tokenizer: _prompt_samples(_gym_problems(source), source.template, tokenizer),
        check=_check_gym,
        values=lambda source: (WEIGHTS,),
        problems=_gym_problems,
        has_targets=False,
    ),
)


def split_problems(config: DataConfig) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on and those that are held out, split as the source's samples are."""
    entry = DATA_SOURCES.get(config.source.kind)
    if entry.problems is None:
        valid = [name for name, candidate in DATA_SOURCES.items() if candidate.problems is not None]
        raise refusal("data.kind", "must be a source with problems", config.source.kind, ", ".join(valid))
    numbered = list(with_parts(config, entry.problems))
    train, held_out = ([record for part, record in numbered if part == name] for name in ("train", "validation"))
    if not train:
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(held_out)} problems, selected by hash "
            f"with data.seed {config.seed}, leaves none to train on; nearest: a smaller fraction, or more problems"
        )
    return train, held_out
