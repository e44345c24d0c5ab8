"""Weights of a checkpoint of ours, whatever layout wrote it, read tensor by tensor in one process."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from model.config import ModelConfig
from model.hf.names import copied_from, weights
from train.checkpoint.dcp.metadata import read_metadata
from train.checkpoint.dcp.storage import TensorsReader
from train.checkpoint.manifest import CheckpointError, read_model
from train.checkpoint.slices import SliceLoadPlanner

WEIGHTS_PREFIX = "weights."
EMA_PREFIX = "ema."
Kept = Literal["trained", "ema"]
_PREFIXES: dict[Kept, str] = {"trained": WEIGHTS_PREFIX, "ema": EMA_PREFIX}
_LONGEST_TEXT = 120


def held_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape by name of every weight and router bias that a checkpoint of ours holds: each once, none of them empty."""
    return {name: shape for name, shape in weights(config) if copied_from(name) is None and 0 not in shape}


class CheckpointReader:
    """A checkpoint whose manifest, list of tensors and files have been checked; their content is read on demand.

    Args:
        folder: of the checkpoint.
        key: of the configuration that names it, for errors.
        kept: which of its weights: those that were trained, or their average.

    Raises:
        CheckpointError: there is no average; the manifest or the list cannot be read, a weight is missing or of
            another shape, a file is missing or cut short.
    """

    def __init__(self, folder: Path, key: str, kept: Kept = "trained") -> None:
        self.config: ModelConfig = read_model(folder, key)
        self._folder = folder
        self._key = key
        self._prefix = _PREFIXES[kept]
        self._metadata = read_metadata(folder, key)
        if not any(name.startswith(self._prefix) for name in self._metadata.state_dict_metadata) and kept == "ema":
            raise self._error("weights", "must be trained, as the run kept no average (ema.decay), are ema")
        self._storage = TensorsReader(folder, self._metadata)
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
        planner = SliceLoadPlanner()
        try:
            planner.set_up_planner({self._prefix + name: tensor}, self._metadata, is_coordinator=True)
            self._storage.read_data(planner.create_local_plan(), planner).wait()
        except MemoryError:
            raise
        except Exception as error:  # what torch raises on broken files is of no common type
            raise self._error(name, f"cannot be read: {first_line(error)}") from error
        if not tensor.isfinite().all():
            raise self._error(name, "must hold finite numbers, holds others")

    def _check_weight(self, name: str, shape: tuple[int, ...]) -> torch.dtype:
        stored = self._metadata.state_dict_metadata.get(self._prefix + name)
        if not isinstance(stored, TensorStorageMetadata):
            raise self._error(name, "must be there, is missing")
        if tuple(stored.size) != shape:
            raise self._error(name, f"must have shape {shape}, has {tuple(stored.size)}")
        return stored.properties.dtype

    def _check_files(self) -> None:
        needed: dict[str, int] = {}
        for index, place in (self._metadata.storage_data or {}).items():
            if index.fqn.startswith(self._prefix):
                end = place.offset + place.length
                needed[place.relative_path] = max(needed.get(place.relative_path, 0), end)
        for name, num_bytes in needed.items():
            path = self._folder / name
            if not path.is_file():
                raise self._error(name, "must be there, is missing")
            if path.stat().st_size < num_bytes:
                raise self._error(name, f"must have at least {num_bytes} bytes, has {path.stat().st_size}")

    def _error(self, subject: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self._key}: {self._folder}: {subject}: {problem}")


def first_line(error: BaseException) -> str:
    """What an exception says, in one line; torch's own are cut."""
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:_LONGEST_TEXT]
