"""Evaluates trained weights on tasks: `python -m launch.evaluate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from infer.evaluate.answers import Answerer
from infer.evaluate.folder import EvaluationFolder
from infer.evaluate.run import OpenTask, Write, run_tasks
from launch.config.errors import system_errors
from launch.evaluation.checkpoint import describe_checkpoint
from launch.evaluation.comparison import check_compared
from launch.evaluation.outcome import write_outcome
from launch.evaluation.ranks import Done, check_placement, evaluate_as_rank, evaluate_on_local_ranks
from launch.evaluation.request import EvaluationJob, identity, read_job
from launch.generation.ranks import local_cluster
from launch.generation.source import load_model
from launch.help.command import command
from launch.help.preview import plain_text
from launch.ranks.environment import apply_rank_environment, is_other_rank, is_torchrun
from train.config.decode import encode


def main(overrides: Sequence[str]) -> int:
    """Evaluates, and writes records and results into a folder.

    All user errors are reported before weights are read.
    """
    job = read_job(overrides)
    with system_errors():
        tasks = job.open_tasks()
        try:
            if job.config.compare is not None:
                check_compared(job.config.compare, tasks)
            _evaluate(job, tasks)
        finally:
            for each in tasks:
                each.task.close()
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML."""
    job = read_job(overrides)
    with system_errors():
        for each in job.open_tasks():
            each.task.close()
    return plain_text("evaluate", {**encode(job.config), **encode(job.tasks)})


def _evaluate(job: EvaluationJob, tasks: Sequence[OpenTask]) -> None:
    """Evaluates in a folder, or says that it is complete. Only rank 0 of torchrun writes there."""
    placement = check_placement(job) if job.config.parallelism.world_size > 1 else None
    if placement is not None and is_torchrun(os.environ):
        apply_rank_environment(local_cluster(job.config.device, job.config.parallelism.world_size))
        if is_other_rank(os.environ):
            evaluate_as_rank(job, placement, None, lambda name, records: None)
            return
    checkpoint = describe_checkpoint(job.source)
    path = Path(job.config.out).expanduser()
    with EvaluationFolder(path, identity(job, checkpoint)) as folder:
        if folder.is_complete and not is_torchrun(os.environ):
            print(f"{path} is complete; nothing is evaluated", file=sys.stderr, flush=True)
            return
        records = {each.name: folder.read(each.name) for each in tasks}
        done = {name: {record["id"] for record in found} for name, found in records.items()}

        def write(name: str, fresh: list[dict[str, Any]]) -> None:
            folder.append(name, fresh)
            records[name].extend(fresh)

        if placement is None:
            _evaluate_here(job, tasks, done, write)
        elif is_torchrun(os.environ):
            evaluate_as_rank(job, placement, done, write)
        else:
            evaluate_on_local_ranks(job, placement, done, write)
        print(write_outcome(job, tasks, records, checkpoint, folder), flush=True)


def _evaluate_here(job: EvaluationJob, tasks: Sequence[OpenTask], done: Done, write: Write) -> None:
    """Evaluates with the whole model in this process."""
    threads = os.environ.get("OMP_NUM_THREADS")
    apply_rank_environment(local_cluster(job.config.device, 1))
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    model = load_model(job.source, job.source.resolve(job.config.dtype), job.config.device)
    from infer.evaluate.local import LocalModel

    assert job.source.tokenizer is not None
    local = LocalModel(model, job.config.batch_size)
    answerer = Answerer(local, job.source.tokenizer, job.source.end_ids, job.source.model.max_position_tokens)
    run_tasks(tasks, answerer, done, write)


if __name__ == "__main__":
    sys.exit(command("evaluate", main, preview, quiet=is_other_rank(os.environ)))
