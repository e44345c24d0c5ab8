"""Acts on checkpoints on all ranks of a job together: a failure of one rank becomes an error of all."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TypeVar, cast

from torch import distributed as dist

from comm.agreement import Reports, exchange_reports
from data.progress import NoProgress, progress_on
from train.checkpoint.locate import locate
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.verify import Check, verify
from train.config import TrainConfig

ValueT = TypeVar("ValueT")
_LONGEST_TEXT = 300


class PartError(RuntimeError):
    """Ranks could not save or load their part. Raised on every rank; `reports` says which ranks and why."""

    def __init__(self, reports: Reports) -> None:
        super().__init__(f"{reports.name_ranks()}: {reports.first_text}")
        self.reports = reports


def run_on_all(act: Callable[[], ValueT], group: dist.ProcessGroup | None = None) -> ValueT:
    """Calls a function on each rank, and returns its result if no rank failed. All ranks call it.

    Args:
        group: process group of all ranks; the world by default.

    Raises:
        PartError: on every rank, if the function raised an exception on one of them.
    """
    results: list[ValueT] = []
    problem: Exception | None = None
    try:
        results.append(act())
    except Exception as error:
        problem = error
    reports = exchange_reports(None if problem is None else _first_line(problem), group)
    if reports.total:
        raise PartError(reports) from problem
    return results[0]


def _first_line(error: BaseException) -> str:
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:_LONGEST_TEXT]


def resolve_resume(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Replaces `resume` by the checkpoint to resume from. All ranks call it at the same point.

    Rank 0 searches for checkpoints, because machines may see different ones on a shared file system. All ranks verify
    them.

    Returns:
        The configuration, and a line with name and reason for each newer checkpoint that is not whole.

    Raises:
        CheckpointError: on every rank, if no checkpoint is whole, or the named one is not.
    """
    path = config.resume
    if path is None:
        return config, ()
    located = find_together(lambda check: locate(path, check=check))
    return replace(config, resume=str(located.folder)), located.rejected


def find_together(find: Callable[[Check], ValueT]) -> ValueT:
    """Searches for a checkpoint on rank 0, while all ranks verify the candidates. All ranks call it.

    Args:
        find: searches with the given check. Only rank 0 calls it.

    Returns:
        The result of `find`, on every rank.

    Raises:
        CheckpointError: on every rank, if `find` raised it.
    """
    result: list[ValueT | CheckpointError | None] = [None]
    if dist.get_rank() == 0:
        try:
            result = [find(_verify_from_rank_0)]
        except CheckpointError as error:
            result = [CheckpointError(str(error))]
        _broadcast(None)
    else:
        while (folder := _broadcast(None)) is not None:
            with suppress(CheckpointError):  # rank 0 decides
                verify_together(folder)
    dist.broadcast_object_list(result, src=0)
    if isinstance(result[0], CheckpointError):
        raise result[0]
    return cast(ValueT, result[0])


def verify_together(folder: Path) -> None:
    """Verifies a checkpoint. Each file is read by one rank. All ranks call it with the same folder.

    Raises:
        CheckpointError: on every rank, if the checkpoint is not whole.
    """
    rank = dist.get_rank()
    problem: str | None = None
    try:
        # The work is divided evenly, so rank 0's part shows the progress of all.
        progress = progress_on() if rank == 0 else NoProgress()
        verify(folder, progress=progress, share=(rank, dist.get_world_size()))
    except CheckpointError as error:
        problem = str(error)
    if text := exchange_reports(problem).first_text:
        raise CheckpointError(text)


def _verify_from_rank_0(folder: Path) -> None:
    _broadcast(folder)
    verify_together(folder)


def _broadcast(folder: Path | None) -> Path | None:
    """Returns on every rank the folder that rank 0 passes."""
    passed = [folder]
    dist.broadcast_object_list(passed, src=0)
    return passed[0]
