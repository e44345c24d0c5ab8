"""Writes a checkpoint in Hugging Face form, shard by shard.

One tensor is in memory at a time. It does not use safetensors' writer, which needs all tensors of a shard at once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from base.files import write_synced
from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import codes_128x128, quantize_128x128
from model.config import ModelConfig
from model.hf.checkpoint import INDEX_NAME, ITEM_BYTES, SINGLE_NAME, lay_out
from model.hf.config import CONFIG_NAME, write_config
from model.hf.files import HfError, create_folder_atomically
from model.hf.names import (
    BIAS_SUFFIX,
    EMBEDDING,
    SCALE_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    scale_name,
    scale_shape,
    weights,
)
from model.hf.reader import TORCH_DTYPES, all_finite, stored_dtype

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 2**24


@dataclass(frozen=True, kw_only=True, slots=True)
class Fp8Scales:
    """Known scales of FP8 weights by name, and whether other blocks' are rounded up to a power of two."""

    by_name: Mapping[str, Tensor]
    power_of_two: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Extras:
    """Content of a checkpoint besides its weights: `Checkpoint.carried`, and files by plain name."""

    config: Mapping[str, Any]
    files: Mapping[str, bytes]


RunJobs = Callable[[Sequence[Callable[[], None]]], object]


def run_in_turn(jobs: Sequence[Callable[[], None]]) -> None:
    """Calls each job in this process."""
    for job in jobs:
        job()


NO_EXTRAS = Extras(config={}, files={})
NEW_SCALES = Fp8Scales(by_name={}, power_of_two=False)


def write_hf(
    path: Path,
    config: ModelConfig,
    plan: Mapping[str, Stored],
    tensor: Callable[[str], Tensor],
    *,
    scales: Fp8Scales = NEW_SCALES,
    extras: Extras = NO_EXTRAS,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    run: RunJobs = run_in_turn,
) -> None:
    """Writes a checkpoint to an absent or empty folder.

    Args:
        plan: stored tensors, from `model.hf.names.stored_tensors`; types of single weights may be changed.
        tensor: returns a weight by its name in `model.transformer.named_tensors`, of any floating type; called once per
            weight (embedding and head once more per MTP module; never for weights without elements).
        max_shard_bytes: largest size of a file's data, unless one tensor is larger.
        run: calls jobs that write one file each, in any order and in any process.

    Raises:
        HfError: the folder is not empty, a weight has another shape or a value that is not finite (or becomes so in the
            stored type), a correction bias that the plan lacks is not 0, or writing fails. Nothing is left behind.
    """
    for name, _ in weights(config):
        if name.endswith(BIAS_SUFFIX) and name not in plan and tensor(name).any():
            rule = "must be 0, as files of this form of attention hold no correction biases, is not"
            raise HfError(path, name, f"{rule}; nearest valid: the checkpoint itself, or a run with bias_update_rate 0")
    shards = split_into_shards(plan, max_shard_bytes)
    if len(shards) == 1:
        names = [SINGLE_NAME]
    else:
        names = [f"model-{number:05}-of-{len(shards):05}.safetensors" for number in range(1, len(shards) + 1)]
    with create_folder_atomically(path) as folder:
        run(
            [
                partial(_write_shard, folder / file_name, path / file_name, shard, tensor, scales)
                for file_name, shard in zip(names, shards, strict=True)
            ]
        )
        if len(shards) > 1:
            located = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            size = sum(_num_bytes(stored) for stored in plan.values())
            index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(located.items()))}
            write_synced(folder / INDEX_NAME, _json(index))
        fp8 = any(stored.dtype == "F8_E4M3" for stored in plan.values())
        keys = write_config(config, dtype=_plain_dtype(plan), fp8=fp8, carried=extras.config)
        write_synced(folder / CONFIG_NAME, _json(keys))
        for name, content in extras.files.items():
            write_synced(folder / name, content)


