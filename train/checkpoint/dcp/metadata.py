"""Decodes and checks `.metadata`, the list of a checkpoint's tensors, before any tensor is read."""

import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from stat import S_ISREG
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from model.hf.names import weights
from train.checkpoint.dcp.records import GlobalName, ObjectRecord, RecordError, read_records, shown
from train.checkpoint.manifest import CheckpointError, is_file_name, read_model

METADATA_NAME = ".metadata"

DTYPES = {
    f"torch.{name}": getattr(torch, name)
    for name in ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "uint8")
}
"""Types that a checkpoint may hold, by the names under which torch pickles them."""

ENVELOPE_BYTES = 2**16
"""Largest size of a stored tensor beyond its values. torch's archive format takes about 1.5 KB."""

_LEAST_BYTES, _LARGEST_BYTES = 2**20, 2**29
_BYTES_PER_WEIGHT = 2**13
_MOST_WEIGHTS = _LARGEST_BYTES // _BYTES_PER_WEIGHT
_MOST_DIMENSIONS = 8
_PACKAGE = "torch.distributed.checkpoint.metadata"
_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX = (
    f"{_PACKAGE}.{name}"
    for name in (
        "Metadata",
        "TensorStorageMetadata",
        "BytesStorageMetadata",
        "TensorProperties",
        "ChunkStorageMetadata",
        "MetadataIndex",
    )
)
_PLACE = "torch.distributed.checkpoint.filesystem._StorageInfo"
_SIZE = "torch.Size"
# Names that torch writes, but that are not needed here.
_UNUSED = (
    *(f"{_PACKAGE}.{name}" for name in ("StorageMeta", "_MEM_FORMAT_ENCODING")),
    "torch.serialization._get_layout",
    *(f"{module}.{kind}" for module in ("pathlib", "pathlib._local") for kind in ("PosixPath", "WindowsPath")),
)
_ALLOWED = frozenset((_METADATA, _TENSOR, _BYTES, _PROPERTIES, _CHUNK, _INDEX, _PLACE, _SIZE, *_UNUSED, *DTYPES))


@dataclass(frozen=True, slots=True)
class ChunkLocation:
    """The bytes of a file that hold one chunk of a tensor.

    Attributes:
        relative_path: name of a file in the checkpoint's folder (see `train.checkpoint.manifest.is_file_name`).
        offset: of the chunk, in bytes.
        length: of the chunk, in bytes.
    """

    relative_path: str
    offset: int
    length: int


def read_metadata(folder: Path, key: str) -> Metadata:
    """Reads the list of a checkpoint's tensors: names, chunks, and the location of each chunk.

    Args:
        key: configuration key that names it, for errors.

    Returns:
        DCP's own record. The values of `storage_data` are of type `ChunkLocation`.

    Raises:
        CheckpointError: the list is missing, larger than the architecture allows, or holds something other than
            tensors.
    """
    place = f"{key}: {folder}: {METADATA_NAME}: must list the tensors"
    largest = _largest_bytes(folder, key)
    try:
        found = (folder / METADATA_NAME).stat()
        if not S_ISREG(found.st_mode) or found.st_size > largest:
            what = f"{found.st_size} bytes" if S_ISREG(found.st_mode) else "no file"
            raise CheckpointError(f"{place} in a file of at most {largest} bytes, is {what}")
        return _metadata(read_records((folder / METADATA_NAME).read_bytes(), _ALLOWED))
    except OSError as error:
        raise CheckpointError(f"{place}, cannot be read: {error.strerror or error}") from error
    except RecordError as error:
        raise CheckpointError(f"{place}, cannot be read: {error}") from error


def _largest_bytes(folder: Path, key: str) -> int:
    """Returns the largest valid size of the list in bytes, from the number of weights in the architecture."""
    num_weights = sum(1 for _ in islice(weights(read_model(folder, key)), _MOST_WEIGHTS))
    return min(_LEAST_BYTES + num_weights * _BYTES_PER_WEIGHT, _LARGEST_BYTES)


def _metadata(value: Any) -> Metadata:
    fields = _fields(value, _METADATA)
    tensors, places = fields.get("state_dict_metadata"), fields.get("storage_data")
    if type(tensors) is not dict or type(places) is not dict:
        raise RecordError("must hold state_dict_metadata and storage_data")
    placed = {_index(index): _place(place) for index, place in places.items()}
    named = {_text(name): _tensor(_text(name), tensor) for name, tensor in tensors.items()}
    for name, tensor in named.items():
        _check_chunks(name, tensor, placed)
    return Metadata(state_dict_metadata={**named}, storage_data=placed)


