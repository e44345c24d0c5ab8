"""Writes checkpoints in the background of the next steps.

A step waits only while its state is copied to host memory. A checkpoint is written under a temporary name. Every file
is synced, hashed and listed in the manifest. When all ranks are done, rank 0 renames the folder. The next save removes
unfinished checkpoints. The last checkpoint is saved elsewhere if the run's folder takes none.
"""

import ctypes
import os
import shutil
from collections import deque
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path, PurePosixPath
from threading import Thread
from typing import TYPE_CHECKING, Any, NoReturn

from torch import distributed as dist

from base.files import sync, write_synced
from comm.agreement import gather_on_first
from comm.groups import make_host_group
from data.shards.open import Prepared
from dualpipe.ir import to_json
from train.checkpoint.index import INDEX_NAME, PART_SUFFIX, ROTARY_PREFIX, Index, index_json, merge
from train.checkpoint.load import PartError, run_on_all
from train.checkpoint.locate import CHECKPOINTS_NAME, checkpoints_in, is_whole, rescue_folder, step_folder, verify_sizes
from train.checkpoint.manifest import SCHEDULE_NAME, TOKENIZER_NAME, Digest, ramp_schedule_name, write_manifest
from train.checkpoint.parts import HostCopy, State, as_slice, index_of, state_of, write_part
from train.checkpoint.preserved import NOTHING, preserved_by_run
from train.config import TrainConfig
from train.errors import RescuedError, UnsavedError
from train.files.json_lines import try_append_event
from train.files.run_lock import OwnershipCheck, RunLock

if TYPE_CHECKING:
    from train.core.learner import Learner

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2

# One rank may finish long before another whose disk is slow. That is not a hang; the watchdog detects hangs.
_LONGEST_WRITE = timedelta(hours=6)


