"""Every reader yields the same documents, however a file is cut; broken rows are named, within bounded memory."""

import gzip
import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from data.corpus import DataError
from data.readers import lines, rows, tables
from data.readers.files import list_sources
from data.readers.lines import TextField
from data.readers.megatron import write_megatron
from data.readers.rows import FilePiece, ReadCounts, keep_documents, pieces, read_rows
from data.registry import BrokenRow, CorpusFile, Document
from tests import ROOT

DOCUMENTS = [f"document {number} " + "wörd€ " * (number % 7 * 9) + "\n" for number in range(120)]


def write_arrow(path: Path, documents: list[str], *, is_stream: bool) -> None:
    table = pa.table({"text": documents})
    make = pa.ipc.new_stream if is_stream else pa.ipc.new_file
    with pa.OSFile(str(path), "wb") as stream, make(stream, table.schema) as writer:
        writer.write_table(table, max_chunksize=50)


def write_stream(path: Path) -> None:
    write_arrow(path, DOCUMENTS, is_stream=True)


def zstd(data: bytes) -> bytes:
    return bytes(pa.compress(data, codec="zstd", asbytes=True))


def json_lines(documents: list[str]) -> bytes:
    return "".join(json.dumps({"n": 1, "text": text}, ensure_ascii=False) + "\n" for text in documents).encode()


FORMATS: dict[str, Callable[[Path], object]] = {
    "a.jsonl": lambda path: path.write_bytes(json_lines(DOCUMENTS)),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(json_lines(DOCUMENTS[:60])) + gzip.compress(json_lines(DOCUMENTS[60:]))
    ),
    "a.json.zst": lambda path: path.write_bytes(zstd(json_lines(DOCUMENTS))),
    "a.parquet": lambda path: pq.write_table(pa.table({"n": [[1]] * 120, "text": DOCUMENTS}), path, row_group_size=37),
    "b.parquet": lambda path: pq.write_table(pa.table({"text": pa.array(DOCUMENTS).dictionary_encode()}), path),
    "a.arrow": write_stream,
    "b.arrow": lambda path: write_arrow(path, DOCUMENTS, is_stream=False),
}


def read_in_pieces(file: CorpusFile, piece_bytes: int) -> list[Document]:
    counts = ReadCounts()
    documents = [
        document
        for piece in pieces(file, piece_bytes)
        for document in keep_documents(read_rows(piece, TextField("text")), counts, "stop")
    ]
    assert (counts.rows, counts.broken) == (len(documents), 0)
    return documents


@pytest.mark.parametrize("name", FORMATS)
def test_documents_and_keys_do_not_depend_on_format_and_pieces(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "BLOCK_BYTES", 4000)
    FORMATS[name](tmp_path / name)
    (file,) = list_sources((str(tmp_path),)).files
    whole = read_in_pieces(file, 2**40)
    assert [document.text for document in whole] == DOCUMENTS
    assert len({document.key for document in whole}) == len(whole)
    assert all(read_in_pieces(file, size) == whole for size in (200, 3000))
    if name in ("a.jsonl", "a.parquet"):
        assert len(pieces(file, 3000)) > 3


def test_parts_of_a_long_text_file_join_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (lines, rows):
        monkeypatch.setattr(module, "PART_BYTES", 1000)
    monkeypatch.setattr(lines, "_CUT_BYTES", 100)
    generator = random.Random(0)
    contents = ["é" * 5000, "x", "\n" * 3001, "y" * 999 + "\n" + "z" * 10, "a" * 1000 + "\n" + "b" * 999]
    contents += ["\n".join("wörd€" * generator.randrange(60) for _ in range(80)) for _ in range(5)]
    for number, content in enumerate(contents):
        plain = CorpusFile(key="a", path=tmp_path / f"{number}.txt")
        packed = CorpusFile(key="a", path=tmp_path / f"{number}.txt.gz")
        plain.path.write_text(content, "utf-8")
        packed.path.write_bytes(gzip.compress(content.encode()))
        cut = [
            [row for piece in pieces(file, size) for row in read_rows(piece, TextField(""))]
            for file in (plain, packed)
            for size in (1, 1500, 9999)
        ]
        assert all(parts == cut[0] for parts in cut)
        assert "".join(part.text for part in cut[0] if isinstance(part, Document)) == content


