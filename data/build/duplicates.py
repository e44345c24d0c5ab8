"""Drops duplicates across the units of a folder, in the order of the manifest. Imports no torch."""

import io
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.build.units import TextUnit
from data.build.work import Build
from data.quality.duplicates import find_duplicates
from data.shards import KEY_BLOCK_BYTES, read_rows, replace_file

DUPLICATES_NAME = "duplicates.jsonl"


def drop_duplicates(build: Build) -> None:
    """Decides which documents of complete units are dropped, and writes what has changed.

    Of equal or similar documents, the first one in the order of the sources is kept. `duplicates.jsonl` names each
    document that is dropped, and the one that is kept for it.
    """
    units = build.all_units()
    rows = [read_rows(build.folder_of(unit.source.name), unit.name) for unit in units]
    sketches = [build.folder_of(unit.source.name) / f"{unit.name}.sketches" for unit in units]
    duplicates = find_duplicates(
        [unit["hash"] for unit in rows], sketches if build.manifest.dedup == "minhash" else None
    )
    for unit, drop in zip(units, duplicates.drops, strict=True):
        _write_drop(build, unit, drop)
    lines = (
        {"dropped": _place(units, rows, *pair.dropped), "kind": pair.kind, "kept": _place(units, rows, *pair.kept)}
        for pair in duplicates.pairs()
    )
    text = "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines)
    replace_file(build.folder / DUPLICATES_NAME, text.encode("utf-8", errors="surrogateescape"))


def _write_drop(build: Build, unit: TextUnit, drop: NDArray[np.uint8]) -> None:
    """Writes why each document of a unit is dropped, unless the file has the same content."""
    stream = io.BytesIO()
    np.save(stream, drop)
    path = build.folder_of(unit.source.name) / f"{unit.name}.drop.npy"
    if not path.exists() or path.read_bytes() != stream.getvalue():
        for packed in path.parent.glob(f"*{unit.name}.sequences-*"):
            packed.unlink()
        replace_file(path, stream.getvalue())


def _place(units: Sequence[TextUnit], rows: Sequence[NDArray[Any]], unit: int, row: int) -> str:
    """Returns the source and the key of a document."""
    values = rows[unit][row]
    key = units[unit].pieces[int(values["piece"])].file.key
    block = f"@{int(values['block']) * KEY_BLOCK_BYTES}" if values["block"] else ""
    line = f":{values['row']}" if values["row"] else ""
    return f"{units[unit].source.name}/{key}{block}{line}"
