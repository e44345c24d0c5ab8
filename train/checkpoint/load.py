"""Finds, verifies and loads checkpoints on all ranks together. If one rank fails, all do."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from torch import distributed as dist

from comm.agreement import exchange_reports
from comm.dispatch.local import LocalDispatcher
from data.progress import NO_PROGRESS
from model.config import Computing, ModelConfig, Products
from model.transformer import Transformer, named_tensors
from train.checkpoint.index import Index, WeightsKind, read_index
from train.checkpoint.locate import Check, locate, verify
from train.checkpoint.manifest import CheckpointError, read_model
from train.checkpoint.parts import Extras, PartReader, state_of
from train.checkpoint.sources import CheckpointReader
from train.config import TrainConfig
from train.terminal import progress_on

if TYPE_CHECKING:
    from train.core.learner import Learner

ValueT = TypeVar("ValueT")
_LONGEST_TEXT = 300


class PartError(RuntimeError):
    """Ranks could not save or load their part. Raised on every rank; it says which ranks and why."""


def run_on_all(act: Callable[[], ValueT], group: dist.ProcessGroup | None = None) -> ValueT:
    """Calls a function on each rank of `group`, and returns its result if no rank failed.

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
        raise PartError(f"{reports.name_ranks()}: {reports.first_text}") from problem
    return results[0]


def _first_line(error: BaseException) -> str:
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__)[:_LONGEST_TEXT]


def resolve_resume(config: TrainConfig) -> tuple[TrainConfig, tuple[str, ...]]:
    """Replaces `resume` by the checkpoint to resume from. All ranks call it at the same point.

    Rank 0 searches for checkpoints, because machines may see different ones on a shared file system. All ranks verify
    them.

    Also returns a line with name and reason for each newer checkpoint that is not whole.
    """
    path = config.resume
    if path is None:
        return config, ()
    located = find_together(lambda check: locate(path, check=check))
    return replace(config, resume=str(located.folder)), located.rejected


def find_together(find: Callable[[Check], ValueT]) -> ValueT:
    """Runs `find` on rank 0 with a check in which all ranks verify. All ranks call it."""
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
    """Verifies a checkpoint on all ranks together: each file is read by one, and all raise the same error."""
    rank = dist.get_rank()
    problem: str | None = None
    try:
        # The work is divided evenly, so rank 0's part shows the progress of all.
        progress = progress_on() if rank == 0 else NO_PROGRESS
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


def load(learner: "Learner", folder: Path) -> None:
    """Fills weights, router bias and optimizer state from a checkpoint of any layout. All ranks call it.

    Each rank reads the index, and the elements that it holds, by itself. Further state is filled if the checkpoint
    holds it.
    """
    try:
        index = run_on_all(lambda: read_index(folder, read_model(folder)))
        extras = _stored_extras(folder, learner, index)
        run_on_all(lambda: PartReader(folder, index).fill(state_of(learner, extras)))
    except PartError as failure:
        raise CheckpointError(f"resume: {folder}: cannot be read by {failure}") from failure
    learner.optimizer.loaded()
    for extra in extras.values():
        extra.loaded()
    if learner.ema is not None and "ema" not in extras:
        learner.ema.follow_weights()


def _stored_extras(folder: Path, learner: "Learner", index: Index) -> Extras:
    prefixes = {name.partition(".")[0] for name in index}
    stored: Extras = {prefix: extra for prefix, extra in learner.extras.items() if prefix in prefixes}
    if "reference" in learner.extras and "reference" not in stored:
        raise CheckpointError(
            f"resume: {folder} must hold the reference of the run's task, is a checkpoint of a task without one; "
            f"nearest valid: init_from={folder}, which starts a run from its weights"
        )
    return stored


def load_whole(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    key: str = "resume",
    kind: WeightsKind = "trained",
    *,
    products: Products = "own",
) -> Transformer:
    """Loads the whole model of a checkpoint of any layout in this process alone.

    Raises CheckpointError if there is no average or a file is missing, truncated or of another form.
    """
    reader = CheckpointReader(folder, key, kind)  # checks the sizes before memory is allocated
    model = Transformer(
        config, LocalDispatcher(config.num_routed_experts), dtype, computing=Computing(products=products)
    )
    reader.fill(named_tensors(model))
    return model
