"""Loads a whole model from a checkpoint in Hugging Face form, and saves it shard by shard.

One tensor is in memory at a time. It does not use safetensors' writer, which needs all tensors of a shard at once.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, Literal

import torch
from torch import Tensor

from base.files import write_synced
from comm.dispatch.local import LocalDispatcher
from kernels.quantize.layout import QuantizedBlocks
from kernels.quantize.reference import codes_128x128, dequantize_128x128, quantize_128x128
from model.config import ModelConfig
from model.hf.checkpoint import INDEX_NAME, ITEM_BYTES, SINGLE_NAME, lay_out
from model.hf.config import CONFIG_NAME, write_config
from model.hf.files import HfError, create_folder_atomically
from model.hf.names import (
    BLOCK,
    EMBEDDING,
    SCALE_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    scale_name,
    scale_shape,
    stored_tensors,
    weights,
    with_scales,
)
from model.hf.reader import TORCH_DTYPES, HfReader, HfSource, all_finite, stored_dtype
from model.transformer import Transformer, named_tensors

MAX_SHARD_BYTES = 5_000_000_000
CHUNK_BYTES = 2**24
ROWS = 8 * BLOCK


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
            stored type), or writing fails. Nothing is left behind.
    """
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


NO_SOURCE = HfSource(dtypes={}, scales={}, config={}, rotary={})


class LoadedTransformer(Transformer):
    """A model that records how its checkpoint stored it, so that `save_hf` can write the same bytes again."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, source: HfSource) -> None:
        super().__init__(config, LocalDispatcher(config.num_routed_experts), dtype)
        self.source = source


def load_hf(path: Path | str, dtype: torch.dtype, *, drop_mtp: bool = False) -> Transformer:
    """Loads a checkpoint's whole model to the CPU, with its MTP modules if the checkpoint has them.

    Args:
        dtype: type of the weights; FP8 weights are dequantized. Correction biases stay float32.
        drop_mtp: whether to leave out MTP modules, which are then neither checked nor read.

    Raises:
        HfError: something in the checkpoint is missing, superfluous or wrong.
    """
    reader = HfReader(path, drop_mtp=drop_mtp)
    model = LoadedTransformer(reader.config, dtype, reader.source())
    reader.fill(named_tensors(model))
    return model


def save_hf(
    model: Transformer,
    path: Path | str,
    dtype: torch.dtype | Literal["fp8"] | None = None,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes a model as a checkpoint that `transformers` loads, to an absent or empty folder.

    Args:
        dtype: type of the stored weights. "fp8" stores in FP8 what the released checkpoint has in FP8, the rest in
            bfloat16. None stores every weight in the type that `load_hf` found if that is exact, else in the model's
            type; FP8 is used only if each weight found in FP8 is unchanged. Correction biases are float32, or as found.
        max_shard_bytes: largest size of a file's data, unless one tensor is larger.

    Raises:
        HfError: the model is a part, a value is not finite, or writing fails. Nothing is left behind.
    """
    named = named_tensors(model)
    config = model.config
    for name, shape in weights(config):
        if 0 not in shape and (copied_from(name) or name) not in named:
            raise HfError(path, name, "must be in the model that is written, is not: the model is a part")
    source = model.source if isinstance(model, LoadedTransformer) else NO_SOURCE
    if dtype == "fp8":
        plan = stored_tensors(config, dtype="BF16", fp8=True)
    else:
        plan = stored_tensors(config, dtype=stored_dtype(dtype or named[EMBEDDING].dtype), fp8=False)
    scales = {name: scale for name, scale in source.scales.items() if _is_exact(named[name], scale)}
    if dtype is None:
        plan = _as_stored(plan, named, source, fp8=len(scales) == len(source.scales))
    quantization = source.config.get("quantization_config") or {}
    plan |= rotary_plan(source.rotary)
    write_hf(
        Path(path),
        config,
        plan,
        lambda name: source.rotary[name] if name in source.rotary else named[name],
        scales=Fp8Scales(by_name=scales, power_of_two=quantization.get("scale_fmt") == "ue8m0"),
        extras=Extras(config=source.config, files={}),
        max_shard_bytes=max_shard_bytes,
    )


def rotary_plan(rotary: Mapping[str, Tensor]) -> dict[str, Stored]:
    """Returns the plan for stored rotary frequencies: written in the type in which they were found."""
    return {name: Stored(tuple(values.shape), stored_dtype(values.dtype)) for name, values in rotary.items()}


def _as_stored(
    plan: Mapping[str, Stored], named: Mapping[str, Tensor], source: HfSource, *, fp8: bool
) -> dict[str, Stored]:
    stored_plan: dict[str, Stored] = {}
    for name, stored in plan.items():
        dtype = source.dtypes.get(name)
        if dtype is None:
            # Weights without elements are optional: they are written only if the checkpoint had them.
            if stored.num_elements or not source.dtypes:
                stored_plan[name] = stored
        elif dtype == "F8_E4M3":
            scales = source.dtypes[scale_name(name)]
            stored_plan |= with_scales(name, stored.shape, scales) if fp8 else {name: stored}
        else:
            keeps_dtype = not stored.num_elements or _holds(dtype, named[copied_from(name) or name])
            stored_plan[name] = Stored(stored.shape, dtype) if keeps_dtype else stored
    return stored_plan


def _holds(dtype: StoredDtype, values: Tensor) -> bool:
    runs = values.split(ROWS)
    return all(torch.equal(rows.to(TORCH_DTYPES[dtype]).to(rows.dtype), rows) for rows in runs)


def _is_exact(values_ND: Tensor, scales_MT: Tensor) -> bool:
    for block, rows_RD in enumerate(values_ND.split(BLOCK)):
        scales_1T = scales_MT[block : block + 1].to(rows_RD.device)
        codes_RD = codes_128x128(rows_RD, scales_1T)
        if not torch.equal(dequantize_128x128(QuantizedBlocks(codes_RD, scales_1T), rows_RD.dtype), rows_RD):
            return False
    return True
