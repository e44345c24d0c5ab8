"""Evaluates documents: bits per byte of text, also for each source. Imports no torch.

A document is read in windows, and every token is scored once. The number of bytes is that of the
text in UTF-8, so the tokenizer does not matter.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus import DataError
from infer.evaluate.config import EvaluationError, EvaluationTaskConfig, needed_path
from infer.evaluate.lines import check_unique, checked_file, key_field, read_lines, text_field
from infer.evaluate.protocol import (
    EvaluationMetric,
    EvaluationSample,
    Measure,
    ResultTable,
    SimpleTask,
    TaskContext,
    TaskDetails,
)
from infer.evaluate.registry import EVALUATION_TASKS, EvaluationTaskSpec
from infer.evaluate.requests import DocumentAnswer, DocumentRequest, EvaluationAnswer
from kernels.ranges import PositiveInt

NAME = "bits_per_byte"
EXAMPLE = 'lines {"id": "1", "text": "..."}'
TEXT_SUFFIXES = (".txt", ".md")


@dataclass(frozen=True, kw_only=True, slots=True)
class BitsPerByteConfig(EvaluationTaskConfig):
    """Bits per byte of documents.

    Attributes:
        path: `.jsonl` file of documents, or a `.txt` or `.md` file, which is one document.
        window_tokens: maximum number of tokens that the model sees at a time; None: as many as it has positions.
        stride_tokens: tokens that each window after the first one scores; None: all, which is fastest.
        limit: maximum number of documents; None: all.
    """

    path: str | None
    window_tokens: PositiveInt | None
    stride_tokens: PositiveInt | None
    limit: PositiveInt | None


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedDocument:
    """A document: its `id`, the source that it is counted for, its text, and its file and line."""

    key: str | int
    source: str
    text: str
    place: str


class BitsPerByteTask(SimpleTask):
    """Documents."""

    metrics = (EvaluationMetric(name="bits_per_byte", higher_is_better=False),)

    def __init__(self, config: BitsPerByteConfig, context: TaskContext) -> None:
        """Reads and checks the file.

        Raises:
            EvaluationError, DataError: no file, a line that is not valid, or a window that does not fit the model.
        """
        documents = read_documents("bits_per_byte.path", needed_path("bits_per_byte.path", config.path, EXAMPLE))
        window = min(config.window_tokens or context.max_tokens, context.max_tokens)
        if (config.stride_tokens or window) > window:
            raise EvaluationError(
                f"bits_per_byte.stride_tokens: must be at most the window's {window} tokens, is "
                f"{config.stride_tokens}; nearest valid: {window}"
            )
        self._window, self._stride = window, config.stride_tokens or window
        self._samples = [
            EvaluationSample(
                key=document.key,
                requests=(DocumentRequest(text=document.text, window=window, stride=config.stride_tokens),),
                source=document,
            )
            for document in documents[: config.limit]
        ]

    def record(self, sample: EvaluationSample, answers: Sequence[EvaluationAnswer]) -> dict[str, Any]:
        """Implements `EvaluationTask.record`."""
        document: EvaluatedDocument = sample.source
        (answer,) = answers
        assert isinstance(answer, DocumentAnswer)
        return {
            "source": document.source,
            "loglikelihood": answer.log_likelihood,
            "num_tokens": answer.num_tokens,
            "num_bytes": len(document.text.encode()),
        }

    def measures(self, record: Mapping[str, Any]) -> Mapping[str, Measure]:
        """Implements `EvaluationTask.measures`."""
        bits = -record["loglikelihood"] / math.log(2)
        return {"bits_per_byte": Measure(value=bits, weight=float(record["num_bytes"]))}

    def details(self, records: Sequence[Mapping[str, Any]]) -> TaskDetails:
        """Implements `EvaluationTask.details`: sizes, and bits per byte of each source."""
        by_source = defaultdict[str, list[Mapping[str, Any]]](list)
        for record in records:
            by_source[record["source"]].append(record)
        sources = {source: _sums(found) for source, found in sorted(by_source.items())}
        columns = ("documents", "num_bytes", "num_tokens", "bits_per_byte", "nats_per_token")
        rows = tuple((source, *(values[name] for name in columns)) for source, values in sources.items())
        table = ResultTable(title="Bits per byte of each source", columns=("source", *columns), rows=rows)
        totals = {name: value for name, value in _sums(records).items() if name not in ("documents", "bits_per_byte")}
        windows = {"window_tokens": self._window, "stride_tokens": self._stride}
        return TaskDetails(values={**totals, **windows, "sources": sources}, tables=(table,))


def _sums(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    nats = -math.fsum(record["loglikelihood"] for record in records)
    num_bytes = sum(record["num_bytes"] for record in records)
    num_tokens = sum(record["num_tokens"] for record in records)
    return {
        "documents": len(records),
        "num_bytes": num_bytes,
        "num_tokens": num_tokens,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "nats_per_token": nats / num_tokens if num_tokens else None,
    }


def read_documents(key: str, path: str) -> list[EvaluatedDocument]:
    """Reads a file of documents. The source is the field `source` of a line, or else the file's name.

    Args:
        key: configuration key of the path.
        path: a `.jsonl` file, or a `.txt` or `.md` file.

    Raises:
        DataError: names the file, the line, the field and the rule.
    """
    place = checked_file(key, path)
    if place.suffix in TEXT_SUFFIXES:
        return [_text_document(key, place)]
    if place.suffix != ".jsonl":
        raise DataError(f"{key}: must be a .jsonl, .txt or .md file, is {path!r}; nearest: {place.stem}.jsonl")

    def read(values: Mapping[str, Any], where: str) -> EvaluatedDocument:
        return EvaluatedDocument(
            key=key_field(values, where),
            source=text_field(values, "source", where) if values.get("source") is not None else place.name,
            text=text_field(values, "text", where),
            place=where,
        )

    documents = read_lines(key, path, read)
    check_unique([document.key for document in documents], [document.place for document in documents])
    if not any(document.text for document in documents):
        raise DataError(f"{key}: {path} must have text, all documents are empty; nearest: another file")
    return documents


def _text_document(key: str, path: Path) -> EvaluatedDocument:
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{key}: {path} must be UTF-8, is not at byte {error.start + 1}; nearest: UTF-8") from error
    if not text:
        raise DataError(f"{key}: {path} must have text, is empty; nearest: another file")
    return EvaluatedDocument(key=path.name, source=path.name, text=text, place=f"{key}: {path}")


def _files(config: BitsPerByteConfig) -> tuple[str, ...]:
    return (config.path,) if config.path else ()


EVALUATION_TASKS.register(
    NAME,
    EvaluationTaskSpec(
        summary="bits per byte of documents, also by source",
        version=1,
        config=BitsPerByteConfig,
        build=BitsPerByteTask,
        files=_files,
        required=("path",),
    ),
)
