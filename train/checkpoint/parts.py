"""Writes and reads the state of a rank as files of tensors, with one buffer of `CHUNK_BYTES`.

Names and slices of a state do not depend on the layout. The files have the safetensors format. The library
`safetensors` checks their headers. It is not used for the data: its writer copies all tensors of a file, and its reader
maps whole files (see `model.hf.checkpoint`).
"""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

import torch
from torch import Tensor

from model.hf.checkpoint import ITEM_BYTES, TensorEntry, lay_out, read_header
from model.hf.files import HfError
from model.hf.names import Stored
from model.hf.reader import TORCH_DTYPES, stored_dtype
from model.transformer import named_tensors
from train.checkpoint.index import PREFIXES, Index, IndexEntry, TensorPart
from train.checkpoint.manifest import CheckpointError, Digest
from train.optim.adamw import Slice

if TYPE_CHECKING:
    from train.core.learner import Learner, ParameterEma
    from train.post.comparison import Reference


CHUNK_BYTES = 2**24
_NUM_HEADERS = 16
OPTIMIZER_PREFIX = "optimizer."


def as_slice(values: Slice | Tensor) -> Slice:
    """Returns a slice unchanged, and a contiguous tensor as the slice of all its elements."""
    return values if isinstance(values, Slice) else Slice(values.numel(), 0, values.detach().view(-1))


State = dict[str, Slice | Tensor]
Extras = Mapping[str, "ParameterEma | Reference"]
"""Further state by the prefix of its names."""


def state_of(learner: "Learner", extras: Extras) -> State:
    """Returns weights, router bias, optimizer state and further state of this rank, not copies."""
    state: State = {PREFIXES["trained"] + name: tensor for name, tensor in named_tensors(learner.replica.model).items()}
    state |= {f"{OPTIMIZER_PREFIX}{name}": values for name, values in learner.optimizer.state().items()}
    for prefix, extra in extras.items():
        state |= {f"{prefix}.{name}": values for name, values in extra.state().items()}
    return state


class HostCopy:
    """Host memory for copies of a state. It is reused, because allocating it takes longer than filling it."""

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def of(self, state: State) -> State:
        """Copies a state to the host, and returns the copy, which is valid until the next call."""
        return {name: self._copy(name, values) for name, values in state.items()}

    def _copy(self, name: str, values: Slice | Tensor) -> Slice | Tensor:
        if isinstance(values, Slice):
            return replace(values, local=self._fill(name, values.local))
        return self._fill(name, values)

    def _fill(self, name: str, source: Tensor) -> Tensor:
        buffer = self._kept.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (source.shape, source.dtype):
            buffer = source.new_empty(source.shape, device="cpu", pin_memory=source.is_cuda)
            self._kept[name] = buffer
        return buffer.copy_(source.detach())


def index_of(state: State, file: str) -> Index:
    """Returns the index of what a rank holds, as if all of it were in one file."""
    index: Index = {}
    for name, values in state.items():
        local_slice = as_slice(values)
        if local_slice.local.numel():  # what has no elements is not stored
            stored = Stored(_shape(values), stored_dtype(local_slice.local.dtype))
            index[name] = IndexEntry(stored, (TensorPart(file, local_slice.offset, local_slice.local.numel()),))
    return index


def _shape(values: Slice | Tensor) -> tuple[int, ...]:
    """Returns the shape of the whole tensor; that of a slice is flat."""
    return (values.whole,) if isinstance(values, Slice) else tuple(values.shape)


def write_part(folder: Path, file_name: str, index: Index, read: Callable[[str], Tensor]) -> tuple[Digest, Index]:
    """Writes a file with one part of each tensor; returns its digest and the index with checksums.

    `read` returns the elements of a tensor's part, with the type that the index states. Its errors are not changed.
    """
    tensors = {name: entry.stored_part(entry.parts[0]) for name, entry in index.items()}
    begins, header = lay_out(tensors)
    sha256 = hashlib.sha256(header)
    written: Index = {}
    with (folder / file_name).open("xb") as file:
        file.write(header)
        for name in begins:
            values = read(name).detach()
            stored = tensors[name]
            assert (values.numel(), values.dtype) == (stored.num_elements, TORCH_DTYPES[stored.dtype]), name
            content = values.contiguous().view(-1).view(torch.uint8).numpy().data
            sha256.update(content)
            file.write(content)
            entry = index[name]
            written[name] = replace(entry, parts=(replace(entry.parts[0], crc32=crc32(content)),))
        file.flush()
        os.fsync(file.fileno())
        return Digest(file.tell(), sha256.hexdigest()), written


