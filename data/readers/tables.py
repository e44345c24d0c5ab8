"""Reads a column of text from parquet files by row group, and from Arrow files by record batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.readers.lines import MAX_DOCUMENT_BYTES, MAX_RATIO, MIN_RATIO_BYTES, TextField, decode_text
from data.registry import BrokenRow, CorpusFile, Document

if TYPE_CHECKING:
    import pyarrow as pa

# Few rows are decoded together, because a dictionary can hold a long text that many rows repeat.
_BATCH_ROWS = 16
_BUFFER_BYTES = 2**20
_CONTINUED = b"\xff" * 4  # begins every message of a stream
# What pyarrow raises for damaged files, besides its own errors.
DAMAGES = (OSError, ValueError, TypeError, KeyError, NotImplementedError, MemoryError, OverflowError)


def group_row_groups(file: CorpusFile, piece_bytes: int) -> Iterator[tuple[int, int, int]]:
    """Yields the first, the last row group (excluded) and the uncompressed bytes of each piece."""
    with _open_parquet(file.path) as parquet:
        sizes = [parquet.metadata.row_group(index).total_byte_size for index in range(parquet.num_row_groups)]
    first = 0
    total = 0
    for index, size in enumerate(sizes):
        if total and total + size > piece_bytes:
            yield first, index, total
            first = index
            total = 0
        total += size
    yield first, max(1, len(sizes)), total


def read_parquet(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields the rows of a range of row groups. A damaged row group is one broken row."""
    row = 0
    try:
        with _open_parquet(file.path) as parquet:
            groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
            _check_column(parquet.schema_arrow, text_field)
            for index, group in enumerate(groups[:last]):
                if index >= first:
                    yield from _read_row_group(file, parquet, index, row, text_field)
                row += group.num_rows
    except DAMAGES as error:
        yield BrokenRow(place=f"{file.path}:{row + 1}", reason=_line(error))


def _read_row_group(
    file: CorpusFile, parquet: Any, index: int, row: int, text_field: TextField
) -> Iterator[Document | BrokenRow]:
    group = parquet.metadata.row_group(index)
    end = row + group.num_rows
    try:
        columns = [group.column(number) for number in range(group.num_columns)]
        column = next(column for column in columns if column.path_in_schema == text_field.name)
        size = column.total_uncompressed_size
        if size > max(MIN_RATIO_BYTES, MAX_RATIO * column.total_compressed_size, MAX_DOCUMENT_BYTES * group.num_rows):
            raise ValueError(f"row group {index} has {size:,} bytes, more than its rows or its compression allow")
        for batch in parquet.iter_batches(_BATCH_ROWS, [index], [text_field.name], use_threads=False):
            yield from _column_rows(file, batch.column(0), row)
            row += batch.num_rows
    except DAMAGES as error:
        lost = end - row - 1
        more = f" (and the {lost:,} rows after it)" if lost else ""
        yield BrokenRow(place=f"{file.path}:{row + 1}", reason=f"{_line(error)}{more}")


def read_arrow(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields the rows of an Arrow file, in the file format or the stream format that `datasets` writes."""
    import pyarrow as pa

    row = 0
    try:
        with pa.OSFile(str(file.path)) as source:
            for batch in _batches(source, text_field):
                column = batch.column(batch.schema.get_field_index(text_field.name))
                column.validate(full=not pa.types.is_string(column.type))
                for start in range(0, len(column), _BATCH_ROWS):
                    yield from _column_rows(file, column.slice(start, _BATCH_ROWS), row + start)
                row += len(column)
    except DAMAGES as error:
        yield BrokenRow(place=f"{file.path}:{row + 1}", reason=_line(error))


def _batches(source: Any, text_field: TextField) -> Iterator[pa.RecordBatch]:
    import pyarrow as pa

    start = source.read(6)
    is_file = start == b"ARROW1"
    source.seek(0)
    reader = pa.ipc.open_file(source) if is_file else pa.ipc.open_stream(source)
    _check_column(reader.schema, text_field)
    if is_file:
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        return
    yield from reader
    # pyarrow takes a file that ends between two batches for a whole one. Zeros alone end files of 2019, and any batch.
    end = _CONTINUED + bytes(4) if start.startswith(_CONTINUED) else bytes(4)
    source.seek(source.size() - len(end))
    if source.read(len(end)) != end:
        raise ValueError("the file is truncated: it lacks the end of its stream")


def _column_rows(file: CorpusFile, column: pa.Array, row: int) -> Iterator[Document | BrokenRow]:
    import pyarrow as pa

    # Bytes, because pyarrow does not check that strings are UTF-8.
    for number, value in enumerate(column.cast(pa.large_binary()).to_pylist(), start=row + 1):
        if value is None or len(value) > MAX_DOCUMENT_BYTES:
            reason = "must be text, is null" if value is None else f"has {len(value):,} bytes, above the limit"
            yield BrokenRow(place=f"{file.path}:{number}", reason=reason)
            continue
        text, replaced = decode_text(value)
        yield Document(key=f"{file.key}:{number}", text=text, replaced_bytes=replaced)


def _check_column(schema: pa.Schema, text_field: TextField) -> None:
    """Raises ValueError if the schema has no column of text with the name, or two."""
    names = [field.name for field in schema if _is_text(field.type)]
    indices = schema.get_all_field_indices(text_field.name)
    if len(indices) != 1 or text_field.name not in names:
        kind = "none" if not indices else "two" if len(indices) > 1 else f"one of type {schema.field(indices[0]).type}"
        raise ValueError(f"must have a column of strings {text_field}, has {kind}{text_field.nearest(names)}")


def _is_text(kind: pa.DataType) -> bool:
    import pyarrow as pa

    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_binary)
    return any(test(kind) for test in tests)


def _open_parquet(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    # Without a buffer, the whole column of a row group would be read at once.
    return ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)


def _line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"cannot be read: {text}"
