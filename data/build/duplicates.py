"""Drops duplicates across the units of a folder, in the order of the manifest. Imports no torch."""

import io
import json
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.build.units import TextUnit
from data.build.work import Build
from data.quality.duplicates import EXACT, find_duplicates
from data.shards import KEY_BLOCK_BYTES, read_rows, replace_file

DUPLICATES_NAME = "duplicates.jsonl"
_OPEN_UNITS = 64  # indexes that are mapped into memory at a time


def drop_duplicates(build: Build) -> None:
    """Decides which documents of complete units are dropped, and writes what has changed.

    Of equal or similar documents, the first one in the order of the sources is kept. `duplicates.jsonl` names each
    document that is dropped, and the one that is kept for it.
    """
    units = build.all_units()

    @lru_cache(_OPEN_UNITS)
    def rows_of(unit: int) -> NDArray[Any]:
        return read_rows(build.folder_of(units[unit].source.name), units[unit].name)

    def place(unit: int, row: int) -> str:
        return _place(units[unit], rows_of(unit)[row])

    sketches = [build.folder_of(unit.source.name) / f"{unit.name}.sketches" for unit in units]
    duplicates = find_duplicates(
        [len(rows_of(unit)) for unit in range(len(units))],
        lambda unit: rows_of(unit)["hash"],
        sketches if build.manifest.dedup == "minhash" else None,
    )
    drops = duplicates.drops
    for unit, drop in zip(units, drops, strict=True):
        _write_drop(build, unit, drop)
    lines = (
        {
            "dropped": place(*dropped),
            "kind": "exact" if drops[dropped[0]][dropped[1]] == EXACT else "near",
            "kept": place(*kept),
        }
        for dropped, kept in duplicates.pairs()
    )
    encoded = (f"{json.dumps(line, ensure_ascii=False)}\n".encode("utf-8", "surrogateescape") for line in lines)
    replace_file(build.folder / DUPLICATES_NAME, encoded)


def _write_drop(build: Build, unit: TextUnit, drop: NDArray[np.uint8]) -> None:
    """Writes why each document of a unit is dropped, unless the file has the same content."""
    stream = io.BytesIO()
    np.save(stream, drop)
    path = build.folder_of(unit.source.name) / f"{unit.name}.drop.npy"
    if not path.exists() or path.read_bytes() != stream.getvalue():
        for packed in path.parent.glob(f"*{unit.name}.sequences-*"):
            packed.unlink()
        replace_file(path, stream.getvalue())


def _place(unit: TextUnit, row: NDArray[Any]) -> str:
    """Returns the source and the key of a document."""
    key = unit.pieces[int(row["piece"])].file.key
    block = f"@{int(row['block']) * KEY_BLOCK_BYTES}" if row["block"] else ""
    line = f":{row['row']}" if row["row"] else ""
    return f"{unit.source.name}/{key}{block}{line}"
