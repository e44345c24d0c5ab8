"""Files of prepared text: tokens, an index of documents, and their counts. Imports no torch.

A unit is about 256 MB of text. Its files appear together: `ID.json` is renamed last, and without it the unit is absent.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from base.files import remove_abandoned, replace_file, replacing
from data.corpus import DataError
from data.mix.manifest import SOURCE_NAME
from data.pack import PADDING_POSITION, SequenceTable, pack_windows
from data.readers.lines import is_sparse
from data.registry import Part

# Part of the settings of every prepared folder and of the name of every cache entry. Increase it if the same settings
# produce different files.
FORMAT_VERSION = 7
PARTS: tuple[Part, ...] = ("train", "validation")
# One row for each document of both parts, in the order in which they were read.
INDEX = np.dtype(
    [
        ("length", "<u4"),  # tokens, with those that begin and end the document
        ("bytes", "<u4"),  # UTF-8 bytes of its text
        ("hash", "<u8", (2,)),  # 128-bit hash of the normalized text
        ("piece", "<u4"),  # number of the unit's piece that it is in
        ("block", "<u4"),  # number of its file's block of 8 MiB, from which rows are counted
        ("row", "<u4"),  # row of its file or block; 0 if the file or block is one document
        ("part", "<u4"),  # position in `PARTS`
    ]
)
KEY_BLOCK_BYTES = 2**23
ANY_LENGTH = range(2**32)
_OPEN_SHARDS = 256  # shards that are open at the same time, which bounds the memory
REPORT_NAME = "prepare.json"
SOURCES_NAME = "sources"
FOLDER_KEY = "data.folder"  # of a folder that is read, for errors
_AGAIN = "prepare the folder again with launch.prepare"
UNIT_NAME = re.compile(r"[0-9a-f]{16}")
_JSON_BYTES = 2**28
_MOST = 2**48  # tokens, documents and bytes that a folder may say to have
_TOKEN_DTYPES = ("<u2", "<u4")


@contextmanager
def folder_errors(folder: Path, key: str) -> Iterator[None]:
    """Names the key of a folder in errors about its files and its file system, for example a full disk."""
    try:
        yield
    except OSError as error:
        parents = (parent for parent in folder.absolute().parents if os.access(parent, os.W_OK) and parent.is_dir())
        near = next((f"; nearest: a folder in {str(parent)!r}" for parent in parents), "")
        raise DataError(
            f"{key}: {str(folder)!r} must be a folder that can be written, is not: {error.strerror or error}; complete "
            f"units stay, and the same command continues{near}"
        ) from error
    except DataError as error:
        if not str(error).startswith(f"{FOLDER_KEY}: "):
            raise
        raise DataError(str(error).replace(FOLDER_KEY, key, 1)) from error


class UnitWriter:
    """Writes the files of one unit into its source's folder, all of them or none. A context manager."""

    def __init__(self, folder: Path, unit: str) -> None:
        self._folder = folder
        self._unit = unit
        self._building = folder / f".building-{unit}-{uuid.uuid4().hex}"
        self._streams: dict[str, IO[bytes]] = {}
        self._paths = set[Path]()

    def __enter__(self) -> "UnitWriter":
        self._folder.mkdir(parents=True, exist_ok=True)
        remove_abandoned(self._folder.glob(f".building-{self._unit}-*"))
        self._building.mkdir()
        return self

    def __exit__(self, *error: object) -> None:
        for stream in self._streams.values():
            with suppress(OSError):  # the disk is full, which the error says
                stream.close()
        shutil.rmtree(self._building, ignore_errors=True)

    def append(self, name: str, values: NDArray[Any]) -> None:
        """Appends values in little-endian order to the file with a name."""
        if name not in self._streams:
            self._streams[name] = self.path(name).open("wb")
        self._streams[name].write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)

    def path(self, name: str) -> Path:
        """Returns where to write a file of the unit that `append` does not write."""
        self._paths.add(self._building / name)
        return self._building / name

    def finish(self, values: Mapping[str, Any]) -> None:
        """Installs the files, and `ID.json` with the values, and the size and SHA-256 of each file."""
        for stream in self._streams.values():
            stream.close()
        files = {}
        for path in sorted(self._paths):
            with path.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
                os.fsync(content.fileno())
            files[path.name] = {"bytes": path.stat().st_size, "sha256": digest}
        description = json.dumps({**values, "files": files}, indent=1)
        if read_unit(self._folder, self._unit) == json.loads(description):
            return  # without locks, another process has completed it meanwhile, and may be reading it
        for path in (self._folder / f"{self._unit}.json", *self._folder.glob(f"*{self._unit}.*")):
            path.unlink(missing_ok=True)
        for path in sorted(self._paths):
            path.rename(self._folder / path.name)
        replace_file(self._folder / f"{self._unit}.json", description.encode())