class CheckpointSaver:
    """A writer of checkpoints, one at a time, with its own thread and process group.

    All ranks make every call except `take_finished` at the same point of the run.
    """

    def __init__(
        self,
        config: TrainConfig,
        learner: "Learner",
        prepared: Prepared,
        folder: Path | None = None,
        ownership: OwnershipCheck | None = None,
    ) -> None:
        """Opens a process group. All ranks call it at the same point.

        `ownership` checks that the run still owns `folder`, by default its own.
        """
        self._config = config
        self._learner = learner
        self._prepared = prepared
        self._root = (folder or Path(config.out_dir)) / CHECKPOINTS_NAME
        self._ownership = ownership
        self._had_folder = self._root.parent.is_dir()
        self._is_closed = False
        self._rank = dist.get_rank()
        # The steps run collectives at the same time, so checkpoints need a separate group.
        self._group = make_host_group(_LONGEST_WRITE)
        self._preserved = preserved_by_run(config, prepared.tokenizer) if self._rank == 0 else NOTHING
        self._memory = HostCopy()
        self._thread: Thread | None = None
        self._error: Exception | None = None
        self._last: Path | None = None
        self._unreported: deque[Path] = deque()

    def save(self, step: int) -> None:
        """Waits for the previous checkpoint, copies the state after `step` updates, and starts to write.

        Raises UnsavedError on every rank if one of them could not write its part of the previous checkpoint.
        """
        self.wait()
        copied = self._memory.of(state_of(self._learner, self._learner.extras))
        copied |= {ROTARY_PREFIX + name: values for name, values in self._preserved.rotary.items()}
        self._thread = Thread(target=self._run, args=(step, copied), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> Path | None:
        """Waits for the checkpoint that is being written, and returns the last complete one; raises as `save`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error = self._error
            self._error = None
            raise error
        return self._last

    def take_finished(self) -> list[Path]:
        """Returns the checkpoints that were completed since the last call. It does not wait."""
        return [self._unreported.popleft() for _ in range(len(self._unreported))]

    def close(self) -> Path | None:
        """Waits like `wait`, then closes the process group. Further calls do nothing."""
        if self._is_closed:
            return self._last
        self._is_closed = True
        try:
            return self.wait()
        finally:
            self._memory = HostCopy()
            dist.destroy_process_group(self._group)

    def _run(self, step: int, copied: State) -> None:
        try:
            folder = self._write(step, copied)
        except Exception as error:
            self._error = error
        else:
            self._last = folder
            self._unreported.append(folder)

    def _write(self, step: int, copied: State) -> Path:
        final = step_folder(self._root.parent, step)
        partial = final.with_name(final.name + ".partial")
        try:
            run_on_all(lambda: self._begin(partial), self._group)
            index, files = self._write_parts(partial, copied)
            run_on_all(lambda: self._finish(partial, final, step, index, files), self._group)
        except PartError as failure:
            # If the folder was deleted or taken over meanwhile, any write fails. The error names that cause.
            lost = lost_folder(self._ownership, self._group)
            if self._rank == 0 and not lost:
                shutil.rmtree(partial, ignore_errors=True)
            raise UnsavedError(lost or f"{partial}: cannot be written by {failure}") from failure
        return final

    def _begin(self, partial: Path) -> None:
        if self._rank == 0:
            self._check_ownership()
            # A run's folder that was deleted is not created again.
            self._root.mkdir(exist_ok=True, parents=not self._had_folder)
            for leftover in self._root.glob("*.partial"):
                if leftover.is_symlink():
                    leftover.unlink()
                else:
                    shutil.rmtree(leftover)
            partial.mkdir()

    def _check_ownership(self) -> None:
        problem = "" if self._ownership is None else self._ownership.problem(is_urgent=True)
        if problem:
            raise OSError(problem)

    def _write_parts(self, partial: Path, copied: State) -> tuple[Index, dict[str, Digest]]:
        """Writes each slice once, one file for each rank; rank 0 returns the index and the files by name."""
        files = self._learner.world.files
        file = str(PurePosixPath(files.subfolder) / f"{files.stem}{PART_SUFFIX}")
        local_index = index_of(copied, file)
        listed = gather_on_first((file, local_index), self._group)
        merged = run_on_all(lambda: merge(local_index for _, local_index in listed or ()), self._group)
        chosen = self._scatter_names(None if listed is None else [file for file, _ in listed], merged)

        def write() -> tuple[dict[str, Digest], Index]:
            if not chosen:
                return {}, {}
            if files.subfolder:
                files.make_folder(partial)
            chosen_index = {name: local_index[name] for name in chosen}
            digest, written = write_part(partial, file, chosen_index, lambda name: as_slice(copied[name]).local)
            if files.subfolder:
                sync(files.folder(partial))
            return {file: digest}, written

        written = gather_on_first(run_on_all(write, self._group), self._group) or []
        index = run_on_all(lambda: merge(index for _, index in written), self._group)
        return index, {file: digest for digests, _ in written for file, digest in digests.items()}

    def _scatter_names(self, files: list[str] | None, index: Index) -> list[str]:
        """Returns the names of the tensors that this rank writes; rank 0 passes the file of each rank."""
        names: dict[str, list[str]] = {}
        for name, entry in index.items():
            for part in entry.parts:
                names.setdefault(part.file, []).append(name)
        received: list[Any] = [None]
        of_ranks = None if files is None else [names.get(file, []) for file in files]
        dist.scatter_object_list(received, of_ranks, src=dist.get_global_rank(self._group, 0), group=self._group)
        return list(received[0])

    def _finish(self, partial: Path, final: Path, step: int, index: Index, files: dict[str, Digest]) -> None:
        """Completes the folder and renames it. Only rank 0 does so, after all ranks have written their files."""
        if self._rank != 0:
            return
        self._check_ownership()
        schedules = {ramp_schedule_name(size): schedule for size, schedule in self._learner.ramp.items()}
        schedules[SCHEDULE_NAME] = self._learner.replica.schedule
        contents = {name: f"{to_json(schedule)}\n".encode() for name, schedule in schedules.items()}
        for name, content in {INDEX_NAME: index_json(index).encode(), **contents, **self._preserved.files}.items():
            write_synced(partial / name, content)
        for path in self._prepared.tokenizer.save(partial / TOKENIZER_NAME):
            sync(path)
        config = self._config
        keys = self._preserved.config
        write_manifest(partial, step, config, self._prepared.fingerprint, files, keys, self._learner.replica.cut)
        sync(partial)
        replace_folder(partial, final)
        sync(self._root)
        if config.checkpointing.keep is not None:
            _remove_older(final, config.checkpointing.keep)


def lost_folder(ownership: OwnershipCheck | None, group: dist.ProcessGroup) -> str:
    """Returns on every rank why rank 0 no longer owns the run's folder, or an empty text if it does."""
    problem = [ownership.problem(is_urgent=True) if ownership is not None and dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(problem, src=0, group=group)
    return problem[0]


def _remove_older(newest: Path, num_kept: int) -> None:
    """Removes the oldest whole checkpoints beyond the number to keep. The newest must be complete.

    A checkpoint that is not whole does not count and is kept for inspection.
    """
    before = [folder for folder in checkpoints_in(newest.parent) if folder.name < newest.name]
    whole_checkpoints = [folder for folder in before if is_whole(folder, verify_sizes)]
    for folder in whole_checkpoints[: max(len(whole_checkpoints) - (num_kept - 1), 0)]:
        gone = folder.with_name(folder.name + ".partial")
        os.replace(folder, gone)
        shutil.rmtree(gone)


def replace_folder(made: Path, place: Path) -> None:
    """Gives a folder its final name, and removes the folder that had this name before.

    Local file systems of Linux exchange both names atomically. On others, the name does not exist for a moment.
    """
    if not place.exists():
        os.replace(made, place)
        return
    if _exchange(made, place):
        shutil.rmtree(made)
        return
    before = place.with_name(f"{place.name}.replaced.partial")
    os.replace(place, before)
    os.replace(made, place)
    shutil.rmtree(before)


def _exchange(one: Path, other: Path) -> bool:
    """Exchanges two names atomically; returns whether that was possible."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # another system
        return False
    return int(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE)) == 0


def save_to_rescue_folder(
    config: TrainConfig, learner: "Learner", prepared: Prepared, step: int, reason: str
) -> NoReturn:
    """Saves the state after `step` updates in the rescue folder, and ends the run. All ranks call it.

    It always raises RescuedError, with `reason`, the folder of the state and how to resume from it.
    """
    folder = rescue_folder(config)
    if step == 0:
        raise RescuedError(f"{reason}; no step was done yet, so there is nothing to save")
    with ExitStack() as stack:
        problem = [_lock_folder(folder, stack) if learner.world.groups.rank == 0 else ""]
        dist.broadcast_object_list(problem, src=0, group=learner.world.groups.world)
        if problem[0]:
            raise RescuedError(f"{reason}; {_describe_loss(folder, problem[0])}")
        saver = CheckpointSaver(config, learner, prepared, folder=folder)
        try:
            saver.save(step)
            saver.close()
        except UnsavedError as error:
            raise RescuedError(f"{reason}; {_describe_loss(folder, str(error))}") from error
    text = (
        f"{reason}; the state after step {step} is saved in {folder}; to continue, use resume={folder} with another "
        f"out_dir"
    )
    if learner.world.groups.rank == 0:
        try_append_event(folder, "rescued", step, text)
        try_append_event(Path(config.out_dir), "rescued", step, text)
    raise RescuedError(text)


def _lock_folder(folder: Path, stack: ExitStack) -> str:
    """Creates and locks the folder; returns an error message, or an empty text."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(RunLock(folder, lambda line: None))
    except (OSError, ValueError) as error:
        return str(error)
    return ""


def _describe_loss(folder: Path, problem: str) -> str:
    return (
        f"it cannot be saved in {folder} either ({problem}): steps since the last whole checkpoint are lost; nearest "
        f"valid: rescue_dir=PATH on another disk"
    )