def _tensor(name: str, value: Any) -> TensorStorageMetadata:
    fields = _fields(value, _TENSOR, subject=name)
    properties, chunks = fields.get("properties"), fields.get("chunks")
    if (
        not isinstance(properties, ObjectRecord)
        or properties.name != _PROPERTIES
        or type(properties.state) is not tuple
    ):
        raise RecordError(f"{shown(name)}: must have properties")
    dtype = properties.state[0] if properties.state else None
    if not isinstance(dtype, GlobalName) or dtype.text not in DTYPES:
        raise RecordError(f"{shown(name)}: must have one of the types {', '.join(DTYPES)}")
    if type(chunks) is not list:
        raise RecordError(f"{shown(name)}: must have a list of chunks")
    return TensorStorageMetadata(
        properties=TensorProperties(dtype=DTYPES[dtype.text]),
        size=_size(fields.get("size")),
        chunks=[_chunk(chunk) for chunk in chunks],
    )


def _chunk(value: Any) -> ChunkStorageMetadata:
    fields = _fields(value, _CHUNK)
    return ChunkStorageMetadata(offsets=_size(fields.get("offsets")), sizes=_size(fields.get("sizes")))


def _check_chunks(name: str, tensor: TensorStorageMetadata, placed: dict[MetadataIndex, ChunkLocation]) -> None:
    """Refuses chunks that exceed or do not fill their tensor, have no location, or take too many bytes."""
    subject, size, num_elements = shown(name), tuple(tensor.size), 0
    for chunk in tensor.chunks:
        ends = [first + count for first, count in zip(chunk.offsets, chunk.sizes, strict=False)]
        if not len(chunk.offsets) == len(chunk.sizes) == len(size) or any(
            end > most for end, most in zip(ends, size, strict=False)
        ):
            raise RecordError(f"{subject}: its chunks must lie within shape {size}, one does not")
        num_elements += math.prod(chunk.sizes)
        place = placed.get(MetadataIndex(name, chunk.offsets))
        if place is None:
            raise RecordError(f"{subject}: its chunk at {tuple(chunk.offsets)} must have a place, has none")
        most = math.prod(chunk.sizes) * tensor.properties.dtype.itemsize + ENVELOPE_BYTES
        if place.length > most:
            raise RecordError(f"{subject}: a chunk must take at most {most} bytes, takes {place.length}")
    if num_elements != math.prod(size):
        raise RecordError(f"{subject}: its chunks must have shape {size} together, have {num_elements} elements")


def _index(value: Any) -> MetadataIndex:
    fields = _fields(value, _INDEX)
    offset = fields.get("offset")
    return MetadataIndex(_text(fields.get("fqn")), None if offset is None else _size(offset))


def _place(value: Any) -> ChunkLocation:
    fields = _fields(value, _PLACE)
    path, offset, length = (fields.get(key) for key in ("relative_path", "offset", "length"))
    name = _text(path)
    if not is_file_name(name):
        raise RecordError(f"must name files in its folder, names '{shown(name)}'")
    if fields.get("transform_descriptors"):
        raise RecordError(f"{shown(name)}: must hold tensors without transformation, is transformed")
    return ChunkLocation(name, _whole(offset), _whole(length))


def _size(value: Any) -> torch.Size:
    arguments = value.arguments if isinstance(value, ObjectRecord) and value.name == _SIZE else ()
    sizes = arguments[0] if len(arguments) == 1 else None
    if type(sizes) is not tuple or len(sizes) > _MOST_DIMENSIONS:
        raise RecordError(f"must hold sizes of at most {_MOST_DIMENSIONS} dimensions, holds something else")
    return torch.Size([_whole(size) for size in sizes])


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RecordError(f"must hold whole numbers from 0, holds {value if type(value) is int else 'something else'}")
    return value


def _text(value: Any) -> str:
    if type(value) is not str:
        raise RecordError(f"must hold a text as a name, holds a {type(value).__name__}")
    return value


def _fields(value: Any, name: str, subject: str = "") -> dict[str, Any]:
    place = f"{shown(subject)}: " if subject else ""
    if not isinstance(value, ObjectRecord) or value.name != name:
        found = shown(value.name) if isinstance(value, ObjectRecord) else f"a {type(value).__name__}"
        raise RecordError(f"{place}must be a {name.rpartition('.')[2]}, is {found}")
    if type(value.state) is not dict:
        raise RecordError(f"{place}must have fields, has none")
    return value.state
