"""Opens a checkpoint's folder and checks everything that can be checked without reading data.

The library `safetensors` checks headers of shards. It maps the whole file, so `model.hf.reader` reads the data instead:
pages of a mapped shard count as memory of the process, and truncating a mapped file kills the process by a signal.
Imports no torch.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from safetensors import SafetensorError, safe_open

from model.config import ModelConfig
from model.hf.config import CONFIG_NAME, DTYPE_NAMES, carried_keys, parse_config, unknown_keys
from model.hf.files import HfError, check_kind, format_value, nearest, parse_json, read_json
from model.hf.names import (
    BIAS_SUFFIX,
    BLOCK,
    Stored,
    StoredDtype,
    copied_from,
    file_weights,
    is_quantized,
    is_rotary,
    layer_of,
    scale_name,
    scale_shape,
    weights,
)

LARGEST_HEADER_BYTES = 100_000_000
LENGTH_BYTES = 8
ITEM_BYTES: dict[StoredDtype, int] = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "I64": 8}

_PREFIX = "Error while deserializing header: "
_NOT_COVERED = "not fully covered"
SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
LONGEST_NAME_BYTES = 255


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Position of a tensor in a file: `num_bytes` from `offset`, counted from the start of the file.

    A tensor without bytes is zero: the correction biases of a format whose files hold none.
    """

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
            raise HfError(path, name, f"must have dtype, shape and data_offsets, is {format_value(value)}")
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


def lay_out(tensors: Mapping[str, Stored], *, keeps_order: bool = False) -> tuple[dict[str, int], bytes]:
    """Returns where each tensor's data begins in a file, widest types first, and the file's first bytes.

    The header names tensors in the order of their data, or in the given one with `keeps_order`.
    """
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
    listed = {name: entries[name] for name in ("__metadata__", *tensors)} if keeps_order else entries
    header = json.dumps(listed, separators=(",", ":")).encode()
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
        raise HfError(path, name, f"dtype must be one of {', '.join(get_args(StoredDtype))}, is {format_value(dtype)}")
    return TensorEntry(path, tuple(value["shape"]), dtype, start + begin, end - begin)


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """Content of a checkpoint's folder.

    Attributes:
        config: the architecture; its `mtp_depth` is 0 if the files hold no tensor of an MTP module, or these were
            dropped.
        carried: keys of `config.json` that do not describe the architecture.
        unknown: names of those keys that no list contains.
    """

    folder: Path
    config: ModelConfig
    entries: Mapping[str, TensorEntry]
    carried: Mapping[str, Any]
    unknown: tuple[str, ...]


def open_checkpoint(folder: Path, *, drop_mtp: bool = False, checks_tensors: bool = True) -> Checkpoint:
    """Reads `config.json`, the index if there is one, and the header of every file.

    Without `checks_tensors`, the files may hold other tensors than the architecture requires.

    Raises:
        HfError: something is missing, truncated, superfluous, outside the folder, or of another shape or type than the
            architecture requires.
    """
    if not folder.is_dir():
        near = nearest(folder.name, (path.name for path in folder.parent.iterdir())) if folder.parent.is_dir() else ""
        raise HfError(folder, "", f"must be a checkpoint's folder, is {'a file' if folder.exists() else 'none'}{near}")
    path = folder / CONFIG_NAME
    keys = read_json(path)
    config = parse_config(keys, path)
    is_fp8 = _check_quantization(keys, path)
    entries = _read_entries(folder)
    if drop_mtp:
        entries = {name: entry for name, entry in entries.items() if not _is_mtp_tensor(name, config)}
    if not any(_is_mtp_tensor(name, config) and not is_rotary(name) for name in entries):
        config = replace(config, mtp_depth=0)
    if checks_tensors:
        _check_names(folder, config, entries)
        allowed = _allowed_dtypes(keys, path)
        for name, shape in file_weights(config):
            if name in entries:
                _check_tensor(name, shape, entries, allowed, is_fp8=is_fp8)
    if config.attention != "mla":
        biases = ((name, shape) for name, shape in weights(config) if name.endswith(BIAS_SUFFIX))
        entries = {name: TensorEntry(path, shape, "F32", 0, 0) for name, shape in biases} | entries
    return Checkpoint(
        folder=folder, config=config, entries=entries, carried=carried_keys(keys), unknown=unknown_keys(keys)
    )


def _is_mtp_tensor(name: str, config: ModelConfig) -> bool:
    return (layer_of(name) or 0) >= config.num_layers


def _read_entries(folder: Path) -> dict[str, TensorEntry]:
    single = folder / SINGLE_NAME
    index = folder / INDEX_NAME
    if index.exists() and single.exists():
        raise HfError(folder, SINGLE_NAME, f"must not exist next to {INDEX_NAME}, does")
    if not index.exists():
        if not single.exists():
            raise HfError(folder, SINGLE_NAME, f"must exist, or {INDEX_NAME}; neither does")
        return read_header(single)
    weight_map = _weight_map(index)
    entries: dict[str, TensorEntry] = {}
    for file in sorted(set(weight_map.values())):
        for name, entry in read_header(folder / file).items():
            if name in entries:
                raise HfError(entry.file, name, f"must be in one file, is in {entries[name].file.name} too")
            if name not in weight_map:
                raise HfError(entry.file, name, f"must be in {INDEX_NAME}, is not")
            entries[name] = entry
    for name, file in weight_map.items():
        if name not in entries:
            raise HfError(folder / file, name, f"must be in the file by {INDEX_NAME}, is missing")
        if entries[name].file.name != file:
            raise HfError(index, name, f"must name the file that holds it, {entries[name].file.name}, names {file}")
    return entries