@pytest.mark.parametrize("vocab_size", [4096, 65_499, 65_500, 129_280])
def test_megatron_files_are_read_as_they_were_written(vocab_size: int, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocab_size, size) for size in (0, 1, 1000, *generator.integers(1, 99, 300))]

    def read_while_another_process_writes() -> Iterator[NDArray[np.integer]]:
        yield from documents[:9]
        write_megatron(tmp_path / "a", documents, vocab_size)
        yield from documents[9:]

    written = write_megatron(tmp_path / "a", read_while_another_process_writes(), vocab_size)
    assert written == sum(map(len, documents))
    listed = list_sources((str(tmp_path),))
    assert (len(listed.files), listed.ignored_line()) == (1, None)
    for name in ("a", "a.bin", "a.idx"):
        assert list_sources((str(tmp_path / name),)).files == listed.files
    for size in (1000, 2**40):
        found = read_in_pieces(listed.files[0], size)
        assert all(np.array_equal(document.tokens, tokens) for document, tokens in zip(found, documents, strict=True))  # type: ignore[arg-type]


def test_sequences_of_a_megatron_document_are_joined(tmp_path: Path) -> None:
    """The index is that of Megatron-Core's builder for a document of two sequences and one of none."""
    (tmp_path / "a.bin").write_bytes(np.arange(5, dtype="<i4").tobytes())
    index = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 2, 3, 0, 8, 0, 2, 2)
    (tmp_path / "a.idx").write_bytes(index)
    rows_read = list(read_rows(pieces(CorpusFile(key="a", path=tmp_path / "a.bin"), 2**40)[0], TextField("")))
    assert [row.tokens.tolist() for row in rows_read] == [[0, 1, 2, 3, 4], []]  # type: ignore[union-attr]


TABLE = pa.table({"text": [f"row {number}" for number in range(1000)], "other": ["a"] * 1000})


def parquet_of(values: object, name: str = "text") -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table({name: values}), path)


def damaged(write: Callable[[Path], object], first: int | None, last: int | None) -> Callable[[Path], object]:
    def act(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[first:last])

    return act


