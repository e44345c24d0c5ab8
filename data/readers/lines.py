"""Reads text and JSON lines, compressed or not, and counts bytes that are not UTF-8."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.corpus import decode_json, nearest_name, shorten
from data.readers.files import compression_of, format_of
from data.registry import BrokenRow, CorpusFile, Document

MAX_DOCUMENT_BYTES = 16 * 2**20
"""Longest line and longest text of a table's row. A longer one is broken; it is never held in memory."""

PART_BYTES = 8 * 2**20
"""A longer text file is several documents: lines that begin within the same 8 MiB are one."""

BLOCK_BYTES = 256 * 2**20
"""Lines are numbered within blocks of a file, so that a piece finds its numbers without reading the whole file."""

_TOO_LONG = f"a line must have at most {MAX_DOCUMENT_BYTES:,} bytes, has more; nearest: shorter documents"
_SKIP_BYTES = 2**20
_CUT_BYTES = 2**16
_BUFFER_BYTES = 2**16
_START_BYTES = 8000
# Text shrinks to a tenth, and pages that repeat each other to a fiftieth. What shrinks to less exhausts a reader.
MAX_RATIO = 100
MIN_RATIO_BYTES = 256 * 2**20
_NOT_DECODED = re.compile("[\udc80-\udcff]")


@dataclass(frozen=True, slots=True)
class TextField:
    """The field of a row that contains the text, and the key that names it."""

    name: str
    key: str = "data.text_field"

    def __str__(self) -> str:
        return f'"{self.name}" ({self.key})'

    def nearest(self, names: Sequence[str]) -> str:
        """Returns the end of an error: the field with the nearest name, or the first one."""
        return f"; nearest: {self.key}={nearest_name(self.name, names)!r}" if names else ""


def decode_text(content: bytes) -> tuple[str, int]:
    """Decodes UTF-8. Returns the text and the number of bytes that are no UTF-8, replaced by U+FFFD."""
    try:
        return content.decode("utf-8-sig"), 0
    except UnicodeDecodeError:
        escaped = content.decode("utf-8-sig", errors="surrogateescape")
        return content.decode("utf-8-sig", errors="replace"), len(_NOT_DECODED.findall(escaped))


def lost_rows(path: Path, row: int, end: int, reason: str) -> BrokenRow:
    """Returns the broken row after `row`, which stands for all until `end`, or for itself."""
    lost = max(1, end - row)
    more = f" (and the {lost - 1:,} rows after it)" if lost > 1 else ""
    return BrokenRow(place=f"{path}:{row + 1}", reason=f"{reason}{more}", rows=lost)


def is_sparse(path: Path) -> bool:
    """Returns whether a file is far larger than what it has on the disk."""
    try:
        status = path.stat()
        if status.st_size <= max(MIN_RATIO_BYTES, MAX_RATIO * 512 * status.st_blocks):
            return False
        with path.open("rb") as content:  # file systems that do not count blocks have no holes
            return os.lseek(content.fileno(), 0, os.SEEK_HOLE) < status.st_size
    except OSError:
        return False  # its reader says why