def _weight_map(index: Path) -> dict[str, str]:
    keys = read_json(index)
    weight_map = keys.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HfError(
            index, "weight_map", f"must be an object that names a file for every tensor, is {format_value(weight_map)}"
        )
    for name, file in weight_map.items():
        # A downloaded index must not point outside its folder.
        if not isinstance(file, str) or not _is_plain(file):
            raise HfError(
                index, name, f"must be the plain name of a .safetensors file next to it, is {format_value(file)}"
            )
    return weight_map


def _is_plain(file: str) -> bool:
    if not file.endswith(".safetensors") or file.startswith(".") or any(mark in file for mark in "/\\:"):
        return False
    # An unprintable name may have no encoding, such as half of a surrogate pair.
    return file.isprintable() and len(file.encode()) <= LONGEST_NAME_BYTES


def _check_names(folder: Path, config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Raises an error for the first missing or superfluous tensor, for any size that `config` claims."""
    known_names = set()
    for name, shape in file_weights(config):
        known_names.add(name)
        if name in entries:
            if entries[name].dtype == "F8_E4M3":
                known_names.add(scale_name(name))
        elif 0 not in shape:
            config_names = {config_name for config_name, _ in islice(file_weights(config), 2 * len(entries))}
            renamed = _nearest_in_layer(name, entries.keys() - config_names)
            raise HfError(folder, name, f"must be in the checkpoint, is missing{renamed}")
    layers = config.num_layers + config.mtp_depth
    for name, entry in entries.items():
        if is_rotary(name) and (layer_of(name) or 0) < layers:
            size = config.rotated_dim // 2
            if entry.shape != (size,) or entry.dtype not in ("F32", "BF16", "F16", "F64"):
                stored = f"{entry.dtype} {list(entry.shape)}"
                raise HfError(entry.file, name, f"must be F32, BF16, F16 or F64 [{size}], is {stored}")
        elif name not in known_names:
            near = _nearest_in_layer(name, known_names)
            if _is_mtp_tensor(name, config):
                near += "; to load the checkpoint without MTP modules: init_mtp=drop, in launch.convert mtp=drop"
            raise HfError(entry.file, name, f"must be a tensor of the architecture, is none{near}")


def _nearest_in_layer(name: str, others: Iterable[str]) -> str:
    return nearest(name, sorted(candidate for candidate in others if layer_of(candidate) == layer_of(name)))


def _check_tensor(
    name: str,
    shape: tuple[int, ...],
    entries: Mapping[str, TensorEntry],
    allowed: tuple[StoredDtype, ...],
    *,
    is_fp8: bool,
) -> None:
    entry = entries[name]
    if entry.shape != shape:
        raise HfError(entry.file, name, f"must have shape {list(shape)}, has {list(entry.shape)}")
    original = copied_from(name)
    if original is not None and entry.dtype != entries[original].dtype:
        raise HfError(entry.file, name, f"must be {entries[original].dtype} as {original} is, is {entry.dtype}")
    if entry.dtype in allowed:
        return
    words = ", ".join(allowed)
    if entry.dtype != "F8_E4M3" or not is_quantized(name):
        raise HfError(entry.file, name, f"must be {words}, is {entry.dtype}")
    if not is_fp8:
        raise HfError(entry.file, name, f"must be {words} without a quantization_config in {CONFIG_NAME}, is F8_E4M3")
    scales = entries.get(scale_name(name))
    if scales is None:
        raise HfError(entry.file, scale_name(name), f"must be in the checkpoint, as {name} is F8_E4M3; is missing")
    if scales.dtype not in ("F32", "F8_E8M0") or scales.shape != scale_shape(shape):
        wanted = f"F32 or F8_E8M0 {list(scale_shape(shape))}"
        stored = f"{scales.dtype} {list(scales.shape)}"
        raise HfError(scales.file, scale_name(name), f"must be {wanted}, is {stored}")


def _allowed_dtypes(keys: Mapping[str, Any], path: Path) -> tuple[StoredDtype, ...]:
    """Returns the types of plain weights: the two usual ones, and a rarer one if `config.json` names it."""
    names: list[Any] = [keys[key] for key in ("dtype", "torch_dtype") if keys.get(key) is not None]
    if len(names) > 1 and names[0] != names[1]:
        raise HfError(path, "torch_dtype", f"must equal dtype {format_value(names[0])}, is {format_value(names[1])}")
    words: dict[Any, StoredDtype] = {name: word for word, name in DTYPE_NAMES.items()}
    if names and (not isinstance(names[0], str) or names[0] not in words):
        raise HfError(path, "dtype", f"must be one of {', '.join(words)}, is {format_value(names[0])}")
    return tuple(dict.fromkeys(("BF16", "F32", *(words[name] for name in names))))


def _check_quantization(keys: Mapping[str, Any], path: Path) -> bool:
    quantization = keys.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise HfError(
            path, "quantization_config", f"must be an object of keys and values, is {format_value(quantization)}"
        )
    rules = (("quant_method", ("fp8",)), ("fmt", ("e4m3", None)), ("weight_block_size", ([BLOCK, BLOCK],)))
    for key, valid in rules:
        if quantization.get(key) not in valid:
            subject = f"quantization_config.{key}"
            raise HfError(
                path, subject, f"must be {valid[0]}, is {format_value(quantization.get(key))}; nearest: {valid[0]}"
            )
    return True
