"""Reads and writes a teacher's most probable tokens at every target. Imports no torch.

A folder holds `scores.json` and, for each part of the samples, token ids and log-probabilities. Shape legend: N
sequences, L tokens per sequence, K kept tokens.
"""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.corpus import DataError
from data.prepare import Prepared
from data.registry import Part
from train.config.decode import decode
from train.config.errors import ConfigError

SCORES_NAME = "scores.json"
IDS, LOG_PROBS = "teacher_ids", "teacher_log_probs"
PARTS: tuple[Part, ...] = ("train", "validation")
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ScoresMeta:
    """What stored scores belong to."""

    format_version: int
    teacher: str
    fingerprint: str
    vocab_size: int
    kept: int
    temperature: float


def is_scores_folder(path: str) -> bool:
    """Returns whether a path is a folder of stored scores rather than weights."""
    return (Path(path).expanduser() / SCORES_NAME).is_file()


def read_meta(path: str, key: str = "task.teacher") -> ScoresMeta:
    """Reads what the scores of a folder belong to.

    Raises:
        ConfigError: the file cannot be read, or is of another form.
    """
    file = Path(path).expanduser() / SCORES_NAME
    try:
        meta = decode(ScoresMeta, json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{key}: {file} must be the record of stored scores, cannot be read ({error})") from error
    if meta.format_version != FORMAT_VERSION:
        raise ConfigError(f"{key}: {file} must have format_version {FORMAT_VERSION}, has {meta.format_version}")
    return meta


def check_scores(path: str, temperature: float, vocab_size: int) -> None:
    """Rejects stored scores at another temperature or of another vocabulary.

    Raises:
        ConfigError: names the key, the rule, the value and the nearest valid one.
    """
    meta = read_meta(path)
    if meta.temperature != temperature:
        raise ConfigError(
            f"task.temperature: must be {meta.temperature:g}, at which the scores in {path} were computed, is "
            f"{temperature:g}; nearest valid: {meta.temperature:g}"
        )
    if meta.vocab_size != vocab_size:
        raise ConfigError(
            f"task.teacher: must have the vocabulary of the model, {vocab_size} tokens, {path} has {meta.vocab_size}; "
            f"nearest valid: a teacher with the same tokenizer"
        )


def with_scores(path: str, prepared: Prepared) -> Prepared:
    """Returns samples with stored scores as further values of each token, memory-mapped.

    Raises:
        DataError: the scores belong to other samples, or a file is missing or of another shape.
    """
    meta, folder = read_meta(path), Path(path).expanduser()
    if meta.fingerprint != prepared.fingerprint:
        raise DataError(
            f"task.teacher: {path} must have the scores of these samples, whose fingerprint is {prepared.fingerprint}, "
            f"has those of {meta.fingerprint}; nearest valid: python -m launch.score_teacher with the same data and "
            f"batch.sequence_length_tokens"
        )
    values: dict[Part, Mapping[str, NDArray[np.generic]]] = {}
    for part, tokens_NL in zip(PARTS, (prepared.train_tokens_NL, prepared.validation_tokens_NL), strict=True):
        values[part] = {name: _open(folder, part, name, (*tokens_NL.shape, meta.kept)) for name in (IDS, LOG_PROBS)}
    return replace(
        prepared,
        train_values={**prepared.train_values, **values["train"]},
        validation_values={**prepared.validation_values, **values["validation"]},
    )


class ScoresWriter:
    """A folder of scores that appears under its name when it is complete."""

    def __init__(self, folder: Path, meta: ScoresMeta) -> None:
        """Creates the folder under a temporary name.

        Raises:
            OSError: it cannot be created.
        """
        self.folder = folder
        self._meta = meta
        self._partial = folder.with_name(f"{folder.name}.{os.getpid()}.partial")
        self._partial.mkdir(parents=True)

    def __enter__(self) -> "ScoresWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: Any) -> None:
        """Completes the folder, or removes what was written if an error ends the block."""
        if kind is not None:
            shutil.rmtree(self._partial)
            return
        (self._partial / SCORES_NAME).write_text(json.dumps(asdict(self._meta), indent=1) + "\n", encoding="utf-8")
        self._partial.replace(self.folder)

    def arrays(self, part: Part, num_sequences: int, length: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Creates the ids and log-probabilities of a part, [N, L, K], zero and memory-mapped."""
        shape = (num_sequences, length, self._meta.kept)
        return (
            np.lib.format.open_memmap(self._path(part, IDS), mode="w+", dtype=np.int32, shape=shape),
            np.lib.format.open_memmap(self._path(part, LOG_PROBS), mode="w+", dtype=np.float32, shape=shape),
        )

    def _path(self, part: Part, name: str) -> Path:
        return _array_path(self._partial, part, name)


def _array_path(folder: Path, part: Part, name: str) -> Path:
    return folder / f"{part}_{name}_NLK.npy"


def _open(folder: Path, part: Part, name: str, shape: tuple[int, ...]) -> NDArray[np.generic]:
    path = _array_path(folder, part, name)
    try:
        array: NDArray[np.generic] = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise DataError(f"task.teacher: {path} must be an array of scores, cannot be read ({error})") from error
    if array.shape != shape:
        raise DataError(f"task.teacher: {path} must have the shape {list(shape)}, has {list(array.shape)}")
    return array
