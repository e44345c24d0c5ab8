"""Converts weights between forms of checkpoints, tensor by tensor, with at most two shards in memory."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data.corpus import DataError
from data.progress import progress_text
from data.tokenizer import Tokenizer, find_tokenizer_file
from model.config import ModelConfig
from model.hf.files import create_folder_atomically, write_synced
from model.hf.names import (
    BIAS_SUFFIX,
    EMBEDDING,
    SCALE_SUFFIX,
    Stored,
    StoredDtype,
    copied_from,
    layer_of,
    stored_tensors,
    weights,
)
from model.hf.reader import TORCH_DTYPES, HfReader
from model.hf.writer import Extras, Fp8Scales, rotary_plan, split_into_shards, write_hf
from train.checkpoint.index import (
    INDEX_NAME,
    PART_SUFFIX,
    PREFIXES,
    ROTARY_PREFIX,
    Index,
    IndexEntry,
    TensorPart,
    index_json,
)
from train.checkpoint.manifest import TOKENIZER_NAME, CheckpointError, Digest, write_weights_manifest
from train.checkpoint.parts import write_part
from train.checkpoint.preserved import (
    PreservedMetadata,
    read_preserved,
    server_files,
    without_unknown_templates,
)
from train.checkpoint.sources import (
    CheckpointReader,
    Conversion,
    held_weights,
    is_hf_folder,
    source_folder,
    unknown_notes,
)

Say = Callable[[str], None]

_WEIGHTS = PREFIXES["trained"]
_WORDS: dict[str, StoredDtype] = {"bf16": "BF16", "float32": "F32", "fp8": "BF16"}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Source:
    """The opened source of a conversion; `tensor` reads by name and converts to a type."""

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
    """Writes the weights in another form, complete or not at all, and returns a line for people.

    Raises:
        CheckpointError, HfError: the weights cannot be read, or the destination is not empty or cannot be written.
    """
    source = _open(conversion)
    if unknown := unknown_notes(conversion.path):
        say(unknown)
    if not conversion.accept_template:
        files, left_out = without_unknown_templates(source.preserved.files)
        source = replace(source, preserved=replace(source.preserved, files=files))
        for name in left_out:
            say(f"{name}: its chat template is not known and left out; accept_template=true copies it")
    counter = _Counter(source, conversion.file_bytes, say)
    write = _write_checkpoint if conversion.target == "checkpoint" else _write_hf
    write(conversion, source, counter.read)
    written = sum(file.stat().st_size for file in conversion.folder.iterdir())
    read = f"{counter.num_tensors} tensors, {_bytes_text(counter.num_bytes)}"
    return f"wrote {conversion.folder}, {_bytes_text(written)}, from {read}"


def _open(conversion: Conversion) -> _Source:
    path = conversion.path
    drop_mtp = conversion.drop_mtp
    folder = source_folder(path, "path")
    preserved = read_preserved(path, "path")
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
    num_layers = config.num_layers + config.mtp_depth
    dtypes = checkpoint.dtypes
    stored_types = {name: dtypes[name] for name in held_weights(config)}

    def tensor(name: str, dtype: torch.dtype) -> Tensor:
        # Hugging Face's form also contains weights without elements.
        return checkpoint.tensor(name, dtype) if name in stored_types else torch.empty(shapes[name], dtype=dtype)

    return _Source(
        config=config,
        folder=folder,
        dtypes={name: stored_types.get(name, stored_types[EMBEDDING]) for name in shapes},
        scales={},
        preserved=preserved,
        rotary={name: values for name, values in preserved.rotary.items() if (layer_of(name) or 0) < num_layers},
        tensor=tensor,
    )


def _write_checkpoint(conversion: Conversion, source: _Source, read: Callable[[str], Tensor]) -> None:
    plan = {ROTARY_PREFIX + name: stored for name, stored in rotary_plan(source.rotary).items()}
    for name, shape in held_weights(source.config).items():
        dtype: StoredDtype = "BF16" if source.dtypes[name] == "F8_E4M3" else source.dtypes[name]
        if conversion.dtype is not None:
            dtype = _WORDS[conversion.dtype]
        plan[_WEIGHTS + name] = Stored(shape, "F32" if name.endswith(BIAS_SUFFIX) else dtype)

    def read_rounded(name: str) -> Tensor:
        if name.startswith(ROTARY_PREFIX):
            return source.rotary[name.removeprefix(ROTARY_PREFIX)]
        dtype = TORCH_DTYPES[plan[name].dtype]
        values = read(name.removeprefix(_WEIGHTS)).to(dtype)
        if not values.isfinite().all():
            subject = f"{conversion.folder}: {name.removeprefix(_WEIGHTS)}"
            raise CheckpointError(f"{subject}: must hold finite numbers in {dtype}, does not")
        return values

    files: dict[str, Digest] = {}
    index: Index = {}
    with create_folder_atomically(conversion.folder) as folder:
        for number, tensors in enumerate(split_into_shards(plan, conversion.file_bytes)):
            file = f"weights_{number:05}{PART_SUFFIX}"
            entries = {
                name: IndexEntry(stored, (TensorPart(file, 0, stored.num_elements),))
                for name, stored in tensors.items()
            }
            files[file], written = write_part(folder, file, entries, read_rounded)
            index |= written
        others = {**source.preserved.files, **_tokenizer_file(source.folder), INDEX_NAME: index_json(index).encode()}
        for name, content in others.items():
            write_synced(folder / name, content)
        write_weights_manifest(folder, source.config, source.preserved.config, files)


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
        max_shard_bytes=conversion.file_bytes,
    )


def _plan_hf(conversion: Conversion, source: _Source) -> tuple[dict[str, Stored], Fp8Scales]:
    config = source.config
    quantization = source.preserved.config.get("quantization_config") or {}
    scales = Fp8Scales(by_name=source.scales, power_of_two=quantization.get("scale_fmt") == "ue8m0")
    if conversion.dtype is not None:
        return stored_tensors(config, dtype=_WORDS[conversion.dtype], fp8=conversion.dtype == "fp8"), scales
    plan = stored_tensors(config, dtype="BF16", fp8=bool(source.scales))
    source_types: dict[str, Stored] = {}
    for name, stored in plan.items():
        original = copied_from(name) or name
        if original in source.dtypes:
            source_types[name] = Stored(stored.shape, source.dtypes[original])
        elif original.removesuffix(SCALE_SUFFIX) in source.scales:
            source_types[name] = stored
    return source_types, scales


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
        stored = {name: Stored(shape, source.dtypes[name]) for name, shape in shapes.items()}
        self._sizes = {name: item.num_elements * TORCH_DTYPES[item.dtype].itemsize for name, item in stored.items()}
        self._source = source
        self._shard_bytes = shard_bytes
        self._say = say
        self._read: set[str] = set()
        self._began = time.monotonic()
        self.num_bytes = 0
        self.num_tensors = 0

    def read(self, name: str) -> Tensor:
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


def _bytes_text(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:,.2f} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:,.2f} MB"