def read_unit(folder: Path, unit: str) -> dict[str, Any] | None:
    """Returns the values of a complete unit; None if it is absent, or a file has another size."""
    try:
        values = read_json(folder / f"{unit}.json")
        is_complete = all((folder / name).stat().st_size == file["bytes"] for name, file in values["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return values if is_complete else None


@dataclass(frozen=True)
class Shard:
    """One part of a unit: tokens on disk, and the documents that are not dropped as duplicates."""

    folder: Path  # that of the source
    unit: str
    part: Part
    dtype: np.dtype[Any]  # type of its tokens
    vocab_size: int  # its token ids are below
    sizes: range = ANY_LENGTH  # numbers of tokens that its documents have; all others are left out

    @cached_property
    def tokens(self) -> NDArray[np.unsignedinteger[Any]]:
        """Token ids of all documents one after the other, mapped from disk."""
        path = self.folder / f"{self.part}-{self.unit}.tokens"
        rows = read_rows(self.folder, self.unit)
        num_tokens = int(rows["length"][rows["part"] == PARTS.index(self.part)].sum(dtype=np.int64))
        tokens = _map_rows(path, self.dtype)
        if len(tokens) != num_tokens:
            rule = f"must have the {num_tokens:,} tokens of its index"
            raise _foreign(path, rule, f"a file of {tokens.nbytes:,} bytes")
        return tokens

    def read(self, positions: Any) -> NDArray[np.unsignedinteger[Any]]:
        """Returns the tokens at a slice or an array of positions. Raises DataError if one is no token id."""
        ids: NDArray[np.unsignedinteger[Any]] = self.tokens[positions]
        if (largest := int(ids.max(initial=0))) >= self.vocab_size:
            path = self.folder / f"{self.part}-{self.unit}.tokens"
            raise _foreign(path, f"must have token ids below {self.vocab_size:,}", f"one with {largest:,}")
        return ids

    @cached_property
    def _rows(self) -> tuple[NDArray[Any], NDArray[np.int64]]:
        rows = np.array(read_rows(self.folder, self.unit))
        is_part = rows["part"] == PARTS.index(self.part)
        lengths = rows["length"][is_part].astype(np.int64)
        is_kept = read_drops(self.folder, self.unit)[is_part] == 0
        is_kept &= (lengths >= self.sizes.start) & (lengths < self.sizes.stop)
        return rows[is_part][is_kept], (np.cumsum(lengths) - lengths)[is_kept]

    @property
    def documents(self) -> NDArray[Any]:
        """Rows of `INDEX` of the kept documents."""
        return self._rows[0]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Number of tokens of each kept document."""
        return self.documents["length"].astype(np.int64)

    @property
    def starts(self) -> NDArray[np.int64]:
        """Position in `tokens` of the first token of each kept document."""
        return self._rows[1]

    def sequences(self, sequence_length_tokens: int) -> SequenceTable:
        """Returns the pieces of the kept documents in each sequence; packs them if no earlier call has."""
        some = "" if self.sizes == ANY_LENGTH else f"-{self.sizes.start}-{self.sizes.stop}"
        path = check_plain(self.folder / f"{self.part}-{self.unit}.sequences-{sequence_length_tokens}{some}.npy")
        with suppress(OSError, ValueError, EOFError, OverflowError):  # it is absent, cut, or of other documents
            return SequenceTable.load(path, self.lengths, sequence_length_tokens)
        table = pack_windows(self.lengths, sequence_length_tokens)
        try:
            with replacing(path) as partial:
                table.save(partial)
            return SequenceTable.load(path, self.lengths, sequence_length_tokens)
        except OSError as error:
            # The folder can only be read, or another process has removed the file; the next call packs again.
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT):
                raise
            return table


def read_rows(folder: Path, unit: str) -> NDArray[Any]:
    """Returns the rows of `INDEX` of a unit, mapped from disk."""
    return _map_rows(folder / f"{unit}.index", INDEX)


def _map_rows(path: Path, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Maps a file of rows into memory; an absent one has none. Others may replace it meanwhile."""
    try:
        with check_plain(path).open("rb") as content:
            size = os.fstat(content.fileno()).st_size
            if size % dtype.itemsize:
                raise _foreign(path, f"must have rows of {dtype.itemsize} bytes", f"a file of {size:,} bytes")
            return np.memmap(content, dtype, mode="r") if size else np.empty(0, dtype)
    except FileNotFoundError:
        return np.empty(0, dtype)


def read_drops(folder: Path, unit: str) -> NDArray[np.uint8]:
    """Returns for each document of a unit why it is dropped: 0 if it is kept."""
    path = check_plain(folder / f"{unit}.drop.npy")
    num_rows = len(read_rows(folder, unit))
    try:
        drops: NDArray[np.uint8] = np.load(path, mmap_mode="r")  # mapped: the file says how large it is
        if drops.dtype == np.uint8 and drops.shape == (num_rows,):
            return drops
    except FileNotFoundError:
        return np.zeros(num_rows, np.uint8)
    except (ValueError, EOFError, OverflowError):
        pass
    raise _foreign(path, f"must be an array of {num_rows:,} bytes", "another file")


def read_report(folder: Path) -> dict[str, Any]:
    """Returns `prepare.json` of a complete folder. Raises DataError if the folder is not complete."""
    try:
        report = read_json(folder / REPORT_NAME)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{FOLDER_KEY}: must be a folder that launch.prepare has completed, {str(folder)!r} has no readable "
            f"{REPORT_NAME}; nearest: python -m launch.prepare data.manifest=MIX.yaml out={folder}"
        ) from error
    check_entries(folder)
    try:
        check = "vocab_size and token_dtype must be those of a vocabulary"
        if not _is_count(report["vocab_size"]) or report["token_dtype"] not in _TOKEN_DTYPES:
            raise ValueError(check)
        for name, source in report[SOURCES_NAME].items():
            check = f"source {name!r} must have a plain name, units named by 16 hexadecimal digits, and counts"
            names = [*map(UNIT_NAME.fullmatch, source["units"]), SOURCE_NAME.fullmatch(name)]
            counts = [count for part in PARTS for count in source[part].values()]
            if not all(names) or not all(map(_is_count, counts)) or len({*source["units"]}) < len(source["units"]):
                raise ValueError(check)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _foreign(folder / REPORT_NAME, f"must be one of launch.prepare: {check}", "another") from error
    return report


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < _MOST


def _foreign(path: Path, rule: str, value: str, near: str = _AGAIN) -> DataError:
    """Returns the error about a file that `launch.prepare` did not write, or not like this."""
    return DataError(f"{FOLDER_KEY}: {path} {rule}, is {value}; nearest: {near}")


def read_json(path: Path) -> dict[str, Any]:
    """Reads an object of a prepared folder. Raises ValueError if it is no JSON, too deep or too long."""
    if check_plain(path).stat().st_size > _JSON_BYTES:
        raise ValueError(f"it has more than {_JSON_BYTES:,} bytes")
    try:
        values = json.loads(path.read_bytes())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError("it is no object")
    return values


def check_plain(path: Path) -> Path:
    """Returns the path of a file. Raises DataError if it is a link, a pipe, a device or sparse."""
    with suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode) or is_sparse(path):
            raise _foreign(path, "must be a file with content", "a link, a folder, a pipe, a device or sparse")
    return path


