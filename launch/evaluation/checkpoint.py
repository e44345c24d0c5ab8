"""Identifies the weights that are evaluated by a hash of their files. Imports no torch."""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from launch.generation.source import GenerationSource
from train.checkpoint.manifest import MANIFEST_NAME, digest

_HASHED_SUFFIXES = (".safetensors", ".json", ".model")


def describe_checkpoint(source: GenerationSource) -> dict[str, Any]:
    """Returns folder, kind, step and hash of weights.

    The manifest of a checkpoint has the hash of every file, and so its hash is that of the weights. All files of a
    Hugging Face folder are read.
    """
    if source.is_hf:
        paths = sorted(path for path in source.folder.iterdir() if path.suffix in _HASHED_SUFFIXES)
        with ThreadPoolExecutor() as pool:
            hashes = dict(zip((path.name for path in paths), pool.map(_sha256, paths), strict=True))
        return {"folder": str(source.folder), "kind": "huggingface", "step": None, "weights": "trained", **_sum(hashes)}
    manifest = json.loads((source.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    hashes = {name: str(each["sha256"]) for name, each in manifest["files"].items()}
    step = manifest["step"]
    return {
        "folder": str(source.folder.resolve()),
        "kind": "checkpoint",
        "step": step,
        "weights": source.weights,
        **_sum(hashes),
    }


def _sha256(path: Path) -> str:
    return digest(path).sha256


def _sum(hashes: dict[str, str]) -> dict[str, str]:
    return {"sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}
