"""Reads one tensor that torch saved in a file, without torch's unpickler.

Header, type, shape and bytes are checked. torch saves a tensor as an uncompressed zip archive: `data.pkl` describes the
tensor, `data/0` holds its bytes.
"""

import io
import math
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO
from zipfile import ZIP_STORED, BadZipFile, ZipFile, ZipInfo

import numpy as np
import torch
from torch import Tensor

from train.checkpoint.dcp.metadata import DTYPES
from train.checkpoint.dcp.records import GlobalName, ObjectRecord, PersistentId, RecordError, read_records

_REBUILD, _REBUILD_TYPED = "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_tensor_v3"
_PARAMETER = "torch._utils._rebuild_parameter"
_UNTYPED = "torch.storage.UntypedStorage"
_STORAGES = {
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ByteStorage": torch.uint8,
}
_ALLOWED = frozenset((_REBUILD, _REBUILD_TYPED, _PARAMETER, _UNTYPED, "collections.OrderedDict", *_STORAGES, *DTYPES))
_LARGEST_HEADER_BYTES = 2**14
# This is also the largest read at once, and so the largest size of an archive's list of members.
_STEP_BYTES = 2**20


def read_tensor(file: BinaryIO, offset: int, length: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Reads the tensor that torch saved in a part of a file.

    Args:
        offset: of the part, in bytes.
        length: of the part, in bytes.
        shape: required shape of the tensor.
        dtype: required type of the tensor.

    Raises:
        RecordError: the part holds something else, or exceeds the file.
    """
    file.seek(0, io.SEEK_END)
    if offset + length > file.tell():
        raise RecordError(f"must have at least {offset + length} bytes, has {file.tell()}")
    try:
        with ZipFile(_Part(file, offset, length)) as archive:
            members = {member.filename.partition("/")[2]: member for member in archive.infolist()}
            header = _content(archive, members.get("data.pkl"), _LARGEST_HEADER_BYTES)
            if "byteorder" in members and _content(archive, members["byteorder"], 16) != sys.byteorder.encode():
                raise RecordError(f"must be {sys.byteorder}-endian, is not")
            form = _form(header, dtype)
            _check_form(form, tuple(shape), length // dtype.itemsize)
            storage = _storage(archive, members.get(f"data/{form.key}"), form.num_elements * dtype.itemsize)
    # zipfile raises all of these on damaged archives and on other files.
    except (BadZipFile, NotImplementedError, RuntimeError, ValueError, OverflowError, EOFError, KeyError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"must hold a tensor as torch saves it ({error})") from error
    return torch.as_strided(storage.view(dtype), form.shape, form.strides, form.offset)


class _Form:
    """The content of a header: the number of elements of a storage, and the tensor's place in it."""

    def __init__(self, storage: tuple[Any, ...], offset: Any, shape: Any, strides: Any) -> None:
        self.key = _of(storage[2], str)
        self.num_elements = _whole(storage[4])
        self.offset = _whole(offset)
        self.shape = tuple(_whole(size) for size in _of(shape, tuple))
        self.strides = tuple(_whole(stride) for stride in _of(strides, tuple))


def _form(header: bytes, dtype: torch.dtype) -> _Form:
    record = read_records(header, _ALLOWED)
    if isinstance(record, ObjectRecord) and record.name == _PARAMETER and record.arguments:
        record = record.arguments[0]
    is_typed = isinstance(record, ObjectRecord) and record.name == _REBUILD_TYPED
    if not isinstance(record, ObjectRecord) or record.name not in (_REBUILD, _REBUILD_TYPED):
        raise RecordError("must hold a tensor, holds something else")
    arguments = record.arguments
    if len(arguments) < 6 + is_typed or not isinstance(arguments[0], PersistentId):
        raise RecordError("must hold a whole tensor")
    storage = _of(arguments[0].key, tuple)
    if len(storage) != 5 or storage[0] != "storage" or not isinstance(storage[1], GlobalName):
        raise RecordError("must name its storage")
    named = arguments[6] if is_typed else storage[1]
    found = DTYPES.get(_of(named, GlobalName).text) if is_typed else _STORAGES.get(named.text)
    if found is not dtype or (is_typed and storage[1].text != _UNTYPED):
        raise RecordError(f"must be {dtype} as .metadata says, is {found or storage[1].text}")
    form = _Form(storage, *arguments[1:4])
    if is_typed:  # an untyped storage is counted in bytes
        form.num_elements //= dtype.itemsize
    return form


def _check_form(form: _Form, shape: tuple[int, ...], most_elements: int) -> None:
    if form.num_elements > most_elements:
        raise RecordError(f"must have at most {most_elements} elements in its storage, has {form.num_elements}")
    if form.shape != shape:
        raise RecordError(f"must have shape {shape} as .metadata says, has {form.shape}")
    if len(form.strides) != len(shape):
        raise RecordError("must have a stride for every dimension")
    last = sum((size - 1) * stride for size, stride in zip(shape, form.strides, strict=True))
    if math.prod(shape) and form.offset + last >= form.num_elements:
        raise RecordError("must lie within its storage, exceeds it")


def _storage(archive: ZipFile, member: ZipInfo | None, num_bytes: int) -> Tensor:
    """Reads the bytes of a storage in steps, and checks their number and checksum."""
    _check_member(member, num_bytes)
    assert member is not None
    if member.file_size != num_bytes:
        raise RecordError(f"must hold {num_bytes} bytes, holds {member.file_size}")
    storage = torch.empty(num_bytes, dtype=torch.uint8)
    view = storage.numpy()
    with archive.open(member) as file:
        for first in range(0, num_bytes, _STEP_BYTES):
            part = file.read(min(_STEP_BYTES, num_bytes - first))
            view[first : first + len(part)] = np.frombuffer(part, np.uint8)
        file.read(1)  # reading past the end makes zipfile compare the checksum
    return storage


def _content(archive: ZipFile, member: ZipInfo | None, largest: int) -> bytes:
    _check_member(member, largest)
    assert member is not None
    return archive.read(member)


def _check_member(member: ZipInfo | None, largest: int) -> None:
    if member is None:
        raise RecordError("must hold a tensor as torch saves it, a part is missing")
    if member.compress_type != ZIP_STORED or member.file_size != member.compress_size:
        raise RecordError("must hold uncompressed values, holds compressed ones")
    if member.file_size > largest:
        raise RecordError(f"{member.filename[:80]!r}: must have at most {largest} bytes, has {member.file_size}")


class _Part(io.RawIOBase):
    """A part of a file that behaves like a file. It refuses large reads."""

    def __init__(self, file: BinaryIO, offset: int, length: int) -> None:
        super().__init__()
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if start + offset < 0:
            raise RecordError("must hold a tensor as torch saves it")
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int | None = -1) -> bytes:
        rest = max(self._length - self._place, 0)
        size = rest if size is None or size < 0 else min(size, rest)
        if size > _STEP_BYTES:
            raise RecordError(f"must hold a tensor as torch saves it, reads {size} bytes at once")
        self._file.seek(self._offset + self._place)
        content = self._file.read(size)
        self._place += len(content)
        return content


def _whole(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise RecordError("must hold whole numbers from 0")
    return value


def _of(value: Any, kind: type[Any]) -> Any:
    if type(value) is not kind:
        raise RecordError(f"must hold a {kind.__name__}, holds a {type(value).__name__}")
    return value