class PartReader:
    """Reads elements of a checkpoint's tensors. It keeps one buffer and the headers of the last files."""

    def __init__(self, folder: Path, index: Index) -> None:
        self._folder = folder
        self._index = index
        self._buffer = bytearray(CHUNK_BYTES)
        self._header = lru_cache(_NUM_HEADERS)(read_header)

    def fill(self, state: State) -> None:
        """Fills contiguous tensors and slices in place, converted to their types.

        Raises:
            CheckpointError: a tensor is missing or has another shape, or a file contradicts the index.
        """
        parts_by_file: dict[str, list[tuple[str, TensorPart]]] = {}
        for name, values in state.items():
            target = as_slice(values)
            for part in self._entry(name, values).parts if target.local.numel() else ():
                if part.first < target.offset + target.local.numel() and target.offset < part.first + part.count:
                    parts_by_file.setdefault(part.file, []).append((name, part))
        for file_name, parts in sorted(parts_by_file.items()):
            try:
                header = self._header(self._folder / file_name)
                with (self._folder / file_name).open("rb") as file:
                    for name, part in parts:
                        self._fill_overlap(as_slice(state[name]), part, file, header, name)
            except HfError as error:
                raise CheckpointError(str(error).removeprefix(f"{self._folder}/")) from error
            except OSError as error:
                raise CheckpointError(f"{file_name}: must be readable, is not ({error.strerror or error})") from error

    def _entry(self, name: str, values: Slice | Tensor) -> IndexEntry:
        entry = self._index.get(name)
        if entry is None:
            raise CheckpointError(f"{name}: must be a tensor of the checkpoint, is missing")
        if entry.stored.shape != _shape(values):
            raise CheckpointError(f"{name}: must have shape {_shape(values)}, has {entry.stored.shape}")
        return entry

    def _position(self, name: str, part: TensorPart, header: Mapping[str, TensorEntry]) -> TensorEntry:
        stored = self._index[name].stored_part(part)
        entry = header.get(name)
        if entry is None:
            raise CheckpointError(f"{part.file}: {name}: must be in the file by the index, is missing")
        if (entry.dtype, entry.shape) != (stored.dtype, stored.shape):
            raise CheckpointError(
                f"{part.file}: {name}: must be {stored.dtype} of shape {list(stored.shape)} by the index, "
                f"is {entry.dtype} of shape {list(entry.shape)}"
            )
        return entry

    def _fill_overlap(
        self, target: Slice, part: TensorPart, file: BufferedReader, header: Mapping[str, TensorEntry], name: str
    ) -> None:
        """Copies the elements that a part and a slice share; checks the checksum of a whole part."""
        entry = self._position(name, part, header)
        item_bytes = ITEM_BYTES[entry.dtype]
        most = CHUNK_BYTES // item_bytes
        first = max(target.offset, part.first)
        end = min(target.offset + target.local.numel(), part.first + part.count)
        file.seek(entry.offset + (first - part.first) * item_bytes)
        checksum = 0
        for begin in range(first, end, most):
            count = min(most, end - begin)
            content = memoryview(self._buffer)[: count * item_bytes]
            if file.readinto(content) != len(content):
                raise HfError(entry.file, "", "must have the size that its header states, ends early")
            checksum = crc32(content, checksum)
            position = begin - target.offset
            values = torch.frombuffer(self._buffer, dtype=TORCH_DTYPES[entry.dtype], count=count)
            target.local[position : position + count].copy_(values)
        if end - first == part.count and checksum != part.crc32:
            raise CheckpointError(f"{part.file}: {name}: must have the CRC-32 that the index lists, has another")
