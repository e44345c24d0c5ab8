"""Sizes and hashes of a checkpoint's files. No torch here."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any

_LONGEST_NAME = 255


@dataclass(frozen=True, slots=True)
class Digest:
    """What a file held when it was written."""

    num_bytes: int
    sha256: str

    def as_json(self) -> dict[str, Any]:
        """As a manifest lists it."""
        return {"bytes": self.num_bytes, "sha256": self.sha256}


def digest(path: Path) -> Digest:
    """Of a file as it is now.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return Digest(file.tell(), found)


def digests(paths: Iterable[Path]) -> dict[str, Digest]:
    """Of several files, by name."""
    return {path.name: digest(path) for path in sorted(paths)}


def record_hash(record: Mapping[str, Any]) -> str:
    """Of a manifest's content, however it is spaced."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def file_problem(folder: Path, name: str, listed: object, *, hashes: bool) -> str:
    """What is wrong with a file that a manifest lists, empty where nothing is.

    Args:
        folder: of the checkpoint.
        name: of the file.
        listed: what the manifest says of it.
        hashes: whether its content is read; else its size alone is looked at.
    """
    if not isinstance(listed, dict) or Path(name).name != name or name in ("", "..") or "\0" in name:
        return f"manifest.json must list files beside it, lists {name[:_LONGEST_NAME]!r}"
    path = folder / name
    try:
        found_there = path.stat()
        # A pipe or a device would be read without end.
        if not S_ISREG(found_there.st_mode):
            return f"{name} must be a file, is none"
        num_bytes = found_there.st_size
        if num_bytes != listed.get("bytes"):
            return f"{name} must have {listed.get('bytes')} bytes, has {num_bytes}"
        found = digest(path).sha256 if hashes else listed.get("sha256")
    except OSError as error:
        return f"{name} must be there, cannot be read ({error.strerror or error})"
    return "" if found == listed.get("sha256") else f"{name} must have the hash that the manifest lists, has another"
