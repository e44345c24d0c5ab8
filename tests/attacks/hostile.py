"""Malicious files: payloads that leave a proof if they run, and checkpoints with them."""

import json
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

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
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    del record["sha256"]
    files = digests(folder, (file for file in folder.iterdir() if file.name != MANIFEST_NAME))
    record["files"] = {name: found.as_json() for name, found in files.items()}
    path.write_text(json.dumps({**record, "sha256": record_hash(record)}))


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest and updates its own hash."""
    path = folder / MANIFEST_NAME
    record = json.loads(path.read_text())
    del record["sha256"]
    change(record)
    path.write_text(json.dumps({**record, "sha256": record_hash(record)}))


def edit_metadata(folder: Path, change: Callable[[Any], object]) -> None:
    """Changes DCP's list of tensors."""
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def first_place(metadata: Any) -> Any:
    """Returns the entry of the embedding in DCP's list."""
    return next(place for index, place in metadata.storage_data.items() if "embed_tokens" in index.fqn)


def replace_first_chunk(folder: Path, content: bytes) -> None:
    """Replaces the embedding's bytes by a new file with other bytes."""
    (folder / "__9_0.distcp").write_bytes(content)

    def move(metadata: Any) -> None:
        place = first_place(metadata)
        place.relative_path, place.offset, place.length = "__9_0.distcp", 0, len(content)

    edit_metadata(folder, move)


def archive(pickled: bytes, values: bytes, *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """Returns a file in torch's tensor format with any header and any values."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        file.writestr("archive/data/0", values)
        file.writestr("archive/version", b"3\n")
    return buffer.getvalue()


def many_members(count: int) -> bytes:
    """Returns a zip archive with `count` empty members."""
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for number in range(count):
            file.writestr(f"archive/data/{number}", b"")
    return buffer.getvalue()


def huge_memo() -> bytes:
    """Returns a pickle of a few bytes for which Python's reader allocates 32 GiB."""
    return b"\x80\x04Nr" + struct.pack("<I", 2**31 - 1) + b"."


def deep_tuples(depth: int) -> bytes:
    """Returns a pickle with deeply nested tuples as a key; hashing it overflows the interpreter's stack."""
    return b"\x80\x04})" + b"\x85" * depth + b"Ns."


def sparse(path: Path, num_bytes: int = ONE_TIB) -> None:
    """Creates a sparse file of this size."""
    path.unlink(missing_ok=True)
    with path.open("wb") as file:
        file.truncate(num_bytes)


def loop(path: Path) -> None:
    """Creates a link to itself."""
    path.unlink(missing_ok=True)
    path.symlink_to(path.name)
