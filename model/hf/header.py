"""Reads and builds the header of a safetensors file, which lists its tensors. Imports no torch.

The library `safetensors` checks a header. It maps the whole file, so `model.hf.reader` reads the data instead: pages of
a mapped shard count as memory of the process, and truncating a mapped file kills the process by a signal.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from model.hf.files import HfError, check_kind, parse_json, shown
from model.hf.names import Stored, StoredDtype

LARGEST_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
ITEM_BYTES: dict[StoredDtype, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8}

_PREFIX = "Error while deserializing header: "
_NOT_COVERED = "not fully covered"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Position of a tensor in a file: `num_bytes` from `offset`, counted from the start of the file."""

    file: Path
    shape: tuple[int, ...]
    dtype: StoredDtype
    offset: int
    num_bytes: int


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Reads which tensors a safetensors file holds, by name in the order of the header.

    Raises:
        HfError: the file is unreadable, truncated or too long; the header is not JSON, has a name twice or is rejected
            by `safetensors`; or weights are not stored in a tensor's type.
    """
    size, header = _read(path)
    # The library accepts a duplicate name and reads one of the two.
    values = parse_json(header, path, "header")
    values.pop("__metadata__", None)
    for name, value in values.items():
        if not isinstance(value, dict):  # the library accepts a list too
            raise HfError(path, name, f"must have dtype, shape and data_offsets, is {shown(value)}")
    start = LENGTH_BYTES + len(header)
    try:
        with safe_open(path, framework="numpy"):  # which imports numpy only when data is read
            pass
    except OSError as error:
        raise HfError(path, "", f"must be a readable file, is not ({error.strerror or error})") from error
    except SafetensorError as error:
        reason = str(error).removeprefix(_PREFIX)
        if _NOT_COVERED in reason:
            end = start + max((value["data_offsets"][1] for value in values.values()), default=0)
            state = "is cut short" if size < end else "is too long"
            raise HfError(path, "", f"must have {end} bytes by its header, has {size}: it {state}") from error
        raise HfError(path, "header", f"must be one that safetensors reads, is not ({reason})") from error
    return {name: _entry(path, name, value, start) for name, value in values.items()}


def lay_out(tensors: Mapping[str, Stored]) -> tuple[dict[str, int], bytes]:
    """Returns where each tensor's data begins in a file, widest types first, and the file's first bytes."""
    ordered = sorted(tensors, key=lambda name: (-ITEM_BYTES[tensors[name].dtype], name))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    begins = {}
    for name in ordered:
        stored = tensors[name]
        end = begin + stored.num_elements * ITEM_BYTES[stored.dtype]
        entries[name] = {"dtype": stored.dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
        begins[name] = begin
        begin = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)
    content = len(header).to_bytes(LENGTH_BYTES, "little") + header
    return {name: len(content) + offset for name, offset in begins.items()}, content


def _read(path: Path) -> tuple[int, bytes]:
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


def _entry(path: Path, name: str, value: dict[str, Any], start: int) -> TensorEntry:
    dtype = value["dtype"]
    begin, end = value["data_offsets"]
    if dtype not in get_args(StoredDtype):
        raise HfError(path, name, f"dtype must be one of {', '.join(get_args(StoredDtype))}, is {shown(dtype)}")
    return TensorEntry(path, tuple(value["shape"]), dtype, start + begin, end - begin)
