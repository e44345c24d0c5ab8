"""Reads and writes Megatron's indexed datasets.

Token ids are in `NAME.bin`, lengths of sequences and ends of documents in `NAME.idx`.
Source: Megatron-Core, `megatron/core/datasets/indexed_dataset.py`. All numbers are little-endian.
"""

import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from base.files import replacing
from data.readers.lines import MAX_DOCUMENT_BYTES, TextField, lost_rows
from data.registry import BrokenRow, CorpusFile, Document

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<QBQQ")  # version, type, sequences, ends of documents
_TYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_ROWS = 2**12
_MOST_SEQUENCES = 2**24  # of so many documents


@dataclass(frozen=True, kw_only=True, slots=True)
class _Index:
    path: Path
    dtype: np.dtype[np.integer]
    sequences: int
    documents: int

    @property
    def lengths_at(self) -> int:
        return len(_MAGIC) + _HEADER.size

    @property
    def starts_at(self) -> int:
        return self.lengths_at + 4 * self.sequences

    @property
    def ends_at(self) -> int:
        return self.starts_at + 8 * self.sequences


def count_documents(file: CorpusFile) -> int:
    """Returns the number of documents; raises ValueError or OSError if the index is damaged."""
    return _read_header(file.path.with_suffix(".idx")).documents


def read_megatron(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields documents `first` to `last - 1` as token ids."""
    row = end = first
    try:
        index = _read_header(file.path.with_suffix(".idx"))
        end = min(last, index.documents)
        with file.path.open("rb") as tokens:
            for row, content in enumerate(_documents(index, tokens, first, end), first + 1):
                if isinstance(content, int):
                    yield BrokenRow(place=f"{file.path}:{row}", reason=f"has {content:,} bytes, above the limit")
                    continue
                ids = np.frombuffer(content, dtype=index.dtype)
                yield Document(key=f"{file.key}:{row}", text="", tokens=ids)
    except (OSError, ValueError) as error:
        yield lost_rows(file.path, row, end, f"cannot be read: {error}")


def _documents(index: _Index, tokens: BinaryIO, first: int, last: int) -> Iterator[bytes | int]:
    """Yields the bytes of documents, which are one or more sequences; the number of too many bytes."""
    size = os.fstat(tokens.fileno()).st_size
    total = 0
    for begin in range(first, last, _ROWS):
        ends = np.fromfile(index.path, "<i8", min(_ROWS, last - begin) + 1, offset=index.ends_at + 8 * begin)
        if (np.diff(ends) < 0).any() or ends[0] < 0 or ends[-1] > index.sequences:
            raise ValueError("the documents of the index are not in order")
        count = int(ends[-1] - ends[0])
        if count > _MOST_SEQUENCES:
            raise ValueError(f"{len(ends) - 1:,} documents have {count:,} sequences, above the limit")
        lengths = np.fromfile(index.path, "<i4", count, offset=index.lengths_at + 4 * int(ends[0]))
        starts = np.fromfile(index.path, "<i8", count, offset=index.starts_at + 8 * int(ends[0]))
        bytes_of = lengths.astype(np.int64) * index.dtype.itemsize
        if count and (lengths.min() < 0 or starts.min() < 0 or (starts > size - bytes_of).any()):
            raise ValueError(f"the index names tokens that {size:,} bytes of .bin do not have")
        for a, b in zip(ends[:-1] - ends[0], ends[1:] - ends[0], strict=True):
            num_bytes = int(bytes_of[a:b].sum())
            total += num_bytes
            if total > size:
                raise ValueError(f"the index names tokens of {size:,} bytes of .bin more than once")
            if num_bytes > MAX_DOCUMENT_BYTES:
                yield num_bytes
                continue
            yield b"".join(
                os.pread(tokens.fileno(), int(bytes_of[sequence]), int(starts[sequence])) for sequence in range(a, b)
            )


def _read_header(path: Path) -> _Index:
    with path.open("rb") as index:
        start = index.read(len(_MAGIC) + _HEADER.size)
    if not start.startswith(_MAGIC) or len(start) < len(_MAGIC) + _HEADER.size:
        raise ValueError("the .idx file is no index of Megatron-Core")
    version, kind, sequences, ends = _HEADER.unpack(start[len(_MAGIC) :])
    if version != 1 or kind not in _TYPES or not ends:
        raise ValueError(f"the index has version {version} and type {kind}; nearest: version 1 with integers")
    header = _Index(path=path, dtype=np.dtype(_TYPES[kind]), sequences=sequences, documents=ends - 1)
    if path.stat().st_size < header.ends_at + 8 * ends:
        raise ValueError(f"the .idx file is truncated: it must have {header.ends_at + 8 * ends:,} bytes")
    return header


def write_megatron(path: Path, documents: Iterable[NDArray[np.integer]], vocab_size: int) -> int:
    """Writes `path`.bin and `path`.idx with a sequence for each document; returns the number of tokens.

    The type is the one that Megatron-Core chooses for a vocabulary of this size. Several processes may write the same.
    """
    kind = 8 if vocab_size < 65500 else 4
    lengths: list[int] = []
    index = path.with_name(f"{path.name}.idx")
    with replacing(index) as partial_index, replacing(path.with_name(f"{path.name}.bin")) as partial:
        with partial.open("wb") as stream:
            for tokens in documents:
                stream.write(np.ascontiguousarray(tokens, dtype=_TYPES[kind]).data)
                lengths.append(len(tokens))
        sizes = np.asarray(lengths, dtype="<i4")
        starts = np.cumsum(sizes, dtype="<i8") - sizes
        with partial_index.open("wb") as stream:
            stream.write(_MAGIC + _HEADER.pack(1, kind, len(sizes), len(sizes) + 1))
            stream.write(sizes.data)
            stream.write((starts * np.dtype(_TYPES[kind]).itemsize).astype("<i8").data)
            stream.write(np.arange(len(sizes) + 1, dtype="<i8").data)
    return int(sizes.sum(dtype=np.int64))
