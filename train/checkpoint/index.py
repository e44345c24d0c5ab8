"""Lists a checkpoint's tensors, and the file that holds each of their elements. No torch here.

`index.json` holds the names of the files, and for each tensor its type, its shape and its parts: a file's number, the
first element and the number of elements, counted over the flat tensor, and the CRC-32 of their bytes. Each element is
in exactly one part. The files have the safetensors format, so other programs read them too.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal, get_args

from model.config import ModelConfig
from model.hf.checkpoint import ITEM_BYTES
from model.hf.files import HfError, format_value, read_json
from model.hf.names import Stored, StoredDtype, weights
from train.checkpoint.manifest import CheckpointError, is_file_name

INDEX_NAME = "index.json"
PART_SUFFIX = ".safetensors"
ROTARY_PREFIX = "rotary."
"""First part of the names of stored frequencies of the rotary embedding."""

WeightsKind = Literal["trained", "ema"]
PREFIXES: dict[WeightsKind, str] = {"trained": "weights.", "ema": "ema."}
"""First part of the names of a checkpoint's weights and of their average, before the released names."""

_LEAST_BYTES = 2**20
_LARGEST_BYTES = 2**29
_BYTES_PER_WEIGHT = 2**13
_MOST_WEIGHTS = _LARGEST_BYTES // _BYTES_PER_WEIGHT
_MOST_DIMENSIONS = 8
_LARGEST_NUMBER = 2**63


@dataclass(frozen=True, slots=True)
class TensorPart:
    """Consecutive elements of a flat tensor in a file; `crc32` is 0 until they are written."""

    file: str
    first: int
    count: int
    crc32: int = 0


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """A tensor of a checkpoint: type and shape of the whole, and its parts in the order of their elements."""

    stored: Stored
    parts: tuple[TensorPart, ...]

    def stored_part(self, part: TensorPart) -> Stored:
        """Returns the type and shape of a part in its file: only a whole tensor keeps its shape."""
        return self.stored if part.count == self.stored.num_elements else replace(self.stored, shape=(part.count,))


Index = dict[str, IndexEntry]
"""The tensors of a checkpoint by name."""


def merge(indices: Iterable[Index]) -> Index:
    """Merges the indices of all ranks, each of which lists parts in the rank's own file.

    A part that several ranks hold is listed once, in the file that has the least bytes so far.

    Raises:
        CheckpointError: ranks hold another type or shape of a tensor, or parts overlap or are missing.
    """
    merged: Index = {}
    holders: dict[tuple[str, int, int], list[TensorPart]] = {}
    for index in indices:
        for name, entry in index.items():
            if merged.setdefault(name, entry).stored != entry.stored:
                raise CheckpointError(f"{name}: must be {merged[name].stored} on all ranks, is {entry.stored}")
            for part in entry.parts:
                holders.setdefault((name, part.first, part.count), []).append(part)
    sizes = {key: key[2] * ITEM_BYTES[merged[key[0]].stored.dtype] for key in holders}
    file_bytes = Counter[str]()
    parts: dict[str, list[TensorPart]] = {name: [] for name in merged}
    for key in sorted(holders, key=lambda key: -sizes[key]):
        part = min(holders[key], key=lambda part: file_bytes[part.file])
        file_bytes[part.file] += sizes[key]
        parts[key[0]].append(part)
    return {name: _checked(name, entry.stored, parts[name]) for name, entry in merged.items()}


def index_json(index: Index) -> str:
    """Returns the content of `index.json`."""
    files = sorted({part.file for entry in index.values() for part in entry.parts})
    numbers = {file: number for number, file in enumerate(files)}
    tensors = {
        name: {
            "dtype": entry.stored.dtype,
            "shape": entry.stored.shape,
            "parts": [[numbers[part.file], part.first, part.count, part.crc32] for part in entry.parts],
        }
        for name, entry in sorted(index.items())
    }
    return json.dumps({"files": files, "tensors": tensors}, separators=(",", ":")) + "\n"


def read_index(folder: Path, config: ModelConfig) -> Index:
    """Reads and checks the index of a checkpoint.

    Raises:
        CheckpointError: it is missing, too large, no JSON, names files outside the folder, or the parts of a tensor do
            not hold each of its elements once.
    """
    num_weights = sum(1 for _ in islice(weights(config), _MOST_WEIGHTS))
    try:
        record = read_json(folder / INDEX_NAME, min(_LEAST_BYTES + num_weights * _BYTES_PER_WEIGHT, _LARGEST_BYTES))
    except HfError as error:
        raise CheckpointError(f"{str(error).removeprefix(f'{folder}/')}") from error
    files = record.get("files")
    tensors = record.get("tensors")
    if not isinstance(files, list) or not isinstance(tensors, dict):
        raise _error("", "must hold a list of files and an object of tensors, does not")
    for file in files:
        if not isinstance(file, str) or not is_file_name(file) or not file.endswith(PART_SUFFIX):
            raise _error("", f"must name {PART_SUFFIX} files in its folder, names {format_value(file)}")
    return {name: _entry(name, value, files) for name, value in tensors.items()}


def _entry(name: str, value: Any, files: list[str]) -> IndexEntry:
    fields: Any = value if isinstance(value, dict) else {}
    dtype, shape, parts = (fields.get(key) for key in ("dtype", "shape", "parts"))
    if dtype not in get_args(StoredDtype):
        raise _error(name, f"must have one of the types {', '.join(get_args(StoredDtype))}, has {format_value(dtype)}")
    if not _are_whole_numbers(shape) or len(shape) > _MOST_DIMENSIONS:
        raise _error(name, f"must have a shape of at most {_MOST_DIMENSIONS} whole numbers, has {format_value(shape)}")
    if not isinstance(parts, list):
        raise _error(name, "must have a list of parts, has none")
    for part in parts:
        if not _are_whole_numbers(part) or len(part) != 4 or part[0] >= len(files) or not part[2]:
            raise _error(
                name, f"a part must be a file's number, first element, count and CRC-32, is {format_value(part)}"
            )
    listed = [TensorPart(files[number], *numbers) for number, *numbers in parts]
    return _checked(name, Stored(tuple(shape), dtype), listed)


def _checked(name: str, stored: Stored, parts: list[TensorPart]) -> IndexEntry:
    """Returns a tensor's entry if its parts hold each of its elements once."""
    ordered = sorted(parts, key=lambda part: part.first)
    end = 0
    for part in ordered:
        if part.first != end:
            raise _error(name, f"a part must begin at element {end}, where the last one ends, begins at {part.first}")
        end += part.count
    if end != stored.num_elements:
        raise _error(name, f"parts must have {stored.num_elements} elements of shape {list(stored.shape)}, have {end}")
    return IndexEntry(stored, tuple(ordered))


def _are_whole_numbers(value: Any) -> bool:
    is_list = isinstance(value, list)
    return is_list and all(type(number) is int and 0 <= number < _LARGEST_NUMBER for number in value)


def _error(name: str, problem: str) -> CheckpointError:
    subject = f"{format_value(name)[1:-1]}: " if name else ""
    return CheckpointError(f"{INDEX_NAME}: {subject}{problem}")