def _plain_dtype(plan: Mapping[str, Stored]) -> StoredDtype:
    """Returns the type that `config.json` names: a rare one if any weight has it, as readers require it."""
    rare = [stored.dtype for stored in plan.values() if stored.dtype in ("F64", "F16")]
    return rare[0] if rare else plan[EMBEDDING].dtype


def split_into_shards(plan: Mapping[str, Stored], max_shard_bytes: int) -> list[dict[str, Stored]]:
    """Returns the shards in the order of the plan; a weight and its scales share a shard."""
    shards: list[dict[str, Stored]] = [{}]
    filled = 0
    for name, stored in plan.items():
        if name.endswith(SCALE_SUFFIX):
            continue
        group = {name: stored}
        if stored.dtype == "F8_E4M3":
            group[scale_name(name)] = plan[scale_name(name)]
        size = sum(_num_bytes(member) for member in group.values())
        if shards[-1] and filled + size > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1] |= group
        filled += size
    return shards


def _num_bytes(stored: Stored) -> int:
    return stored.num_elements * ITEM_BYTES[stored.dtype]


def _write_shard(
    partial_path: Path, path: Path, shard: Mapping[str, Stored], tensor: Callable[[str], Tensor], scales: Fp8Scales
) -> None:
    """Writes a file; `path` is its final one, for errors."""
    with partial_path.open("xb") as file:
        _write_tensors(file, path, shard, tensor, scales)
        file.flush()
        os.fsync(file.fileno())


def _write_tensors(
    file: BinaryIO, path: Path, shard: Mapping[str, Stored], tensor: Callable[[str], Tensor], scales: Fp8Scales
) -> None:
    offsets, header = lay_out(shard)
    file.write(header)
    for name, stored in shard.items():
        if name.endswith(SCALE_SUFFIX) or not stored.num_elements:
            continue
        values = tensor(copied_from(name) or name).detach()
        if tuple(values.shape) != stored.shape:
            raise HfError(path, name, f"must have shape {list(stored.shape)}, has {list(values.shape)}")
        parts = {name: values}
        if stored.dtype == "F8_E4M3":
            # Before rounding, because infinity becomes a finite code under a known scale.
            _check_finite(values, path, name, stored.dtype)
            encoded = _quantize(values, scales.by_name.get(name), power_of_two=scales.power_of_two)
            parts = {name: encoded.codes, scale_name(name): encoded.scales}
        for part, content in parts.items():
            file.seek(offsets[part])
            for rows in _rows(content, shard[part].dtype):
                if not shard[part].dtype.startswith("F8"):
                    _check_finite(rows, path, part, shard[part].dtype)
                file.write(rows.view(torch.uint8).numpy().data)


def _quantize(values: Tensor, known_scales: Tensor | None, *, power_of_two: bool) -> QuantizedBlocks:
    if known_scales is None:
        return quantize_128x128(values, power_of_two=power_of_two)
    assert tuple(known_scales.shape) == scale_shape(tuple(values.shape))
    return QuantizedBlocks(codes_128x128(values, known_scales.to(values.device)), known_scales)


def _check_finite(values: Tensor, path: Path, name: str, dtype: StoredDtype) -> None:
    if not all_finite(values):
        raise HfError(path, name, f"must hold finite numbers in {dtype}, does not")


def _rows(values: Tensor, dtype: StoredDtype) -> Iterator[Tensor]:
    row_bytes = max(1, values[0].numel() * ITEM_BYTES[dtype])
    for rows in values.split(max(1, CHUNK_BYTES // row_bytes)):
        yield rows.to(TORCH_DTYPES[dtype]).contiguous().cpu()


def _json(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=2) + "\n").encode()


def rotary_plan(rotary: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Returns the plan for stored rotary frequencies: written in the type in which they were found."""
    return {name: Stored(tuple(values.shape), stored_dtype(values.dtype)) for name, values in rotary.items()}
