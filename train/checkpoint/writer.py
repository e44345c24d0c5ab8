"""Weights into a checkpoint of ours without a model: each is read when its turn comes to be written."""

import dataclasses
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.futures import Future

from train.checkpoint.reader import WEIGHTS_PREFIX


def write_weights(
    folder: Path,
    plan: Mapping[str, tuple[tuple[int, ...], torch.dtype]],
    read: Callable[[str], Tensor],
    *,
    max_file_bytes: int,
) -> None:
    """Writes tensors, in order, into files of limited size. In memory: those of the file being written, and one more.

    Args:
        folder: exists; the manifest is the caller's.
        plan: shape and type of every tensor by its released name.
        read: gives a tensor of that shape and type.
        max_file_bytes: a file holds less, or one tensor.

    Raises:
        OSError: a file cannot be written. Whatever `read` raises.
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
    """What the disk said: torch, closing its archive on the way out, raises an error of its own over it."""
    while error is not None and not isinstance(error, (OSError, ValueError)):
        error = error.__context__
    return error if isinstance(error, OSError) else None


class _LazyPlanner(DefaultSavePlanner):
    """Asks for a tensor's content when it is written; the state dictionary holds shapes alone."""

    def __init__(self, read: Callable[[str], Tensor]) -> None:
        super().__init__()
        self._read = read

    def lookup_object(self, index: MetadataIndex) -> Any:
        tensor, stored = self._read(index.fqn.removeprefix(WEIGHTS_PREFIX)), self.state_dict[index.fqn]
        assert (tensor.shape, tensor.dtype) == (stored.shape, stored.dtype), index.fqn
        return tensor


class _FilesWriter(FileSystemWriter):
    """DCP's writer keeps all tensors of a file until it is complete; so files are kept small."""

    def __init__(self, folder: Path, max_file_bytes: int) -> None:
        # Nothing copied ahead: with a GPU in the machine it would sort by size and read several at once.
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