def read_lines(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields the rows of a text file or of JSON lines that begin in a range of bytes; compressed: all."""
    reader = _LineReader(file, first, None if compression_of(file.path) else last)
    try:
        with _open(file.path) as reader.stream:
            start = reader.stream.peek(_START_BYTES)[:_START_BYTES]
            if (b"\0" in start and start.strip(b"\0")) or start[:2] in (b"\xff\xfe", b"\xfe\xff"):
                if first == 0:
                    yield BrokenRow(
                        place=f"{file.path}:1", reason="must be UTF-8, is UTF-16 or binary; nearest: iconv -t UTF-8"
                    )
                return
            is_json = format_of(file.path) == "jsonl"
            reader.seek(is_json=is_json)
            yield from reader.json_rows(text_field) if is_json else reader.text_rows()
    except OSError as error:
        yield BrokenRow(place=reader.place(), reason=f"cannot be read: {error.strerror or error}")


class _LineReader:
    """Lines of a file from the first that begins at `first` or later, until one begins at `last`."""

    stream: io.BufferedReader[Any]

    def __init__(self, file: CorpusFile, first: int, last: int | None) -> None:
        self._file = file
        self._first = first
        self._last = last
        self._offset = 0  # where the next line begins
        self._block = first // BLOCK_BYTES * BLOCK_BYTES
        self._number = 0  # number of lines of the block that have begun
        self._earlier: int | None = 0 if self._block == 0 else None  # lines before the block, if they were counted

    def seek(self, *, is_json: bool) -> None:
        """Goes to the first line, and counts the lines of its block before it."""
        if not self._first:
            return
        self._offset = self._first - 1
        self.stream.seek(self._offset)
        if is_json:
            self._number = self._count_newlines(max(0, self._block - 1), self._offset) + (self._block == 0)
            self._skip_line()
        else:
            self._offset += _line_end(self.stream.read(1 + _CUT_BYTES), 1)
            self.stream.seek(self._offset)

    def place(self) -> str:
        """Returns the file and the number of the current line; that of a text file is 1."""
        if self._earlier is None:
            self._earlier = 1 + self._count_newlines(0, self._block - 1)
        return f"{self._file.path}:{self._earlier + max(1, self._number)}"

    def json_rows(self, text_field: TextField) -> Iterator[Document | BrokenRow]:
        """Yields a row for each line that is not blank."""
        while (line := self._next_line()) is not None:
            if len(line) > MAX_DOCUMENT_BYTES:
                yield BrokenRow(place=self.place(), reason=_TOO_LONG)
            elif line.strip():
                text, replaced = decode_text(line)
                try:
                    value = _field_text(text, text_field)
                except ValueError as error:
                    yield BrokenRow(place=self.place(), reason=str(error))
                    continue
                block = f"@{self._block}" if self._block else ""
                yield Document(key=f"{self._file.key}{block}:{self._number}", text=value, replaced_bytes=replaced)

    def text_rows(self) -> Iterator[Document]:
        """Yields the lines that begin within the same 8 MiB as one document."""
        rest = b""
        while self._last is None or self._offset < self._last:
            part = self._offset // PART_BYTES
            end = (part + 1) * PART_BYTES - self._offset
            content = rest + self.stream.read(end + _CUT_BYTES - len(rest))
            if not content:
                return
            cut = _line_end(content, end)
            rest = content[cut:]
            self._offset += cut
            text, replaced = decode_text(content[:cut])
            name = f"{self._file.key}@{part * PART_BYTES}" if part else self._file.key
            yield Document(key=name, text=text, replaced_bytes=replaced)

    def _next_line(self) -> bytes | None:
        """Returns the next line, or the first bytes of one that is too long and is skipped."""
        if self._last is not None and self._offset >= self._last:
            return None
        if self._offset >= self._block + BLOCK_BYTES:
            self._block = self._offset // BLOCK_BYTES * BLOCK_BYTES
            self._earlier = None if self._earlier is None else self._earlier + self._number
            self._number = 0
        self._number += 1
        line = self.stream.readline(MAX_DOCUMENT_BYTES + 1)
        self._offset += len(line)
        if len(line) > MAX_DOCUMENT_BYTES and not line.endswith(b"\n"):
            self._skip_line()
        return line or None

    def _skip_line(self) -> None:
        while (self._last is None or self._offset < self._last) and (chunk := self.stream.readline(_SKIP_BYTES)):
            self._offset += len(chunk)
            if chunk.endswith(b"\n"):
                return

    def _count_newlines(self, first: int, last: int) -> int:
        count = 0
        with _open(self._file.path) as stream:
            stream.seek(first)
            while first < last and (chunk := stream.read(min(_SKIP_BYTES, last - first))):
                count += chunk.count(b"\n")
                first += len(chunk)
        return count


class _Decompressed(io.RawIOBase):
    """Decompressed bytes of a file, fewer than a reader can be exhausted with."""

    def __init__(self, native: Any, file_bytes: int) -> None:
        self._native = native
        self._left = max(MIN_RATIO_BYTES, MAX_RATIO * file_bytes)

    def readable(self) -> bool:
        """Returns True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Reads into the buffer. Raises OSError if the file decompresses to far more than text does."""
        count: int = self._native.readinto(buffer)
        self._left -= count
        if self._left < 0:
            raise OSError(f"it decompresses to more than {MAX_RATIO} times its size")
        return count


@contextmanager
def _open(path: Path) -> Iterator[io.BufferedReader[Any]]:
    compression = compression_of(path)
    if compression is None:
        with io.BufferedReader(path.open("rb", buffering=0), _BUFFER_BYTES) as stream:
            yield stream
        return
    import pyarrow

    # It reports a file that ends within a frame, which other decompressors take for a whole one.
    with pyarrow.input_stream(str(path), compression=compression) as native:
        yield io.BufferedReader(_Decompressed(native, path.stat().st_size), _BUFFER_BYTES)


def _line_end(content: bytes, least: int) -> int:
    """Returns where the line ends that reaches position `least`, or a character if the line is too long."""
    if len(content) <= least:
        return len(content)
    newline = content.find(b"\n", least - 1)
    if newline >= 0:
        return newline + 1
    return next((least + skip for skip, byte in enumerate(content[least : least + 4]) if byte & 0xC0 != 0x80), least)


def _field_text(line: str, field: TextField) -> str:
    rule = f"a line of .jsonl must be an object with a string field {field}"
    try:
        value = decode_json(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{rule}, got {shorten(line.strip())}: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{rule}, got {shorten(line.strip())}")
    if field.name not in value:
        names = [name for name in value if isinstance(value[name], str)]
        names.sort(key=lambda name: -len(value[name]))
        raise ValueError(f"{rule}, got the fields {shorten(str(sorted(value)))}{field.nearest(names)}")
    text = value[field.name]
    if not isinstance(text, str):
        raise ValueError(f"{rule}, got a value of type {type(text).__name__}: {shorten(str(text))}")
    return text
