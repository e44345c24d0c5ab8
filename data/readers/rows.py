"""Reads corpus files in pieces, row by row, and counts what is skipped or replaced. Imports no torch."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from itertools import chain, pairwise
from typing import Literal

from data.corpus import DataError
from data.readers.files import compression_of, format_of
from data.readers.lines import PART_BYTES, TextField, is_sparse, lost_rows, read_lines
from data.readers.megatron import count_documents, read_megatron
from data.readers.tables import group_row_groups, read_arrow, read_parquet
from data.registry import BrokenRow, CorpusFile, Document, EmptyFile

OnBroken = Literal["skip", "stop"]
NAMED_ROWS = 50
_KEPT_PLACES = 1000
_ALL = 2**62


@dataclass(frozen=True, kw_only=True, slots=True)
class FilePiece:
    """A range of a file that one process reads: bytes, row groups of parquet or documents of Megatron."""

    file: CorpusFile
    first: int
    last: int  # excluded
    size_bytes: int


@dataclass(kw_only=True, slots=True)
class ReadCounts:
    """Counts of what was read; those of several processes can be added."""

    rows: int = 0
    documents: int = 0
    blank: int = 0
    broken: int = 0
    replaced_bytes: int = 0
    replaced_documents: int = 0
    broken_places: list[str] = field(default_factory=list)  # the first 1,000, as "file:row: reason"
    empty_files: list[str] = field(default_factory=list)

    def add(self, other: "ReadCounts") -> None:
        """Adds the counts of other pieces."""
        for count in fields(self):
            setattr(self, count.name, getattr(self, count.name) + getattr(other, count.name))
        del self.broken_places[_KEPT_PLACES:]

    def is_valid(self) -> bool:
        """Returns whether values that were stored have the types of these fields."""
        return all(
            type(getattr(self, count.name)) is (list if "list" in str(count.type) else int) for count in fields(self)
        )

    def check(self, max_broken_share: float, key: str = "data.max_broken_share") -> None:
        """Raises DataError if the share of broken rows is above the limit."""
        if self.broken > max_broken_share * self.rows:
            share = self.broken / self.rows
            unit = 10.0 ** (math.floor(math.log10(share)) - 1)
            raise DataError(
                f"{key}: must be at least the share of broken rows, is {max_broken_share:g}; {self.broken:,} of "
                f"{self.rows:,} rows are broken, the first is {self.broken_places[0]}; nearest: "
                f"{min(1.0, math.ceil(share / unit) * unit):.2g}"
            )

    def lines(self, key: str = "data.on_broken") -> Iterator[str]:
        """Yields a line about empty files, about replaced bytes and about broken rows, if there are any."""
        if self.empty_files:
            yield f"files without a row: {len(self.empty_files):,}, the first is {self.empty_files[0]}"
        if self.replaced_bytes:
            yield (
                f"{self.replaced_bytes:,} bytes that are not UTF-8 were replaced by U+FFFD in "
                f"{self.replaced_documents:,} of {self.documents:,} documents"
            )
        if self.broken:
            first, *others = self.broken_places
            places = [row.partition(": ")[0] for row in others[: NAMED_ROWS - 1]]
            more = self.broken - len(places) - 1
            yield (
                f"{self.broken:,} of {self.rows:,} rows are broken and were skipped ({key}=skip): "
                f"{'; '.join([first, ', '.join(places)] if places else [first])}{f' and {more:,} more' if more else ''}"
            )


def pieces(file: CorpusFile, piece_bytes: int, *, allows_holes: bool = False) -> list[FilePiece]:
    """Cuts a file into pieces of about `piece_bytes`, in order. A file that cannot be read is one piece.

    A sparse file can be read only with `allows_holes`, for the first of its bytes.
    """
    kind = format_of(file.path)
    try:
        size = file.path.stat().st_size
        if not allows_holes and is_sparse(file.path):
            return [FilePiece(file=file, first=0, last=_ALL, size_bytes=0)]
        if kind == "parquet":
            groups = group_row_groups(file, piece_bytes)
            return [FilePiece(file=file, first=first, last=last, size_bytes=size) for first, last, size in groups]
        grain = PART_BYTES if kind == "text" else 1
        units = count_documents(file) if kind == "megatron" else -(-size // grain)
    except (OSError, ValueError):
        return [FilePiece(file=file, first=0, last=_ALL, size_bytes=0)]
    is_whole = kind == "arrow" or compression_of(file.path) is not None
    count = 1 if is_whole else max(1, min(units, -(-size // piece_bytes)))
    ends = [units * number // count * grain for number in range(count + 1)]
    return [FilePiece(file=file, first=first, last=last, size_bytes=size // count) for first, last in pairwise(ends)]


def read_rows(piece: FilePiece, field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields every row of a piece, or that its file has none."""
    kind = format_of(piece.file.path)
    if piece.last >= _ALL and is_sparse(piece.file.path):
        yield lost_rows(piece.file.path, 0, 0, "the file is sparse: most of it was never written")
        return
    read = {"parquet": read_parquet, "arrow": read_arrow, "megatron": read_megatron}.get(kind or "", read_lines)
    rows = read(piece.file, piece.first, piece.last, field)
    row = next(rows, None)
    if row is not None:
        yield from chain([row], rows)
    elif piece.first == 0 and kind != "text":
        yield EmptyFile(place=str(piece.file.path), reason="has no rows")


def keep_documents(
    rows: Iterable[Document | BrokenRow], counts: ReadCounts, on_broken: OnBroken = "stop"
) -> Iterator[Document]:
    """Yields the documents that are not blank, and counts all rows; a broken one is skipped or DataError.

    Memory is bounded by a document.
    """
    for row in rows:
        if isinstance(row, EmptyFile):
            counts.empty_files.append(row.place)
            continue
        counts.rows += row.rows if isinstance(row, BrokenRow) else 1
        if isinstance(row, BrokenRow):
            if on_broken == "stop":
                raise DataError(f"{row.place}: {row.reason}")
            counts.broken += row.rows
            if len(counts.broken_places) < _KEPT_PLACES:
                counts.broken_places.append(f"{row.place}: {row.reason}".replace("\n", "\\n"))  # a name may have one
        elif row.tokens is None and not row.text.strip():
            counts.blank += 1
        else:
            counts.documents += 1
            counts.replaced_bytes += row.replaced_bytes
            counts.replaced_documents += row.replaced_bytes > 0
            yield row
