"""Registers problems of the optional library reasoning-gym (arXiv:2505.24760). Imports no torch."""

import hashlib
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from data.chat.encode import check_tokens
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES
from data.corpus import DataError
from data.pack import WEIGHTS
from data.problems import prompt_sample
from data.problems.records import ProblemRecord
from data.registry import DATA_SOURCES, DataSource, DataSourceEntry, TrainingSample
from data.tokenizer import Tokenizer
from kernels.ranges import NonNegativeInt, PositiveInt


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
    made = _open_dataset(source)
    seen = set()
    for index in range(source.count):
        entry = made[index]
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
