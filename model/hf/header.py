"""The header of a safetensors file: which tensors it holds, and where. No torch here.

The format: eight bytes that count the header's bytes (little-endian), the header (JSON), then the data of all tensors
without gap or overlap.
"""

import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from model.hf.errors import HfError, shown
from model.hf.folder import check_kind
from model.hf.json_file import parse_json
from model.hf.names import StoredDtype

LARGEST_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
ITEM_BYTES: dict[StoredDtype, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1}


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor in a file: `num_bytes` from `offset`, counted from the file's start."""

    file: Path
    shape: tuple[int, ...]
    dtype: StoredDtype
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name, in the order of the header.

    Raises:
        HfError: no readable file; cut short or too long; a header that is not JSON or says what the format or the
            file's length forbids; a type of number that weights are not stored in.
    """
    size, header = _read(path)
    start = LENGTH_BYTES + len(header)
    values = parse_json(header, path, "header")
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise HfError(path, "__metadata__", f"must be an object of text, is {shown(metadata)}")
    entries = {name: _entry(path, name, entry, start) for name, entry in values.items()}
    end = start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].num_bytes)):
        if entry.offset != end:
            raise HfError(path, name, f"must begin at byte {end - start} of the data, begins at {entry.offset - start}")
        end += entry.num_bytes
    if end != size:
        state = "is cut short" if size < end else "is too long"
        raise HfError(path, "", f"must have {end} bytes by its header, has {size}: it {state}")
    return entries


def _read(path: Path) -> tuple[int, bytes]:
    """The file's size and its header."""
    try:
        check_kind(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if size < LENGTH_BYTES:
                raise HfError(path, "", f"must have at least {LENGTH_BYTES} bytes, has {size}")
            room = min(size - LENGTH_BYTES, LARGEST_HEADER_BYTES)
            if length > room:
                raise HfError(path, "header", f"must have at most {room} bytes, has {length} by the file's first eight")
            return size, file.read(length)
    except OSError as error:
        raise HfError(path, "", f"must be a readable file, is not ({error.strerror})") from error


def _entry(path: Path, name: str, value: Any, start: int) -> Entry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise HfError(path, name, f"must have dtype, shape and data_offsets, is {shown(value)}")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if dtype not in get_args(StoredDtype):
        raise HfError(path, name, f"dtype must be one of {', '.join(get_args(StoredDtype))}, is {shown(dtype)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise HfError(path, name, f"must have sizes as shape and data_offsets, has {shown(shape)} and {shown(offsets)}")
    num_bytes = math.prod(shape) * ITEM_BYTES[dtype]
    if num_bytes != offsets[1] - offsets[0]:
        raise HfError(
            path, name, f"{dtype} of shape {shown(shape)} must have {num_bytes} bytes, has {offsets[1] - offsets[0]}"
        )
    return Entry(path, tuple(shape), dtype, start + offsets[0], num_bytes)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
