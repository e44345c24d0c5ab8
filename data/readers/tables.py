"""Reads a column of text from parquet files by row group, and from Arrow files by record batch.

pyarrow can crash on a damaged file, and a small file can fill the memory. So it runs in a separate process with limits
of memory and time. It serves all files of this process, and starts again after a crash.
"""

from __future__ import annotations

import atexit
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data.readers.lines import MAX_DOCUMENT_BYTES, MAX_RATIO, MIN_RATIO_BYTES, TextField, decode_text, lost_rows
from data.registry import BrokenRow, CorpusFile, Document

if TYPE_CHECKING:
    import pyarrow as pa

MAX_READER_BYTES = 3 * 2**29
"""Memory that the process may have in addition to its libraries: two pages of a table, and its longest strings."""

# Few rows are decoded together, because a dictionary can hold a long text that many rows repeat.
_BATCH_ROWS = 16
_BUFFER_BYTES = 2**20
_CPU_SECONDS = 60  # of a request, and one more for each MiB of the file
_CONTINUED = b"\xff" * 4  # begins every message of a stream
_ROOT = Path(__file__).resolve().parents[2]
_Answer = tuple[Any, ...]
_idle: list[subprocess.Popen[bytes]] = []


def group_row_groups(file: CorpusFile, piece_bytes: int) -> list[tuple[int, int, int]]:
    """Returns the first, the last row group (excluded) and the uncompressed bytes of each piece.

    Raises ValueError if the file is damaged.
    """
    groups = []
    for answer in _ask("groups", file.path, piece_bytes):
        if isinstance(answer, BrokenRow):
            raise ValueError(answer.reason)
        groups.append(answer)
    return groups


