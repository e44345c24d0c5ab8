"""Converts weights between forms of checkpoints, tensor by tensor, with at most two shards in memory."""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from data.corpus import DataError
from data.progress import progress_text
from data.tokenizer import Tokenizer
from data.tokenizer_files import find_tokenizer_file
from model.config import ModelConfig
from model.hf.convert import rotary_plan
from model.hf.dtypes import TORCH_DTYPES, stored_dtype
from model.hf.folder import create_folder_atomically
from model.hf.names import (
    BIAS_SUFFIX,
    EMBEDDING,
    SCALE_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    stored_tensors,
    weights,
)
from model.hf.reader import HfReader
from model.hf.writer import Extras, Fp8Scales, write_hf
from train.checkpoint.manifest import TOKENIZER_NAME, CheckpointError, write_weights_manifest
from train.checkpoint.preserved import (
    PreservedMetadata,
    read_preserved,
    rotary_record,
    rotary_tensors,
    server_files,
    without_unknown_templates,
)
from train.checkpoint.sources import is_hf_folder, source_folder, unknown_notes
from train.checkpoint.weights import CheckpointReader, WeightsKind, held_weights, write_weights

Say = Callable[[str], None]

_WORDS: dict[str, StoredDtype] = {"bf16": "BF16", "float32": "F32", "fp8": "BF16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """The source, destination and form of a conversion.

    Attributes:
        path: source: a Hugging Face folder, converted weights, a run's folder or a checkpoint.
        folder: destination, new or empty.
        form: a Hugging Face folder or a checkpoint of this project.
        dtype: type of the written weights; None: the stored type, with FP8 written to a checkpoint as bf16. Router
            biases are always float32.
        max_shard_bytes: largest size of a file.
        weights: whether to read the trained weights or their moving average.
        drop_mtp: whether to leave MTP modules out.
        accept_template: whether to copy a chat template that is not known.
    """

    path: str
    folder: Path
    form: Literal["hf", "checkpoint"]
    dtype: Literal["bf16", "float32", "fp8"] | None
    max_shard_bytes: int
    weights: WeightsKind = "trained"
    drop_mtp: bool = False
    accept_template: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The opened source of a conversion.

    Attributes:
        config: architecture.
        folder: folder of the weights.
        dtypes: stored types by name.
        scales: scales of FP8 weights by name.
        preserved: metadata to copy.
        rotary: stored frequencies.
        tensor: reads a tensor by name, converted to a type.
    """

    config: ModelConfig
    folder: Path
    dtypes: Mapping[str, StoredDtype]
    scales: Mapping[str, Tensor]
    preserved: PreservedMetadata
    rotary: Mapping[str, Tensor]
    tensor: Callable[[str, torch.dtype], Tensor]

    def read(self, name: str) -> Tensor:
        """Reads a tensor without loss, in its stored type or, if it is FP8, in float32."""
        dtype = self.dtypes[name]
        return self.tensor(name, torch.float32 if dtype == "F8_E4M3" else TORCH_DTYPES[dtype])


def convert(conversion: Conversion, say: Say) -> str:
    """Writes the weights in another form, complete or not at all.

    Args:
        conversion: source, destination and form.
        say: prints a line of progress after each shard, and a line that names unknown keys of `config.json`.

    Returns:
        A line that describes what was written.

    Raises:
        CheckpointError: the weights cannot be read.
        HfError: the weights cannot be read, the destination is not empty, or it cannot be written.
    """
    source = _open(conversion)
    if unknown := unknown_notes(conversion.path):
        say(unknown)
    if not conversion.accept_template:
        files, left_out = without_unknown_templates(source.preserved.files)
        source = replace(source, preserved=replace(source.preserved, files=files))
        for name in left_out:
            say(f"{name}: its chat template is not known and left out; accept_template=true copies it")
    counter = _Counter(source, conversion.max_shard_bytes, say)
    write = _write_checkpoint if conversion.form == "checkpoint" else _write_hf
    write(conversion, source, counter.read)
    written = sum(file.stat().st_size for file in Path(conversion.folder).iterdir())
    read = f"{counter.num_tensors} tensors, {_bytes_text(counter.num_bytes)}"
    return f"wrote {conversion.folder}, {_bytes_text(written)}, from {read}"


def _open(conversion: Conversion) -> _Source:
    path, drop_mtp = conversion.path, conversion.drop_mtp
    folder, preserved = source_folder(path, "path"), read_preserved(path, "path")
    if is_hf_folder(path):
        reader = HfReader(folder, drop_mtp=drop_mtp)
        stored = reader.source()
        return _Source(
            config=reader.config,
            folder=folder,
            dtypes=stored.dtypes,
            scales=stored.scales,
            preserved=preserved,
            rotary=stored.rotary,
            tensor=reader.tensor,
        )
    checkpoint = CheckpointReader(folder, "path", conversion.weights)
    config = replace(checkpoint.config, mtp_depth=0) if drop_mtp else checkpoint.config
    shapes = {name: shape for name, shape in weights(config) if copied_from(name) is None}
    held = {name: stored_dtype(checkpoint.dtype_of(name)) for name in held_weights(config)}

    def tensor(name: str, dtype: torch.dtype) -> Tensor:
        # Hugging Face's form also contains weights without elements.
        return checkpoint.tensor(name, dtype) if name in held else torch.empty(shapes[name], dtype=dtype)

    return _Source(
        config=config,
        folder=folder,
        dtypes={name: held.get(name, held[EMBEDDING]) for name in shapes},
        scales={},
        preserved=preserved,
        rotary=rotary_tensors(preserved.rotary, config.num_layers + config.mtp_depth, folder),
        tensor=tensor,
    )


def _write_checkpoint(conversion: Conversion, source: _Source, read: Callable[[str], Tensor]) -> None:
    word = None if conversion.dtype is None else TORCH_DTYPES[_WORDS[conversion.dtype]]
    plan: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in held_weights(source.config).items():
        stored = torch.bfloat16 if source.dtypes[name] == "F8_E4M3" else TORCH_DTYPES[source.dtypes[name]]
        plan[name] = shape, torch.float32 if name.endswith(BIAS_SUFFIX) else word or stored
    with create_folder_atomically(conversion.folder) as folder:
        write_weights(
            folder,
            plan,
            lambda name: _rounded(read(name), plan[name][1], conversion.folder, name),
            max_file_bytes=conversion.max_shard_bytes,
        )
        for name, content in {**source.preserved.files, **_tokenizer_file(source.folder)}.items():
            with (folder / name).open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        preserved = replace(source.preserved, rotary=rotary_record(source.rotary))
        write_weights_manifest(folder, source.config, preserved.record())


def _rounded(values: Tensor, dtype: torch.dtype, folder: Path, name: str) -> Tensor:
    made = values.to(dtype)
    if not made.isfinite().all():
        raise CheckpointError(f"{folder}: {name}: must hold finite numbers in {dtype}, does not")
    return made


def _write_hf(conversion: Conversion, source: _Source, read: Callable[[str], Tensor]) -> None:
    plan, scales = _plan_hf(conversion, source)
    ids, files = _for_servers(source)
    write_hf(
        conversion.folder,
        source.config,
        plan | rotary_plan(source.rotary),
        lambda name: source.rotary[name] if name in source.rotary else read(name),
        scales=scales,
        extras=Extras(
            config={**ids, **source.preserved.config},
            files={**files, **source.preserved.files, **_tokenizer_file(source.folder)},
        ),
        max_shard_bytes=conversion.max_shard_bytes,
    )


def _plan_hf(conversion: Conversion, source: _Source) -> tuple[dict[str, Stored], Fp8Scales]:
    config, quantization = source.config, source.preserved.config.get("quantization_config") or {}
    scales = Fp8Scales(known=source.scales, power_of_two=quantization.get("scale_fmt") == "ue8m0")
    if conversion.dtype is not None:
        return stored_tensors(config, dtype=_WORDS[conversion.dtype], fp8=conversion.dtype == "fp8"), scales
    plan = stored_tensors(config, dtype="BF16", fp8=bool(source.scales))
    kept: dict[str, Stored] = {}
    for name, stored in plan.items():
        original = copied_from(name) or name
        if original in source.dtypes:
            kept[name] = Stored(stored.shape, source.dtypes[original])
        elif original.removesuffix(SCALE_SUFFIX) in source.scales:
            kept[name] = stored
    return kept, scales


def _tokenizer_file(folder: Path) -> dict[str, bytes]:
    path = folder / TOKENIZER_NAME
    return {TOKENIZER_NAME: path.read_bytes()} if path.is_file() else {}


def _for_servers(source: _Source) -> tuple[dict[str, int], dict[str, bytes]]:
    """Returns keys of `config.json` and files for inference servers, if the source has a tokenizer."""
    try:
        path = find_tokenizer_file(source.folder)
        if path is None:
            return {}, {}
        tokenizer = Tokenizer.load(path)
    except DataError:
        return {}, {}
    return server_files(tokenizer, source.config.max_position_tokens)


class _Counter:
    """A reader that counts tensors and bytes, and prints its progress after each shard."""

    def __init__(self, source: _Source, shard_bytes: int, say: Say) -> None:
        shapes = held_weights(source.config)
        self._sizes = {name: _num_bytes(shape, source.dtypes[name]) for name, shape in shapes.items()}
        self._source = source
        self._shard_bytes = shard_bytes
        self._say = say
        self._read: set[str] = set()
        self._began = time.monotonic()
        self.num_bytes = 0
        self.num_tensors = 0

    def read(self, name: str) -> Tensor:
        """Reads a tensor of the source, and prints the progress if a shard is complete."""
        tensor = self._source.read(name)
        if name in self._read:  # an MTP module's copy
            return tensor
        self._read.add(name)
        shards_before = self.num_bytes // self._shard_bytes
        self.num_tensors += 1
        self.num_bytes += self._sizes.get(name, 0)
        if self.num_bytes // self._shard_bytes > shards_before:
            how_far = progress_text(self.num_bytes, sum(self._sizes.values()), time.monotonic() - self._began)
            self._say(f"read {self.num_tensors} of {len(self._sizes)} tensors, {how_far}")
        return tensor


def _num_bytes(shape: tuple[int, ...], dtype: StoredDtype) -> int:
    return Stored(shape, dtype).num_elements * TORCH_DTYPES[dtype].itemsize


def _bytes_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"