def content(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def swapped(
    old: list[int], new: list[int], column: object = ("abc", "defghij"), **options: str
) -> Callable[[Path], object]:
    """Returns what writes an Arrow file in which numbers of a buffer are replaced."""

    def act(path: Path) -> None:
        table = pa.table({"text": column if isinstance(column, pa.Array) else pa.array(column)})
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
            writer.write_table(table)
        raw = path.read_bytes()
        before, after = (np.array(values, "<i8" if options else "<i4").tobytes() for values in (old, new[: len(old)]))
        assert before in raw
        path.write_bytes(raw.replace(before, after))

    return act


def repeated(rows: int, *, parquet: bool = False) -> Callable[[Path], object]:
    """Returns what writes a small file with a text of 16 MiB in every row."""

    def act(path: Path) -> None:
        table = pa.table({"text": pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), ["a" * 2**24])})
        if parquet:
            pq.write_table(table, path, dictionary_pagesize_limit=2**25, compression="zstd")
            return
        with pa.ipc.new_file(path, table.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:
            writer.write_table(table)

    return act


def more_rows(path: Path) -> None:
    """Writes a table of 100 rows that says to have more."""
    pq.write_table(pa.table({"text": ["a"] * 100}), path)
    raw = path.read_bytes()
    begin = len(raw) - 8 - struct.unpack("<I", raw[-8:-4])[0]
    footer = raw[begin:-8].replace(b"\xc8\x01", b"\xc8\x7f")  # zigzag: 100, and more
    path.write_bytes(raw[:begin] + footer + raw[-8:])


def megatron(lengths: list[int], starts: list[int], ends: list[int]) -> Callable[..., object]:
    def act(path: Path, num_bytes: int = 20) -> None:
        path.write_bytes(bytes(num_bytes))
        header = b"MMIDIDX\0\0" + struct.pack("<QBQQ", 1, 4, len(lengths), len(ends))
        numbers = ((lengths, "<i4"), (starts, "<i8"), (ends, "<i8"))
        path.with_suffix(".idx").write_bytes(header + b"".join(np.array(*some).tobytes() for some in numbers))

    return act


GOOD_LINES = b'{"text": "a"}\n' * 50
# Name, how it is written, the row that is broken, a part of the reason.
BROKEN: list[tuple[str, Callable[[Path], object], int, str]] = [
    ("null.jsonl", content(GOOD_LINES + b'{"text": null}\n'), 51, "type NoneType"),
    ("field.jsonl", content(b'{"txet": "a"}\n'), 1, "nearest: data.text_field='txet'"),
    ("array.jsonl", content(b"\n[1]\n"), 2, "got [1]"),
    ("deep.jsonl", content(b"[" * 200_000), 1, "object with a string field"),
    ("digits.jsonl", content(b'{"text": "a", "n": ' + b"9" * 5000 + b"}"), 1, "object with a string field"),
    ("cut.jsonl", content(GOOD_LINES + b'{"text": "a'), 51, "Unterminated string"),
    ("long.jsonl", content(GOOD_LINES + b'{"text": "' + b"a" * 2**24 + b'"}\n{"text": "b"}'), 51, "at most 16,777,216"),
    ("utf16.jsonl", content('{"text": "a"}'.encode("utf-16-le")), 1, "UTF-16"),
    ("utf16.txt", content("é".encode("utf-16")), 1, "UTF-16"),
    ("cut.jsonl.zst", content(zstd(GOOD_LINES)[:-3]), 1, "Truncated"),
    ("cut.txt.gz", content(gzip.compress(bytes(range(1, 100)) * 9)[:-9]), 1, "Truncated"),
    ("no.txt.gz", content(b"plain text"), 1, "incorrect header"),
    ("tail.jsonl.gz", content(gzip.compress(GOOD_LINES) + b"tail"), 1, "cannot be read"),
    ("bomb.jsonl.zst", content(zstd(b"a" * 2**24)), 1, "100 times its size"),
    ("bomb.txt.gz", content(gzip.compress(b"a" * 2**24)), 1, "100 times its size"),
    ("cut.parquet", damaged(lambda path: pq.write_table(TABLE, path), None, -9), 1, "cannot be read"),
    ("head.parquet", damaged(lambda path: pq.write_table(TABLE, path), 9, None), 1, "cannot be read"),
    ("empty.parquet", content(b""), 1, "cannot be read"),
    ("integers.parquet", parquet_of([1]), 1, 'strings "text" (data.text_field), has one of type int64'),
    ("nested.parquet", parquet_of([{"text": "a"}]), 1, "type struct"),
    ("lists.parquet", parquet_of([["a"]]), 1, "type list"),
    ("name.parquet", parquet_of(["a"], "texts"), 1, "has none; nearest: data.text_field='texts'"),
    ("null.parquet", parquet_of(["a", None, "b"]), 2, "is null"),
    ("long.parquet", parquet_of(["a", "b" * (2**24 + 1)]), 2, "16,777,217 bytes"),
    ("cut.arrow", damaged(write_stream, None, -500), 101, "cannot be read"),
    ("end.arrow", damaged(write_stream, None, -8), 121, "truncated"),
    ("zeros.arrow", damaged(lambda path: write_arrow(path, ["a"] * 9, is_stream=True), None, -8), 10, "truncated"),
    ("noise.arrow", content(bytes(range(256)) * 4), 1, "cannot be read"),
    ("offsets.arrow", swapped([0, 3, 10], [0, 3, 5_000_000]), 1, "larger than values array"),
    ("order.arrow", swapped([0, 3, 10], [0, -90_000, 10]), 1, "non-monotonic offset"),
    ("length.arrow", swapped([0, 3, 10], [0, 3, 2**31 - 1]), 1, "larger than values array"),
    ("index.arrow", swapped([0, 1, 1], [0, 7_000_000, 1], pa.array(["a", "b", "b"]).dictionary_encode()), 1, "Index 7"),
    ("bomb.arrow", swapped([18_000], [2**31 - 1, 0], pa.array(["abc" * 6000]), compression="lz4"), 1, "bytes to read"),
    ("dictionary.arrow", repeated(40), 17, "more than 100 times its size"),
    ("dictionary.parquet", lambda path: repeated(40, parquet=True)(path), 17, "100 times its size (and the 23 rows"),
    ("rows.parquet", more_rows, 101, "fewer rows than it says"),
    ("sparse.txt", lambda path: os.truncate(path, 2**40) if path.write_text("text") else None, 1, "sparse"),
    ("twice.bin", megatron([5] * 3000, [0] * 3000, [0, 3000]), 1, "more than once"),
    ("far.bin", megatron([2, 3], [0, 2**63 - 4], [0, 1, 2]), 1, "bytes of .bin do not have (and the 1 rows after it)"),
    ("long.bin", lambda path: megatron([2**23], [0], [0, 1])(path, 2**25), 1, "33,554,432 bytes, above the limit"),
    ("cut.bin", lambda path: (path.write_bytes(b"1"), path.with_suffix(".idx").write_bytes(b"MMIDIDX")), 1, "no index"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "write", "row", "reason"), BROKEN, ids=[name for name, *_ in BROKEN])
def test_broken_row_is_named_and_the_others_are_read(
    name: str,
    write: Callable[[Path], object],
    row: int,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lines, "MIN_RATIO_BYTES", 2**22)
    write(tmp_path / name)
    (file,) = list_sources((str(tmp_path),)).files
    counts = ReadCounts()
    for piece in pieces(file, 2**40):
        list(keep_documents(read_rows(piece, TextField("text")), counts, "skip"))
    assert len(counts.broken_places) == 1
    assert counts.rows == counts.broken + counts.documents + counts.blank
    assert counts.broken_places[0].startswith(f"{file.path}:{row}: ")
    assert reason in counts.broken_places[0]
    with pytest.raises(DataError, match=rf"{name}:{row}: ") as refused:
        [
            list(keep_documents(read_rows(piece, TextField("text")), ReadCounts(), "stop"))
            for piece in pieces(file, 2**40)
        ]
    assert "\n" not in str(refused.value)


def test_files_without_a_row_are_named_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b"\n"))
    (tmp_path / "b.jsonl").write_bytes(b"")
    parquet_of(pa.array([], pa.string()))(tmp_path / "c.parquet")
    (tmp_path / "d.txt").write_bytes(b"")
    counts = ReadCounts()
    field = TextField("text", "sources.web.text_field")
    for file in list_sources((str(tmp_path),)).files:
        for piece in pieces(file, 2**40):
            assert not list(keep_documents(read_rows(piece, field), counts, "stop"))
    total = ReadCounts()
    total.add(counts)
    assert list(total.lines()) == [f"files without a row: 3, the first is {tmp_path}/a.jsonl.gz"]
    (tmp_path / "b.jsonl").write_bytes(b'{"body": "a"}')
    (piece,) = pieces(CorpusFile(key="b", path=tmp_path / "b.jsonl"), 2**40)
    with pytest.raises(DataError, match=r"nearest: sources\.web\.text_field='body'"):
        list(keep_documents(read_rows(piece, field), counts, "stop"))


