"""Reads problems, and registers their sources: `.jsonl` files and reasoning-gym. Imports no torch.

    {"prompt": ..., "answer": "..."}
    {"prompt": ..., "tests": "assert f(1) == 2"}
    {"prompt": ..., "tests": [{"stdin": "1", "stdout": "2"}]}

A prompt is a string, or a list of messages. Other fields of the object are ignored. The samples of both sources are
prompts. Source of reasoning-gym: arXiv:2505.24760.
"""

import ast
import hashlib
import importlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

import numpy as np

from data.chat.encode import check_tokens, encode_prompt
from data.chat.messages import ChatMessage, read_prompt, user
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.config import DataConfig, with_parts
from data.corpus import DataError, describe, list_of, nearest_name, object_of, text_of
from data.pack import WEIGHTS
from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document, SamplePiece, TrainingSample
from data.sources import JsonRecord, check_source, list_jsonl, read_json_lines
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import Tokenizer
from kernels.ranges import NonNegativeInt, PositiveInt

_NAMES = ("prompt", "answer", "tests")
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

    @property
    def prompt(self) -> str:
        """The text of the last message."""
        return self.messages[-1].content


def read_problem(values: Mapping[str, Any], key: str, place: str, *, needs_answer: bool) -> ProblemRecord:
    """Returns the problem of an object with a field for answer or tests; if `needs_answer`, not null."""
    if "prompt" not in values:
        raise _missing(values, place, "prompt")
    if all(values.get(name) is None if needs_answer else name not in values for name in ("answer", "tests")):
        raise _missing(values, place, "answer")
    messages = read_prompt(values["prompt"], f"{place}: prompt")
    answer = None if values.get("answer") is None else text_of(values["answer"], f"{place}: answer")
    if answer is not None and not answer.strip():
        raise DataError(f"{place}: answer: must have text, is {json.dumps(answer)}; nearest: leave the line out")
    tests = None if values.get("tests") is None else _read_tests(values["tests"], f"{place}: tests")
    return ProblemRecord(key=key, messages=messages, answer=answer, tests=tests, place=place)


def _read_tests(value: object, place: str) -> str | tuple[StdinTest, ...]:
    if isinstance(value, str):
        source = text_of(value, place)
        try:
            tree = ast.parse(source)
        except (SyntaxError, ValueError, RecursionError) as error:
            raise DataError(f"{place}: must be Python, is not: {error}; nearest: assert f(1) == 2") from error
        if not tree.body:
            raise DataError(f"{place}: must have at least one statement, has none; nearest: assert f(1) == 2")
        return source
    if not isinstance(value, list):
        raise DataError(
            f"{place}: must be Python source, or a list of objects with stdin and stdout, is {describe(value)}; "
            f'nearest: [{{"stdin": "1", "stdout": "2"}}]'
        )
    return tuple(_read_test(item, f"{place}[{index}]") for index, item in enumerate(list_of(value, place)))


def _read_test(value: object, place: str) -> StdinTest:
    values = object_of(value, place, ("stdin", "stdout"), required=("stdin", "stdout"))
    test = StdinTest(
        stdin=text_of(values["stdin"], f"{place}.stdin"), stdout=text_of(values["stdout"], f"{place}.stdout")
    )
    if len(test.stdout.encode()) >= _LONGEST_OUTPUT:
        raise DataError(
            f"{place}.stdout: must have fewer than {_LONGEST_OUTPUT} bytes, has {len(test.stdout.encode())}"
        )
    return test


def _missing(values: Mapping[str, Any], place: str, name: str) -> DataError:
    others = [field for field in values if field not in _NAMES]
    needed = name if name == "prompt" else "answer or tests"
    hint = f"{name} instead of {nearest_name(name, others)}" if others else name
    return DataError(
        f"{place}: {needed}: must be given, has the fields {', '.join(list(values)[:8]) or 'none'}; nearest: {hint}"
    )


PROBLEM_EXAMPLE = '{"prompt": "...", "answer": "..."}'


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemsSource(DataSource):
    """Problems in `.jsonl` files. A prompt that is longer than a sequence is dropped."""

    paths: tuple[str, ...]  # files, and folders that are searched for them
    template: Annotated[str, CHAT_TEMPLATES]  # name of the chat template


def prompt_sample(record: ProblemRecord, template: ChatTemplate, tokenizer: Tokenizer) -> TrainingSample:
    """Returns a problem's prompt as a sample without targets; an error names the problem's place."""
    try:
        ids = encode_prompt(record.messages, template, tokenizer)
    except DataError as error:
        raise DataError(f"{record.place}: {error}") from error
    tokens = np.asarray(ids, dtype=np.int32)
    piece = SamplePiece(tokens=tokens, values={WEIGHTS: np.zeros(len(tokens), dtype=np.float32)})
    return TrainingSample(key=record.key, pieces=(piece,), may_be_cut=False)


def problem_text(record: ProblemRecord) -> str:
    """Returns the text of a problem, from which a tokenizer can be trained."""
    return "\n".join([*(message.content for message in record.messages), record.answer or ""])


def _list_problems(source: ProblemsSource) -> tuple[CorpusFile, ...]:
    return list_jsonl(source.paths, "problems", PROBLEM_EXAMPLE)


