"""Finds and verifies checkpoints on all ranks of a job together."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from torch import distributed as dist

from comm.agreement import exchange_reports
from data.progress import NoProgress, progress_on
from train.checkpoint.locate import LocatedCheckpoint, locate
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.verify import Check, check_file, listed_files, progress_over
from train.config import TrainConfig

T = TypeVar("T")


def resolve_resume(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Replaces `resume` by the checkpoint to resume from. All ranks call it at the same point.

    Rank 0 searches for checkpoints, because machines may see different ones on a shared file system. All ranks verify
    them.

    Returns:
        The configuration, and a line with name and reason for each newer checkpoint that is not whole.

    Raises:
        CheckpointError: on every rank, if no checkpoint is whole, or the named one is not.
    """
    if config.resume is None:
        return config, ()
    found = find_together(partial(_locate_checked, config.resume))
    return replace(config, resume=str(found.folder)), found.rejected


def find_together(find: Callable[[Check], T]) -> T:
    """Searches for a checkpoint on rank 0, while all ranks verify the candidates. All ranks call it.

    Args:
        find: searches with the given check. Only rank 0 calls it.

    Returns:
        The result of `find`, on every rank.

    Raises:
        CheckpointError: on every rank, if `find` raised it.
    """
    found: list[T | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find(_verify_from_rank_0)]
        except CheckpointError as error:
            found = [CheckpointError(str(error))]
        _broadcast(None)
    else:
        while (folder := _broadcast(None)) is not None:
            with suppress(CheckpointError):  # rank 0 decides
                verify_together(folder)
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return cast(T, found[0])


def verify_together(folder: Path) -> None:
    """Verifies a checkpoint. Each file is read by one rank. All ranks call it with the same folder.

    Raises:
        CheckpointError: on every rank, if the checkpoint is not whole.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problem: str | None = None
    try:
        files = listed_files(folder)
        mine = {name: files[name] for name in sorted(files)[rank::world_size]}
        # The work is divided evenly, so rank 0's part shows the progress of all.
        for name in progress_over(folder, mine, progress_on() if rank == 0 else NoProgress()):
            check_file(folder, name, mine[name], hashes=True)
    except CheckpointError as error:
        problem = str(error)
    if text := exchange_reports(problem).first_text:
        raise CheckpointError(text)


def _locate_checked(path: str, check: Check) -> LocatedCheckpoint:
    return locate(path, check=check)


def _verify_from_rank_0(folder: Path) -> None:
    _broadcast(folder)
    verify_together(folder)


def _broadcast(folder: Path | None) -> Path | None:
    """Returns on every rank the folder that rank 0 passes."""
    passed = [folder]
    dist.broadcast_object_list(passed, src=0)
    return passed[0]
