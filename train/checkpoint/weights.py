"""Reads and writes the weights of checkpoints in one process, tensor by tensor, without a model."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.futures import Future

from model.config import ModelConfig
from model.hf.names import copied_from, weights
from train.checkpoint.dcp.metadata import read_metadata
from train.checkpoint.dcp.storage import TensorsReader
from train.checkpoint.manifest import CheckpointError, read_model
from train.checkpoint.state import WEIGHTS_PREFIX, SliceLoadPlanner, first_line

EMA_PREFIX = "ema."
WeightsKind = Literal["trained", "ema"]
_PREFIXES: dict[WeightsKind, str] = {"trained": WEIGHTS_PREFIX, "ema": EMA_PREFIX}


def held_weights(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of a checkpoint's weights and router biases by name, without copies."""
    return {name: shape for name, shape in weights(config) if copied_from(name) is None and 0 not in shape}


class CheckpointReader:
    """A checkpoint whose manifest, list of tensors and files have been checked.

    Tensors are read on demand.

    Args:
        key: configuration key that names it, for errors.
        kind: the trained weights, or their moving average.

    Raises:
        CheckpointError: there is no average, the manifest or the list of tensors cannot be read, a weight is missing or
            has another shape, or a file is missing or truncated.
    """

    def __init__(self, folder: Path, key: str, kind: WeightsKind = "trained") -> None:
        self.config: ModelConfig = read_model(folder, key)
        self._folder = folder
        self._key = key
        self._prefix = _PREFIXES[kind]
        self._metadata = read_metadata(folder, key)
        if not any(name.startswith(self._prefix) for name in self._metadata.state_dict_metadata) and kind == "ema":
            raise self._error("weights", "must be trained, because the run kept no average (ema.decay), is ema")
        self._storage = TensorsReader(folder, self._metadata)
        self._storage.set_up_storage_reader(self._metadata, is_coordinator=True)
        self._shapes = held_weights(self.config)
        self._dtypes = {name: self._check_weight(name, shape) for name, shape in self._shapes.items()}
        self._check_files()

    def dtype_of(self, name: str) -> torch.dtype:
        """Returns the type in which a tensor is stored."""
        return self._dtypes[name]

    def fill(self, named: Mapping[str, Tensor]) -> None:
        """Fills the given tensors by name, converted to their types, one at a time.

        Raises:
            CheckpointError: the checkpoint has no tensor of a name and shape, or its content cannot be read.
        """
        for name, tensor in named.items():
            if self._shapes.get(name) != tuple(tensor.shape):
                raise self._error(name, f"must have shape {tuple(tensor.shape)}, has {self._shapes.get(name)}")
            self._read(name, tensor)

    def tensor(self, name: str, dtype: torch.dtype) -> Tensor:
        """Reads one tensor, converted to a type, and raises the same errors as `fill`."""
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
        except Exception as error:  # torch raises many types of error on damaged files
            raise self._error(name, f"cannot be read: {first_line(error)}") from error
        if not tensor.isfinite().all():
            raise self._error(name, "must hold finite numbers, does not")

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


def write_weights(
    folder: Path,
    plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    *,
    max_file_bytes: int,
) -> None:
    """Writes tensors in order into files of limited size.

    Memory holds the tensors of one file, and one more.

    Args:
        folder: existing folder; the caller writes the manifest.
        plan: shape and type of every tensor by its released name.
        read: returns the tensor of a name, with that shape and type.
        max_file_bytes: largest size of a file with more than one tensor.

    Raises:
        OSError: a file cannot be written. Errors of `read` are raised unchanged.
    """
    state: dict[str, Any] = {
        WEIGHTS_PREFIX + name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in plan.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns of deprecations in its own code
        try:
            dcp_save(
                state,
                storage_writer=_FilesWriter(folder, max_file_bytes),
                planner=_LazyPlanner(read),
                no_dist=True,
            )
        except CheckpointException as failure:
            cause = next(iter(failure.failures.values()))[0]
            raise _refusal_of_disk(cause) or cause from None


def _refusal_of_disk(error: BaseException | None) -> OSError | None:
    """Returns the original OSError. torch raises another error while it closes its archive afterwards."""
    while error is not None and not isinstance(error, (OSError, ValueError)):
        error = error.__context__
    return error if isinstance(error, OSError) else None


class _LazyPlanner(DefaultSavePlanner):
    """A planner that reads a tensor's content when it is written. The state dictionary holds only shapes."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor, stored = self._read(index.fqn.removeprefix(WEIGHTS_PREFIX)), self.state_dict[index.fqn]
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype), index.fqn
        return tensor


class _FilesWriter(FileSystemWriter):
    """A writer of small files.

    DCP's writer keeps all tensors of a file in memory until the file is complete.
    """

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        # If a GPU is present, copying ahead would sort tensors by size and read several at once.
        super().__init__(folder, thread_count=1, per_thread_copy_ahead=0)
        self._max_file_bytes = max_file_bytes

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[Any]]:
        written: list[Any] = []
        for number, items in enumerate(_files(plan.items, self._max_file_bytes)):
            prefix = dataclasses.replace(plan.storage_data, prefix=f"__{number}_")
            part = dataclasses.replace(plan, items=items, storage_data=prefix)
            written += super().write_data(part, planner).value()
        done: Future[list[Any]] = Future()
        done.set_result(written)
        return done


def _files(items: Sequence[WriteItem], max_file_bytes: int) -> Iterator[list[WriteItem]]:
    file: list[WriteItem] = []
    total = 0
    for item in items:
        size = item.tensor_storage_size()
        assert size is not None
        if file and total + size > max_file_bytes:
            yield file
            file, total = [], 0
        file.append(item)
        total += size
    if file:
        yield file