def test_damaged_row_group_costs_its_rows_only(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet", row_group_size=100)
    spoilt = bytearray((tmp_path / "a.parquet").read_bytes())
    spoilt[60:90] = b"\xff" * 30
    (tmp_path / "a.parquet").write_bytes(spoilt)
    counts = ReadCounts()
    (piece,) = pieces(CorpusFile(key="a", path=tmp_path / "a.parquet"), 2**40)
    assert len(list(keep_documents(read_rows(piece, TextField("text")), counts, "skip"))) == 900
    assert "(and the 99 rows after it)" in counts.broken_places[0]
    assert (counts.rows, counts.broken) == (1000, 100)


def test_limit_is_a_share_of_all_rows_and_the_line_names_every_row() -> None:
    counts = ReadCounts(rows=1000, documents=960, broken=40, broken_places=[f"a:{row}: why" for row in range(40)])
    counts.check(0.04)
    with pytest.raises(
        DataError, match=r"is 0\.039; 40 of 1,000 rows are broken, the first is a:0: why; nearest: 0\.04$"
    ):
        counts.check(0.039)
    for broken in (1, 3, 40, 999, 4081):
        few = ReadCounts(rows=4081, broken=broken, broken_places=["a:1: why"])
        with pytest.raises(DataError) as refused:
            few.check(0.0)
        few.check(float(str(refused.value).rpartition(" ")[2]))
    total = ReadCounts(replaced_bytes=3, replaced_documents=2)
    total.add(counts)
    replaced, skipped = total.lines()
    assert replaced == "3 bytes that are not UTF-8 were replaced by U+FFFD in 2 of 960 documents"
    assert skipped.startswith("40 of 1,000 rows are broken and were skipped (data.on_broken=skip): a:0: why; a:1, a:2,")
    assert all(f"a:{row}" in skipped for row in range(40))


def test_replaced_bytes_are_counted_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("é à".encode("latin-1"))
    (tmp_path / "a.jsonl").write_bytes('{"text": "é à"}\n'.encode("latin-1"))
    parquet_of(pa.array(["é à".encode("latin-1"), "é".encode()]).cast(pa.binary()))(tmp_path / "a.parquet")
    for file in list_sources((str(tmp_path),)).files:
        counts = ReadCounts()
        texts = [
            document.text for document in keep_documents(read_rows(pieces(file, 2**40)[0], TextField("text")), counts)
        ]
        assert (texts[0], counts.replaced_bytes, counts.replaced_documents) == ("\ufffd \ufffd", 2, 1)


READ_ALL = """
import resource, sys
from data.readers import tables
from data.readers.files import list_sources
from data.readers.lines import TextField
from data.readers.rows import ReadCounts, keep_documents, pieces, read_rows
import pyarrow.parquet, pyarrow.compute
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
counts = ReadCounts()
for file in list_sources((sys.argv[1],)).files:
    for piece in pieces(file, 2**28):
        for document in keep_documents(read_rows(piece, TextField("text")), counts, "skip"):
            pass
print(counts.broken, counts.documents, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, end=" ")
tables._end_readers()
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def test_reader_that_crashes_costs_the_rows_of_its_piece_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pyarrow ends its process at some damaged files; the answer stands for all rows, and the next file is read."""
    dying = "import os; print('[\"range\", 3, 10, 99]', flush=True); os.abort()"
    command = [sys.executable, "-c", dying]
    crashed = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    pq.write_table(TABLE, tmp_path / "a.parquet")
    piece = FilePiece(file=CorpusFile(key="a", path=tmp_path / "a.parquet"), first=0, last=1, size_bytes=0)
    with monkeypatch.context() as patched:
        patched.setattr(tables, "_idle", [])
        patched.setattr(tables, "_start_reader", lambda: crashed)
        (row,) = read_rows(piece, TextField("text"))
    assert isinstance(row, BrokenRow)
    assert (row.place, row.rows) == (f"{tmp_path}/a.parquet:4", 7)
    assert row.reason == "cannot be read: its reader ended with -6 (and the 6 rows after it)"
    assert sum(isinstance(read, Document) for read in read_rows(piece, TextField("text"))) == len(TABLE)


@pytest.mark.slow
def test_memory_does_not_grow_with_lines_row_groups_and_bombs(tmp_path: Path) -> None:
    with (tmp_path / "line.jsonl").open("wb") as stream:
        stream.write(GOOD_LINES)
        for _ in range(300):
            stream.write(bytes(2**20))  # a line of zeros
    repeated = pa.DictionaryArray.from_arrays(pa.array([0] * 60, pa.int32()), ["a" * 2**22])
    parquet_of(repeated)(tmp_path / "dictionary.parquet")
    parquet_of([os.urandom(2**15).hex()] * 500 + ["b"])(tmp_path / "a.parquet")
    with pa.output_stream(str(tmp_path / "bomb.txt.zst"), compression="zstd") as stream:
        for _ in range(2**9):
            stream.write(b"a" * 2**20)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    broken, documents, grown_mib, reader_mib = map(int, printed.split())
    assert broken == 2
    assert documents > 590
    assert grown_mib < 250
    assert reader_mib < 900


def test_table_that_takes_too_much_memory_says_what_to_do() -> None:
    reason = tables._line(pa.ArrowMemoryError("malloc of size 1050004032 failed"))
    assert reason == "takes more than 1,610,612,736 bytes to read; nearest: row groups or batches of 256 MiB"
