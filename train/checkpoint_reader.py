"""Weights of a checkpoint of ours, whatever layout wrote it, read tensor by tensor in one process."""

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path, PosixPath, WindowsPath
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from model.config import ModelConfig
from model.hf.names import copied_from, weights
from train.manifest import CheckpointError, read_model

WEIGHTS_PREFIX = "weights."
METADATA_NAME = ".metadata"
_LONGEST_TEXT = 120
_RECORD_MODULES = ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem")


def held_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of every weight and router bias that a checkpoint of ours holds: each once, none of them empty."""
    return {name: shape for name, shape in weights(config) if copied_from(name) is None and 0 not in shape}


class CheckpointReader:
    """A checkpoint whose manifest, list of tensors and files have been checked; their content is read on demand.

    Args:
        folder: of the checkpoint.
        key: of the configuration that names it, for errors.

    Raises:
        CheckpointError: the manifest or the list cannot be read, a weight is missing or of another shape, a file is
            missing or cut short.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.config: ModelConfig = read_model(folder, key)
        self._folder = folder
        self._key = key
        self._metadata = read_list(folder, key)
        self._storage = FileSystemReader(folder)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._shapes = held_weights(self.config)
        self._dtypes = {name: self._check_weight(name, shape) for name, shape in self._shapes.items()}
        self._check_files()

    def dtype_of(self, name: str) -> torch.dtype:
        """The type that a tensor was saved in."""
        return self._dtypes[name]

    def fill(self, named: Mapping[str, Tensor]) -> None:
        """Reads each named tensor into the one given, converted to its type, one at a time.

        Raises:
            CheckpointError: a name or shape that the checkpoint does not hold, or content that cannot be read.
        """
        for name, tensor in named.items():
            if self._shapes.get(name) != tuple(tensor.shape):
                raise self._error(name, f"must have shape {tuple(tensor.shape)}, has {self._shapes.get(name)}")
            self._read(name, tensor)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """One tensor, converted to a type; errors as of `fill`."""
        tensor = torch.empty(self._shapes[name], dtype=dtype)
        self._read(name, tensor)
        return tensor

    def _read(self, name: str, tensor: Tensor) -> None:
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        try:
            planner.set_up_planner({WEIGHTS_PREFIX + name: tensor}, self._metadata, is_coordinator=True)
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except MemoryError:
            raise
        except Exception as error:  # what torch raises on broken files is of no common type
            raise self._error(name, f"cannot be read: {first_line(error)}") from error
        if not tensor.isfinite().all():
            raise self._error(name, "must hold finite numbers, holds others")

    def _check_weight(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        stored = self._metadata.state_dict_metadata.get(WEIGHTS_PREFIX + name)
        if not isinstance(stored, TensorStorageMetadata):
            raise self._error(name, "must be there, is missing")
        if tuple(stored.size) != shape:
            raise self._error(name, f"must have shape {shape}, has {tuple(stored.size)}")
        return stored.properties.dtype

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for index, place in (self._metadata.storage_data or {}).items():
            if index.fqn.startswith(WEIGHTS_PREFIX):
                end = place.offset + place.length
                needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        for name, num_bytes in needed.items():
            path = self._folder / name
            if path.name != name:
                raise self._error(METADATA_NAME, f"must name files beside it, names {name!r}")
            if not path.is_file():
                raise self._error(name, "must be there, is missing")
            if path.stat().st_size < num_bytes:
                raise self._error(name, f"must have at least {num_bytes} bytes, has {path.stat().st_size}")

    def _error(self, subject: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._key}: {self._folder}: {subject}: {problem}")


def read_list(folder: Path, key: str) -> Metadata:
    """What a checkpoint's files hold: every tensor by name, and where its chunks lie.

    Raises:
        CheckpointError: it is missing or not readable; `key` of the configuration named the checkpoint.
    """
    place = f"{key}: {folder}: {METADATA_NAME}: must list the tensors"
    try:
        with (folder / METADATA_NAME).open("rb") as file:
            metadata = _ListUnpickler(file).load()
    except MemoryError:
        raise
    except Exception as error:  # whatever unpickling another file may raise
        raise CheckpointError(f"{place}, cannot be read: {first_line(error)}") from error
    if not isinstance(metadata, Metadata) or not isinstance(metadata.storage_data, dict):
        raise CheckpointError(f"{place}, is a {type(metadata).__name__}")
    return metadata


class _ListUnpickler(pickle.Unpickler):
    """Reads DCP's list of tensors, and runs no code that another file might bring: only its plain records are made."""

    def find_class(self, module: str, name: str) -> Any:
        found = None if "." in name else getattr(sys.modules.get(module), name, None)
        is_record = module in _RECORD_MODULES and isinstance(found, type) and found.__module__ == module
        is_layout = (module, name) == ("torch.serialization", "_get_layout")
        is_plain = is_layout or isinstance(found, torch.dtype) or found in (torch.Size, PosixPath, WindowsPath)
        if is_record or is_plain:
            return found
        raise pickle.UnpicklingError(f"it must hold DCP's records alone, asks for {module}.{name}")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; torch's own are cut."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:_LONGEST_TEXT]
