"""Reads and writes DCP's storage: reads only tensors, from files whose content is checked."""

import os
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, LoadPlanner, ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from train.checkpoint.dcp.metadata import ChunkLocation
from train.checkpoint.dcp.records import RecordError, shown
from train.checkpoint.dcp.tensor_file import read_tensor
from train.ownership.rank_files import RankFiles


class TensorsReader(FileSystemReader):
    """A reader of a checkpoint's tensors, whose list `read_metadata` has read.

    torch's own reader unpickles the list, and everything in it that is not a tensor, without restriction.
    """

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        """Opens nothing yet.

        Args:
            metadata: list of its tensors, already checked.
        """
        super().__init__(folder)
        self._folder = folder
        self._metadata = metadata

    # If this parameter were named kwargs, DCP would search for a list per rank when this one cannot be read.
    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Returns the list that was passed to the reader."""
        return self._metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills every tensor of the plan.

        Raises:
            RecordError: the plan contains something other than tensors, or a file contradicts the list.
        """
        items = sorted(plan.items, key=lambda item: (self._place(item).relative_path, self._place(item).offset))
        for name, of_file in groupby(items, key=lambda item: self._place(item).relative_path):
            path = self._folder / name
            if not path.is_file():
                raise RecordError(f"{name}: must be a regular file, is not")
            with path.open("rb") as file:
                for item in of_file:
                    self._fill(item, planner, file)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    def _fill(self, item: ReadItem, planner: LoadPlanner, file: Any) -> None:
        index, place = item.storage_index, self._place(item)
        stored = self._metadata.state_dict_metadata.get(index.fqn)
        if item.type is not LoadItemType.TENSOR or not isinstance(stored, TensorStorageMetadata):
            raise RecordError(f"{shown(index.fqn)}: must be a tensor, is none")
        shape = _chunk_shape(stored, index)
        try:
            values = read_tensor(file, place.offset, place.length, shape, stored.properties.dtype)
        except RecordError as error:
            raise RecordError(f"{place.relative_path}: {shown(index.fqn)}: {error}") from error
        for dimension, (first, count) in enumerate(zip(item.storage_offsets, item.lengths, strict=True)):
            values = values.narrow(dimension, first, count)
        target = planner.resolve_tensor(item).detach()
        if target.shape != values.shape:
            raise RecordError(f"{shown(index.fqn)}: must fill shape {tuple(target.shape)}, has {tuple(values.shape)}")
        target.copy_(values)
        planner.commit_tensor(item, target)

    def _place(self, item: ReadItem) -> ChunkLocation:
        index: MetadataIndex = item.storage_index
        place = self._metadata.storage_data.get(index)
        if not isinstance(place, ChunkLocation):
            raise RecordError(f"{shown(index.fqn)}: must have a place, has none")
        return place


def _chunk_shape(stored: TensorStorageMetadata, index: MetadataIndex) -> torch.Size:
    # `index.index`, if set, is the position at which DCP found the chunk in the list.
    chunks = stored.chunks if index.index is None else stored.chunks[index.index :]
    return next(chunk.sizes for chunk in chunks if chunk.offsets == index.offset)


class SyncedWriter(FileSystemWriter):
    """A writer of one synced file per rank, which reports the system's error if it cannot write."""

    def __init__(self, folder: Path, files: RankFiles) -> None:
        """Opens nothing yet.

        Args:
            files: of this rank. In a large job its file is in the subfolder of its node.
        """
        super().__init__(folder, sync_files=True, per_thread_copy_ahead=0)
        self._folder = folder
        self._files = files

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes every tensor of the plan.

        Raises:
            OSError: the disk is full, for example. torch replaces this error by one about positions in the file if
                writing fails in the middle of a tensor, and DCP sends an exception to other ranks without its context.
        """
        try:
            return self._write(plan, planner)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
            raise cause from None

    def _write(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        if not self._files.subfolder:
            return super().write_data(plan, planner)
        folder = self._files.make_folder(self._folder)
        # DCP puts the prefix before the file's name, and records the result as the place of each tensor.
        prefix = f"{self._files.subfolder}/{plan.storage_data.prefix}"
        plan = replace(plan, storage_data=replace(plan.storage_data, prefix=prefix))
        written = super().write_data(plan, planner)
        sync(folder)
        return written


def sync(path: Path) -> None:
    """Waits until a file, or a folder's list of files, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
