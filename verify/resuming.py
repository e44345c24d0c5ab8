"""Checks checkpoints: one is written, damaged, refused by name, and resumed under another layout."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from torch import distributed as dist

from comm.agreement import broadcast_first
from model.transformer import named_tensors
from train.checkpoint.load import load, run_on_all, verify_together
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.save import CheckpointSaver
from train.config import TrainConfig
from verify.checks import Failure, Findings, Verification
from verify.equality import COMPARED_STEPS, tolerance_of
from verify.layouts import OPTIMIZER
from verify.runs import PlainRuns, corpus_of, loader_of, loss_names, opened_learner
from verify.steps import rank_differences, run_step, tensor_differences

FOLDER = "checkpoint_check"


def check_checkpoint(verification: Verification) -> Findings:
    """Saves a run of the configured layout and optimizer, damages it, and continues in another layout."""
    saved = next(trial.config for trial in verification.trials if trial.name == OPTIMIZER)
    resumed = _other_layout(saved)
    root = verification.folder / FOLDER
    if dist.get_rank() == 0:
        shutil.rmtree(root, ignore_errors=True)  # of an earlier verification that found something
        root.mkdir()
    saved = replace(saved, out_dir=str(root))
    with opened_learner(verification, saved) as learner:
        loader = loader_of(saved)
        for step in range(COMPARED_STEPS):
            run_step(learner, saved, loader, step)
        saver = CheckpointSaver(saved, learner, corpus_of(saved))
        saver.save(COMPARED_STEPS)
        folder = broadcast_first(saver.close())
    assert folder is not None
    problem = _refusal(folder)
    if problem:
        return _findings([_failure(_file_in(problem), problem, "the file system, or another process, changed a file")])
    with _damaged(folder) as name:
        problem = _refusal(folder)
    if name not in problem:
        difference = "a checkpoint with one wrong byte in it is accepted"
        return _findings([_failure(name, difference, "files are not compared with the hashes of the manifest")])
    expected = PlainRuns(verification.device).of(saved, COMPARED_STEPS + 1)
    with opened_learner(verification, resumed) as learner:
        load(learner, folder)
        held = {name: weight.cpu() for name, weight in named_tensors(learner.replica.model).items()}
        differing = list(tensor_differences("weight", held, expected.steps[-2].weights, tolerance_of(saved)))
        values = run_step(learner, resumed, loader_of(resumed), COMPARED_STEPS).on_host()
    # Weights that are wrong as loaded explain all that differs in the step after them.
    differing = differing or list(rank_differences(values, expected.steps[-1], loss_names(saved), tolerance_of(saved)))
    where = f"after a resume in {resumed.parallelism.axes()}"
    cause = "a part of the state is not saved, or is given to another rank"
    failures = [one.failure(dist.get_rank(), where, cause) for one in differing[:2]]
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(root)
    return _findings(failures, "the same" if resumed.parallelism == saved.parallelism else "another")


def _findings(failures: list[Failure], which: str = "another") -> Findings:
    summary = f"a checkpoint is written, refused with one wrong byte, and resumed in {which} layout with equal values"
    return Findings(summary=summary, failures=failures)


def _failure(subject: str, difference: str, cause: str) -> Failure:
    return Failure(rank=0, subject=subject, difference=difference, cause=cause)


def _refusal(folder: Path) -> str:
    """Returns why a checkpoint is refused, on rank 0 alone; empty if it is whole. All ranks call it."""
    try:
        verify_together(folder)
    except CheckpointError as error:
        return str(error)
    return ""


def _file_in(problem: str) -> str:
    return f"checkpoint file {problem.split()[0]}"


@contextmanager
def _damaged(folder: Path) -> Iterator[str]:
    """Changes one byte of the largest file on rank 0, yields the file's name, and restores the byte."""
    path = max((path for path in folder.rglob("*.safetensors")), key=lambda path: (path.stat().st_size, path.name))
    path = broadcast_first(path)
    is_writer = dist.get_rank() == 0
    place = path.stat().st_size // 2

    def flip() -> None:
        if is_writer:
            with path.open("r+b") as file:
                file.seek(place)
                byte = file.read(1)[0]
                file.seek(place)
                file.write(bytes([byte ^ 1]))

    run_on_all(flip)
    yield path.relative_to(folder).as_posix()
    run_on_all(flip)


def _other_layout(config: TrainConfig) -> TrainConfig:
    """Returns the same run with a data axis alone, or with two pipeline ranks if it is that."""
    mesh = config.parallelism
    world = mesh.world_size
    schedule = replace(config.schedule, kind="1f1b", chunks=None, slices=1)
    pipeline = 2 if mesh.data == world and world % 2 == 0 else 1
    other = replace(mesh, pipeline=pipeline, data=world // pipeline, expert=1, context=1)
    return replace(config, parallelism=other, schedule=schedule)
