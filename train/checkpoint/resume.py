"""The checkpoint that a job goes on from, as all its ranks find it together."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

from torch import distributed as dist

from data.progress import Quiet, progress_on
from train.checkpoint.digests import file_problem
from train.checkpoint.manifest import MANIFEST_NAME, CheckpointError, differences, layout_record, read_manifest
from train.checkpoint.verify import Check, find_resumed, listed_files, shown_files
from train.config import TrainConfig

Found = TypeVar("Found")


def choose_resumed(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Puts the checkpoint that is resumed from in place of what `resume` names. Every rank calls it at the same point.

    Rank 0 looks for checkpoints, as machines may not see the same ones at once; all ranks read them.

    Args:
        config: of the run.

    Returns:
        The configuration, and a line for each newer checkpoint that is not whole: which, and why.

    Raises:
        CheckpointError: on every rank, where none is whole, or the one that is named is not.
    """
    if config.resume is None:
        return config, ()
    found = find_together(partial(find_resumed, config.resume))
    return replace(config, resume=str(found.folder)), found.passed_over


def find_together(find: Callable[[Check], Found]) -> Found:
    """What the first rank finds among checkpoints, each of which all ranks read a part of. All call it.

    Args:
        find: looks for one; what it is given tells what is wrong with one. Called on rank 0 alone.

    Raises:
        CheckpointError: on every rank, what `find` raised.
    """
    found: list[Found | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            found = [find(_lead)]
        except CheckpointError as error:
            found = [error]
        _tell(None)
    else:
        while (folder := _tell(None)) is not None:
            verify_together(folder)
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], CheckpointError):
        raise found[0]
    return cast(Found, found[0])


def other_layout(config: TrainConfig) -> str:
    """What of the layout differs from the one that wrote the checkpoint, as words to add; empty where nothing does."""
    assert config.resume is not None
    written = read_manifest(Path(config.resume)).get("layout")
    changed = differences("layout", written, layout_record(config))
    return f", written under another layout: {'; '.join(changed)}" if changed else ""


def verify_together(folder: Path) -> str:
    """Returns what `verify` finds, with every file read by one rank; all ranks call it with the same folder."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    if not (folder / MANIFEST_NAME).is_file():
        problem = f"{MANIFEST_NAME} must be there, is missing: it was never finished"
    else:
        files, problem = listed_files(folder)
        mine = {name: files[name] for name in sorted(files)[rank::world_size]}
        # Ranks share the work evenly: the first one's part tells how far all are.
        names = shown_files(folder, mine, progress_on() if rank == 0 else Quiet())
        found = (file_problem(folder, name, mine[name], hashes=True) for name in names)
        problem = problem or next((each for each in found if each), "")
    said = [""] * world_size
    dist.all_gather_object(said, problem)
    return next((each for each in said if each), "")


def _lead(folder: Path) -> str:
    _tell(folder)
    return verify_together(folder)


def _tell(folder: Path | None) -> Path | None:
    """What rank 0 says."""
    told = [folder]
    dist.broadcast_object_list(told, src=0)
    return told[0]
