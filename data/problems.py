"""Registers a source of problems in `.jsonl` files, whose samples are prompts. Imports no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import numpy as np

from data.chat.encode import check_tokens, encode_prompt
from data.chat.fields import JsonRecord, list_jsonl, read_json_lines
from data.chat.templates import CHAT_TEMPLATES, ChatTemplate
from data.config import DataConfig, with_parts
from data.corpus import DataError, check_source
from data.pack import WEIGHTS
from data.problems.records import ProblemRecord, read_problem
from data.registry import DATA_SOURCES, CorpusFile, DataSource, DataSourceEntry, Document, SamplePiece, TrainingSample
from data.special_tokens import CHAT_TOKENS
from data.tokenizer import Tokenizer

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


def split_problems(config: DataConfig) -> tuple[list[ProblemRecord], list[ProblemRecord]]:
    """Returns the problems to train on and those that are held out, split as the source's samples are."""
    entry = DATA_SOURCES.get(config.source.kind)
    if entry.problems is None:
        valid = [name for name, each in DATA_SOURCES.items() if each.problems is not None]
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