def read_parquet(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields the rows of a range of row groups. A damaged one is a broken row with the number of its rows."""
    return _ask("parquet", file.path, file.key, first, last, text_field.name, text_field.key)


def read_arrow(file: CorpusFile, first: int, last: int, text_field: TextField) -> Iterator[Document | BrokenRow]:
    """Yields the rows of an Arrow file, in the file format or the stream format that `datasets` writes."""
    return _ask("arrow", file.path, file.key, first, last, text_field.name, text_field.key)


def _ask(kind: str, path: Path, *arguments: object) -> Iterator[Any]:
    """Yields what the reader process answers; if it dies, the last answer is a broken row."""
    process = _idle.pop() if _idle and _idle[-1].poll() is None else _start_reader()
    assert process.stdin is not None
    assert process.stdout is not None
    row = end = 0
    is_complete = False
    try:
        process.stdin.write(f"{json.dumps([kind, str(path), *arguments])}\n".encode())
        process.stdin.flush()
        for line in process.stdout:
            match json.loads(line):
                case ["end"]:
                    is_complete = True
                    return
                case ["range", row, end, left_bytes]:
                    pass
                case ["group", *group]:
                    yield tuple(group)
                case ["broken", place, reason, rows]:
                    row += rows
                    yield BrokenRow(place=place, reason=reason, rows=rows)
                case ["document", key, replaced_bytes, size]:
                    text = process.stdout.read(size).decode()
                    left_bytes -= size
                    if left_bytes < 0:
                        yield lost_rows(path, row, end, f"its text has more than {MAX_RATIO} times its size")
                        return
                    row += 1
                    yield Document(key=key, text=text, replaced_bytes=replaced_bytes)
        is_slow = process.wait() == -signal.SIGPROF
        reason = "takes too long to read" if is_slow else f"cannot be read: its reader ended with {process.returncode}"
        yield lost_rows(path, row, end, reason)
    finally:
        if is_complete:
            _idle.append(process)
        else:
            with process:
                process.kill()


def _start_reader() -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "data.readers.tables"]
    environment = {**os.environ, "PYTHONPATH": path}
    pipe = subprocess.PIPE
    # Ctrl-C must reach this process alone. What a crash prints is no message for users.
    return subprocess.Popen(
        command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, process_group=0, env=environment
    )


@atexit.register
def _end_readers() -> None:
    for process in _idle:
        with process:  # it ends when its input does
            pass


os.register_at_fork(after_in_child=_idle.clear)


def main() -> None:
    """Answers requests of the process that has started this one, one in each line of its input."""
    import pyarrow.parquet  # noqa: F401

    pages = int(Path("/proc/self/statm").read_text("ascii").split()[5]) if sys.platform == "linux" else 0
    limit = pages * resource.getpagesize() + MAX_READER_BYTES
    with suppress(ValueError):  # the limit of this process is lower
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    readers: Mapping[str, Callable[..., Iterator[_Answer]]] = {
        "groups": _group_row_groups,
        "parquet": _read_parquet,
        "arrow": _read_arrow,
    }
    output = sys.stdout.buffer
    for line in sys.stdin.buffer:
        kind, path, *arguments = json.loads(line)
        try:
            signal.setitimer(signal.ITIMER_PROF, _CPU_SECONDS + os.stat(path).st_size / 2**20)
            for answer in readers[kind](Path(path), *arguments):
                content = answer[-1]
                if not isinstance(content, bytes):
                    output.write(f"{json.dumps(answer)}\n".encode())
                    output.flush()  # a crash loses what is not sent
                    continue
                output.write(f"{json.dumps((*answer[:-1], len(content)))}\n".encode())
                output.write(content)
        except Exception as error:  # pyarrow raises errors of many types for damaged files
            output.write(f"{json.dumps(_broken(lost_rows(Path(path), 0, 0, _line(error))))}\n".encode())
        output.write(b'["end"]\n')
        output.flush()


def _broken(row: BrokenRow) -> _Answer:
    return ("broken", row.place, row.reason, row.rows)


def _group_row_groups(path: Path, piece_bytes: int) -> Iterator[_Answer]:
    with _open_parquet(path) as parquet:
        sizes = [parquet.metadata.row_group(index).total_byte_size for index in range(parquet.num_row_groups)]
    first = 0
    total = 0
    for index, size in enumerate(sizes):
        if total and total + size > piece_bytes:
            yield "group", first, index, total
            first = index
            total = 0
        total += max(0, size)
    yield "group", first, max(1, len(sizes)), total


def _read_parquet(path: Path, key: str, first: int, last: int, name: str, field_key: str) -> Iterator[_Answer]:
    with _open_parquet(path) as parquet:
        _check_column(parquet.schema_arrow, TextField(name, field_key))
        groups = [parquet.metadata.row_group(index) for index in range(parquet.num_row_groups)]
        number = next((n for n in range(parquet.metadata.num_columns) if parquet.schema.column(n).path == name), 0)
        sizes = [group.column(number).total_compressed_size for group in groups]
        if min((*sizes, *(group.num_rows for group in groups)), default=0) < 0 or sum(sizes) > path.stat().st_size:
            raise ValueError("the row groups have more bytes than the file")
        row = sum(group.num_rows for group in groups[:first])
        share = MIN_RATIO_BYTES * (last - first) // max(1, len(groups))
        end = row + sum(group.num_rows for group in groups[first:last])
        yield "range", row, end, max(share, MAX_RATIO * sum(sizes[first:last]))
        for index, group in enumerate(groups[first:last], first):
            end = row + group.num_rows
            try:
                size = group.column(number).total_uncompressed_size
                if size > max(MIN_RATIO_BYTES, MAX_RATIO * sizes[index]):
                    raise ValueError(f"row group {index} has {size:,} bytes, more than {MAX_RATIO} times its size")
                for batch in parquet.iter_batches(_BATCH_ROWS, [index], [name], use_threads=False):
                    yield from _column_rows(path, key, batch.column(0), row)
                    row += batch.num_rows
                if row < end:
                    raise ValueError(f"row group {index} has fewer rows than it says")
            except Exception as error:
                yield _broken(lost_rows(path, row, end, _line(error)))
            row = end


def _read_arrow(path: Path, key: str, first: int, last: int, name: str, field_key: str) -> Iterator[_Answer]:
    import pyarrow as pa

    row = 0
    yield "range", 0, 0, max(MIN_RATIO_BYTES, MAX_RATIO * path.stat().st_size)
    try:
        with pa.OSFile(str(path)) as source:
            for batch in _batches(source, TextField(name, field_key)):
                column = _checked(batch.column(0))
                for start in range(0, len(column), _BATCH_ROWS):
                    yield from _column_rows(path, key, column.slice(start, _BATCH_ROWS), row + start)
                row += len(column)
    except Exception as error:
        yield _broken(lost_rows(path, row, 0, _line(error)))


def _batches(source: Any, text_field: TextField) -> Iterator[pa.RecordBatch]:
    """Yields the batches with the column of text alone: other columns are not read into memory."""
    import pyarrow as pa

    start = source.read(6)
    is_file = start == b"ARROW1"
    open_reader = pa.ipc.open_file if is_file else pa.ipc.open_stream
    source.seek(0)
    column = _check_column(open_reader(source).schema, text_field)
    source.seek(0)
    reader = open_reader(source, options=pa.ipc.IpcReadOptions(included_fields=[column], use_threads=False))
    if is_file:
        yield from (reader.get_batch(index) for index in range(reader.num_record_batches))
        return
    yield from reader
    # pyarrow takes a file that ends between two batches for a whole one. Zeros alone end files of 2019, and any batch.
    end = _CONTINUED + bytes(4) if start.startswith(_CONTINUED) else bytes(4)
    source.seek(source.size() - len(end))
    if source.read(len(end)) != end:
        raise ValueError("the file is truncated: it lacks the end of its stream")


def _checked(column: pa.Array) -> pa.Array:
    """Returns a column as bytes, because text that is not UTF-8 is replaced later.

    pyarrow does not check what it maps from a file: an offset outside a buffer would read the memory of the process.
    """
    import pyarrow as pa

    column.validate()
    if pa.types.is_dictionary(column.type):
        return pa.DictionaryArray.from_arrays(column.indices, _checked(column.dictionary))  # checks the indices
    kinds = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
    content = column.view(kinds.get(column.type, column.type))
    content.validate(full=True)
    return content


def _column_rows(path: Path, key: str, column: pa.Array, row: int) -> Iterator[_Answer]:
    for number, value in enumerate(column, start=row + 1):
        content = (value.value if hasattr(value, "dictionary") else value).as_buffer() if value.is_valid else None
        if content is None or content.size > MAX_DOCUMENT_BYTES:
            reason = "must be text, is null" if content is None else f"has {content.size:,} bytes, above the limit"
            yield _broken(BrokenRow(place=f"{path}:{number}", reason=reason))
            continue
        text, replaced = decode_text(content.to_pybytes())
        yield "document", f"{key}:{number}", replaced, text.encode()


def _check_column(schema: pa.Schema, text_field: TextField) -> int:
    """Returns the column of text with the name. Raises ValueError if there is none, or two."""
    names = [field.name for field in schema if _is_text(field.type)]
    indices: list[int] = schema.get_all_field_indices(text_field.name)
    if len(indices) != 1 or text_field.name not in names:
        kind = "none" if not indices else "two" if len(indices) > 1 else f"one of type {schema.field(indices[0]).type}"
        raise ValueError(f"must have a column of strings {text_field}, has {kind}{text_field.nearest(names)}")
    return indices[0]


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
    if isinstance(error, MemoryError):
        return f"takes more than {MAX_READER_BYTES:,} bytes to read; nearest: row groups or batches of 256 MiB"
    text = " ".join(str(error).split())
    return text if type(error) is ValueError else f"cannot be read: {text}"


if __name__ == "__main__":
    main()
