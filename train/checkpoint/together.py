"""Checkpoints that all ranks of a job look for, read and verify together."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from torch import distributed as dist

from data.progress import NoProgress, progress_on
from train.checkpoint.locate import LocatedCheckpoint, locate
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.verify import Check, check_file, listed_files, progress_over
from train.config import TrainConfig

T = TypeVar("T")


def resolve_resume(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Replaces what `resume` names by the checkpoint to resume from. Every rank calls it at the same point.

    Rank 0 looks for checkpoints, because machines may not see the same ones at once. All ranks read them.

    Args:
        config: of the run.

    Returns:
        The configuration, and a line for each newer checkpoint that is not whole: which, and why.

    Raises:
        CheckpointError: on every rank, if none is whole, or the one that is named is not.
    """
    if config.resume is None:
        return config, ()
    found = find_together(partial(_locate_checked, config.resume))
    return replace(config, resume=str(found.folder)), found.rejected


def find_together(find: Callable[[Check], T]) -> T:
    """Returns what rank 0 finds among checkpoints, each of which all ranks verify a part of. Every rank calls it.

    Args:
        find: looks for one with the check that it gets. Called on rank 0 alone.

    Raises:
        CheckpointError: on every rank, what `find` raised.
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
    """Verifies a checkpoint with every file read by one rank. Every rank calls it with the same folder.

    Raises:
        CheckpointError: on every rank, what `verify` raises.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    problem = ""
    try:
        files = listed_files(folder)
        mine = {name: files[name] for name in sorted(files)[rank::world_size]}
        # Ranks share the work evenly: the first one's part shows how far all are.
        for name in progress_over(folder, mine, progress_on() if rank == 0 else NoProgress()):
            check_file(folder, name, mine[name], hashes=True)
    except CheckpointError as error:
        problem = str(error)
    seen = [""] * world_size
    dist.all_gather_object(seen, problem)
    if first := next((each for each in seen if each), ""):
        raise CheckpointError(first)


def _locate_checked(path: str, check: Check) -> LocatedCheckpoint:
    return locate(path, check=check)


def _verify_from_rank_0(folder: Path) -> None:
    _broadcast(folder)
    verify_together(folder)


def _broadcast(folder: Path | None) -> Path | None:
    """Returns what rank 0 passes."""
    passed = [folder]
    dist.broadcast_object_list(passed, src=0)
    return passed[0]
