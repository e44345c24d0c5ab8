"""Opens a checkpoint's folder and checks everything that can be checked without reading data."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from model.config import ModelConfig
from model.hf.config import CONFIG_NAME, DTYPE_NAMES, carried_keys, parse_config, unknown_keys
from model.hf.files import HfError, nearest, read_json, shown
from model.hf.header import TensorEntry, read_header
from model.hf.names import (
    BLOCK,
    StoredDtype,
    copied_from,
    is_quantized,
    is_rotary,
    layer_of,
    scale_name,
    scale_shape,
    weights,
)

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
LONGEST_NAME_BYTES = 255


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


def open_checkpoint(folder: Path, *, drop_mtp: bool = False) -> Checkpoint:
    """Reads `config.json`, the index if there is one, and the header of every file.

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
    _check_names(folder, config, entries)
    allowed = _allowed_dtypes(keys, path)
    for name, shape in weights(config):
        if name in entries:
            _check_tensor(name, shape, entries, allowed, is_fp8=is_fp8)
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
            index, "weight_map", f"must be an object that names a file for every tensor, is {shown(weight_map)}"
        )
    for name, file in weight_map.items():
        # A downloaded index must not point outside its folder.
        if not isinstance(file, str) or not _is_plain(file):
            raise HfError(index, name, f"must be the plain name of a .safetensors file next to it, is {shown(file)}")
    return weight_map


def _is_plain(file: str) -> bool:
    if not file.endswith(".safetensors") or file.startswith(".") or any(mark in file for mark in "/\\:"):
        return False
    # An unprintable name may have no encoding, such as half of a surrogate pair.
    return file.isprintable() and len(file.encode()) <= LONGEST_NAME_BYTES


def _check_names(folder: Path, config: ModelConfig, entries: Mapping[str, TensorEntry]) -> None:
    """Raises an error for the first missing or superfluous tensor, for any size that `config` claims."""
    known = set()
    for name, shape in weights(config):
        known.add(name)
        if name in entries:
            if entries[name].dtype == "F8_E4M3":
                known.add(scale_name(name))
        elif 0 not in shape:
            own = {own for own, _ in islice(weights(config), 2 * len(entries))}
            renamed = _nearest_in_layer(name, entries.keys() - own)
            raise HfError(folder, name, f"must be in the checkpoint, is missing{renamed}")
    layers = config.num_layers + config.mtp_depth
    for name, entry in entries.items():
        if is_rotary(name) and (layer_of(name) or 0) < layers:
            size = config.qk_rope_head_dim // 2
            if entry.shape != (size,) or entry.dtype not in ("F32", "BF16", "F16", "F64"):
                found = f"{entry.dtype} {list(entry.shape)}"
                raise HfError(entry.file, name, f"must be F32, BF16, F16 or F64 [{size}], is {found}")
        elif name not in known:
            near = _nearest_in_layer(name, known)
            if _is_mtp_tensor(name, config):
                near += "; to load the checkpoint without MTP modules: init_mtp=drop, in launch.convert mtp=drop"
            raise HfError(entry.file, name, f"must be a tensor of the architecture, is none{near}")


def _nearest_in_layer(name: str, others: Iterable[str]) -> str:
    return nearest(name, sorted(other for other in others if layer_of(other) == layer_of(name)))


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
        found = f"{scales.dtype} {list(scales.shape)}"
        raise HfError(scales.file, scale_name(name), f"must be {wanted}, is {found}")


def _allowed_dtypes(keys: Mapping[str, Any], path: Path) -> tuple[StoredDtype, ...]:
    """Returns the types of plain weights: the two usual ones, and a rarer one if `config.json` names it."""
    names: list[Any] = [keys[key] for key in ("dtype", "torch_dtype") if keys.get(key) is not None]
    if len(names) > 1 and names[0] != names[1]:
        raise HfError(path, "torch_dtype", f"must equal dtype {shown(names[0])}, is {shown(names[1])}")
    words: dict[Any, StoredDtype] = {name: word for word, name in DTYPE_NAMES.items()}
    if names and (not isinstance(names[0], str) or names[0] not in words):
        raise HfError(path, "dtype", f"must be one of {', '.join(words)}, is {shown(names[0])}")
    return tuple(dict.fromkeys(("BF16", "F32", *(words[name] for name in names))))


def _check_quantization(keys: Mapping[str, Any], path: Path) -> bool:
    quantization = keys.get("quantization_config")
    if quantization is None:
        return False
    if not isinstance(quantization, dict):
        raise HfError(path, "quantization_config", f"must be an object of keys and values, is {shown(quantization)}")
    rules = (("quant_method", ("fp8",)), ("fmt", ("e4m3", None)), ("weight_block_size", ([BLOCK, BLOCK],)))
    for key, valid in rules:
        if quantization.get(key) not in valid:
            place = f"quantization_config.{key}"
            raise HfError(path, place, f"must be {valid[0]}, is {shown(quantization.get(key))}; nearest: {valid[0]}")
    return True
