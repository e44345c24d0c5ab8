"""Writes and reads the experts of sampled tokens, so that a resumed run need not sample again.

Each rank writes its own records. Any rank reads any record, because a file names it by prompt, sample and layer. So the
job may resume with another layout. Shape legend: T tokens, K experts per token.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from zlib import crc32

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from infer.engines.protocol import PROMPT_SAMPLE, RouteKey, SampledRoutes
from model.router import RouteError
from train.ownership.rank_files import RankFiles, find_rank_files
from train.rollout.routes.exchange import checked_record

_PROMPT, _ORIGIN = "prompt", "origin"


def write_routes(folder: Path, step: int, files: RankFiles, routes: SampledRoutes, origin: str) -> Path:
    """Writes the records of a rank. When this returns, the file is whole and on the disk.

    Args:
        step: first training step that learns from the rollout, from 1.
        origin: identifies the weights and settings that sampled the tokens.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = files.make_folder(folder) / _file_name(step, files.rank)
    partial = path.with_name(f"{path.name}.partial")
    with partial.open("wb") as file:
        records = {_to_name(key): ids_TK for key, ids_TK in routes.ids.items()}
        # A rank whose stages have no MoE layer has no records, which safetensors cannot write with metadata.
        checksums = {name: _checksum(ids_TK) for name, ids_TK in records.items()}
        file.write(save(records, checksums | {_ORIGIN: origin} if records else None))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    return path


def read_routes(folder: Path, step: int, files: RankFiles, held: Mapping[RouteKey, int], origin: str) -> SampledRoutes:
    """Reads records from the files of all ranks.

    The rank's own file is read first, because it has all records if the layout is the same. Files of another origin are
    ignored. A run that was rolled back may have left some.

    Args:
        step: first training step that learns from the rollout, from 1.
        held: number of tokens of each record that this rank needs.
        origin: as when the records were written.

    Raises:
        RouteError: a file cannot be read, or a record is missing or has another length.
    """
    found: dict[RouteKey, NDArray[np.generic]] = {}
    for path in _paths(folder, step, files):
        missing = [key for key in held if key not in found]
        if not missing:
            break
        try:
            with safe_open(path, "numpy") as file:
                checksums = file.metadata() or {}
                if checksums.get(_ORIGIN) != origin:
                    continue
                read = {key: file.get_tensor(_to_name(key)) for key in missing if _to_name(key) in checksums}
        except (OSError, SafetensorError) as error:
            raise RouteError(f"{path}: cannot be read: {error}") from error
        for key, ids_TK in read.items():
            if _checksum(ids_TK) != checksums[_to_name(key)]:
                raise RouteError(f"{path}: {_to_name(key)} was changed after it was written")
        found |= read
    return SampledRoutes(ids={key: checked_record(found, key, num_tokens) for key, num_tokens in held.items()})


def _paths(folder: Path, step: int, files: RankFiles) -> Iterator[Path]:
    own = files.folder(folder) / _file_name(step, files.rank)
    if own.exists():
        yield own
    yield from sorted(path for path in find_rank_files(folder, _file_name(step, "*")) if path != own)


def _file_name(step: int, rank: int | str) -> str:
    return f"step-{step:08}.routes-{rank}.safetensors"


def _checksum(ids_TK: NDArray[np.generic]) -> str:
    return str(crc32(np.ascontiguousarray(ids_TK).tobytes()))


def _to_name(key: RouteKey) -> str:
    sample = _PROMPT if key.sample == PROMPT_SAMPLE else key.sample
    return f"{key.prompt}.{sample}.{key.layer}"