def _read_file(file: CorpusFile, limit_bytes: int | None) -> Iterator[ProblemRecord]:
    def read(values: Mapping[str, Any], place: str) -> ProblemRecord:
        key = f"{file.key}:{place.rpartition(':')[2]}"
        return read_problem(values, key, place, needs_answer=False)

    records: Iterator[JsonRecord[ProblemRecord]] = read_json_lines(file, read, limit_bytes, "problems")
    return (record.content for record in records)


def _problems(source: ProblemsSource) -> Iterator[ProblemRecord]:
    for file in _list_problems(source):
        yield from _read_file(file, None)


def _documents(source: ProblemsSource, file: CorpusFile, limit_bytes: int | None) -> Iterator[Document]:
    for record in _read_file(file, limit_bytes):
        yield Document(key=record.key, text=problem_text(record))


def _samples(source: ProblemsSource, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    return map(
        partial(prompt_sample, template=CHAT_TEMPLATES.get(source.template), tokenizer=tokenizer), _problems(source)
    )


def _check(source: ProblemsSource, tokenizer: Tokenizer | None) -> None:
    check_source(source)
    if tokenizer is not None:
        check_tokens(CHAT_TEMPLATES.get(source.template).required_tokens, source.template, tokenizer)


DATA_SOURCES.register(
    "problems",
    DataSourceEntry(
        summary="problems in .jsonl files, of which the prompts are encoded",
        config=ProblemsSource,
        files=_list_problems,
        read=_documents,
        place=lambda source: f"data.paths: {list(source.paths)!r}",
        settings=lambda source: source.template,
        samples=_samples,
        special_tokens=CHAT_TOKENS,
        check=_check,
        chat_template=lambda source: source.template,
        values=lambda source: (WEIGHTS,),
        problems=_problems,
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
        raise DataError(
            f"data.kind: reasoning_gym needs the library reasoning-gym, which cannot be imported: {error}; nearest "
            f"valid: pip install '.[reasoning]'"
        ) from error
    if source.dataset not in factory.DATASETS:
        close = get_close_matches(source.dataset, factory.DATASETS, n=1, cutoff=0.4) or sorted(factory.DATASETS)
        raise DataError(
            f"data.dataset: must be one of the {len(factory.DATASETS)} data sets of reasoning-gym, is "
            f"{source.dataset!r}; nearest valid: {close[0]}"
        )
    return factory.create_dataset(source.dataset, size=source.count, seed=source.generator_seed)


def _gym_problems(source: GymSource) -> Iterator[ProblemRecord]:
    dataset = _open_dataset(source)
    seen = set()
    for index in range(source.count):
        entry = dataset[index]
        question = str(entry["question"])
        if question in seen:
            continue
        seen.add(question)
        origin = {"dataset": source.dataset, "seed": source.generator_seed, "size": source.count, "index": index}
        yield ProblemRecord(
            # The same question from another seed is in the same part.
            key=f"{source.dataset}:{hashlib.sha256(question.encode()).hexdigest()[:16]}",
            messages=(user(question),),
            answer=None if entry["answer"] is None else str(entry["answer"]),
            tests=None,
            place=f"data.dataset={source.dataset}, problem {index}",
            origin=json.dumps(origin),
        )


def _gym_samples(source: GymSource, tokenizer: Tokenizer) -> Iterator[TrainingSample]:
    template = CHAT_TEMPLATES.get(source.template)
    return (prompt_sample(record, template, tokenizer) for record in _gym_problems(source))


def _check_gym(source: GymSource, tokenizer: Tokenizer | None) -> None:
    if tokenizer is None:
        raise DataError(
            "data.tokenizer: must be given with data=reasoning_gym, which has no text to train one on, is null; "
            "nearest valid: data.tokenizer=FOLDER, or auto with init_from"
        )
    check_tokens(CHAT_TEMPLATES.get(source.template).required_tokens, source.template, tokenizer)
    _open_dataset(source)


def _library_version() -> str:
    try:
        return version("reasoning-gym")
    except PackageNotFoundError:
        return ""


DATA_SOURCES.register(
    "reasoning_gym",
    DataSourceEntry(
        summary="problems that the library reasoning-gym generates",
        config=GymSource,
        files=lambda source: (),
        read=lambda source, file, limit_bytes: iter(()),  # there are no files
        place=lambda source: f"data.dataset: {source.dataset!r}",
        settings=lambda source: [
            *(source.dataset, source.count, source.generator_seed, source.template),
            _library_version(),
        ],
        samples=_gym_samples,
        check=_check_gym,
        chat_template=lambda source: source.template,
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
        raise DataError(
            f"data.kind: must be a source with problems, is {config.source.kind}; nearest valid: {', '.join(valid)}"
        )
    train: list[ProblemRecord] = []
    held_out: list[ProblemRecord] = []
    for part, record in with_parts(config, entry.problems):
        (train if part == "train" else held_out).append(record)
    if not train:
        raise DataError(
            f"data.validation_fraction: {config.validation_fraction} of {len(held_out)} problems, selected by hash "
            f"with data.seed {config.seed}, leaves none to train on; nearest: a smaller fraction, or more problems"
        )
    return train, held_out