def check_entries(folder: Path) -> None:
    """Rejects links, pipes and devices in a folder and among the folders of its sources."""
    for parent in (folder, folder / SOURCES_NAME):
        for path in parent.iterdir() if parent.is_dir() else ():
            try:
                kind = path.lstat().st_mode
            except FileNotFoundError:  # another process has finished this file
                continue
            is_folder_due = path == folder / SOURCES_NAME or parent != folder
            if not stat.S_ISDIR(kind) and (is_folder_due or not stat.S_ISREG(kind)):
                rule = "must be a folder" if is_folder_due else "must be a file or folder"
                raise _foreign(path, f"{rule} of launch.prepare", "not, or is a link", "remove it")


def open_shards(folder: Path, source: str, part: Part, lengths: range = ANY_LENGTH) -> tuple[Shard, ...]:
    """Returns the shards of a source of a complete folder, in the order that its sequences have."""
    report = read_report(folder)
    dtype = np.dtype(report["token_dtype"])
    units = report[SOURCES_NAME][source]["units"]
    place = folder / SOURCES_NAME / source
    return tuple(Shard(place, unit, part, dtype, report["vocab_size"], lengths) for unit in units)


class ShardRows:
    """Sequences of one part as rows of an array [N, L], read when they are indexed: tokens, or positions."""

    def __init__(self, shards: Sequence[Shard], counts: Sequence[int], length: int, pad_id: int | None) -> None:
        """Opens no shard yet.

        Args:
            counts: number of sequences of each shard.
            length: tokens of a sequence.
            pad_id: token that fills sequences; None: the rows are positions within the pieces.
        """
        self._shards = shards
        self._open = lru_cache(_OPEN_SHARDS)(self._open_shard)
        self._first_rows = np.cumsum([0, *counts])
        self._pad_id = pad_id
        self.shape = (int(self._first_rows[-1]), length)
        self.dtype: np.dtype[Any] = np.dtype(np.int32 if pad_id is None else np.int64)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: Any) -> NDArray[Any]:
        """Returns one row, or several in the given order."""
        if isinstance(rows, slice):
            rows = np.arange(len(self))[rows]
        numbers_N = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        fill = PADDING_POSITION if self._pad_id is None else self._pad_id
        values_NL = np.full((len(numbers_N), self.shape[1]), fill, dtype=self.dtype)
        shards_N = np.searchsorted(self._first_rows, numbers_N, side="right") - 1
        within_N = numbers_N - self._first_rows[shards_N]
        # In the order of the shards, so that neighbors on disk are read together.
        for index in np.lexsort((within_N, shards_N)).tolist():
            self._fill(values_NL[index], *self._open(int(shards_N[index])), int(within_N[index]))
        return values_NL[0] if np.ndim(rows) == 0 else values_NL

    def _open_shard(self, number: int) -> tuple[Shard, SequenceTable]:
        # A copy, because a shard keeps what it has read.
        shard = copy(self._shards[number])
        table = shard.sequences(self.shape[1])
        count = int(self._first_rows[number + 1] - self._first_rows[number])
        if len(table) != count:
            raise _foreign(shard.folder / shard.unit, f"must have {count:,} sequences", f"one with {len(table):,}")
        return shard, table

    def _fill(self, values_L: NDArray[Any], shard: Shard, table: SequenceTable, number: int) -> None:
        filled = 0
        for document, first, count in table.of(number).tolist():
            start = int(shard.starts[document]) + first
            values = np.arange(count) if self._pad_id is None else shard.read(slice(start, start + count))
            values_L[filled : filled + count] = values
            filled += count
