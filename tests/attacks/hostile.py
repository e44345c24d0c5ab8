"""Malicious files: payloads that leave a proof if they run, and checkpoints with them."""

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from train.checkpoint.index import INDEX_NAME
from train.checkpoint.manifest import MANIFEST_NAME, digests, record_hash

ONE_TIB = 2**40


class Payload:
    """Creates a file when something unpickles it without restriction."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.proof,)


def payload_bytes(proof: Path) -> bytes:
    """Returns a pickle that creates `proof` while it is read."""
    return pickle.dumps(Payload(proof))


def copy_of(source: Path, target: Path) -> Path:
    """Copies a folder file by file; links stay links."""
    return Path(shutil.copytree(source, target, symlinks=True))


def rehash(folder: Path) -> None:
    """Writes sizes and hashes of the files into the manifest, as an attacker would who has changed a file."""
    files = digests(folder, (file for file in folder.iterdir() if file.name != MANIFEST_NAME))
    listed = {name: digest.as_json() for name, digest in files.items()}
    edit_manifest(folder, lambda record: record.update(files=listed))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and updates its own hash."""
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps({**record, "sha256": record_hash(record)}))


def edit_index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / INDEX_NAME
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def edit_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])


def sparse(path: Path, num_bytes: int = ONE_TIB) -> None:
    """Creates a sparse file of this size."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(num_bytes)


def loop(path: Path) -> None:
    """Creates a link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
