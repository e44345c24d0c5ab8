"""Evaluates trained weights on tasks: `python -m launch.evaluate`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from infer.evaluate.answers import Answerer
from infer.evaluate.folder import EvaluationFolder
from infer.evaluate.run import OpenTask, Write, run_tasks
from launch.config.errors import system_errors
from launch.evaluation.outcome import check_compared, write_outcome
from launch.evaluation.request import EvaluationJob, describe_checkpoint, identity, read_job
from launch.help.command import command, plain_text
from launch.job import PRELOADED, load_model, local_cluster, open_ranks
from launch.ranks.environment import apply_rank_environment, is_other_rank, is_torchrun
from launch.ranks.workers import Send, run_on_local_ranks
from train.config import InferenceConfig
from train.config.decode import encode

Done = Mapping[str, Collection[str | int]]
"""The ids of the samples of each task that have a record, and are not evaluated again."""


def main(overrides: Sequence[str]) -> int:
    """Evaluates, and writes records and results. User errors are reported before weights are read."""
    job = read_job(overrides)
    with system_errors():
        tasks = job.open_tasks()
        try:
            if job.config.compare is not None:
                check_compared(job.config.compare, tasks)
            _evaluate(job, tasks)
        finally:
            _close(tasks)
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the command's configuration, checked, as YAML."""
    job = read_job(overrides)
    with system_errors():
        _close(job.open_tasks())
    return plain_text("evaluate", {**encode(job.config), **encode(job.tasks)})


def _close(tasks: Sequence[OpenTask]) -> None:
    for opened in tasks:
        opened.task.close()


def _evaluate(job: EvaluationJob, tasks: Sequence[OpenTask]) -> None:
    """Evaluates in a folder, or reports that it is complete. Only rank 0 of torchrun writes there."""
    network = job.spread()
    if network is not None and is_torchrun(os.environ):
        apply_rank_environment(network.cluster)
        if is_other_rank(os.environ):
            _evaluate_as_rank(job, network, None, lambda name, records: None)
            return
    checkpoint = describe_checkpoint(job.source)
    path = Path(job.config.out).expanduser()
    with EvaluationFolder(path, identity(job, checkpoint)) as folder:
        if folder.is_complete and not is_torchrun(os.environ):
            print(f"{path} is complete; nothing is evaluated", file=sys.stderr, flush=True)
            return
        records = {opened.name: folder.read(opened.name) for opened in tasks}
        done = {name: {record["id"] for record in known} for name, known in records.items()}

        def write(name: str, fresh: list[dict[str, Any]]) -> None:
            folder.append(name, fresh)
            records[name].extend(fresh)

        if network is None:
            _evaluate_here(job, tasks, done, write)
        elif is_torchrun(os.environ):
            _evaluate_as_rank(job, network, done, write)
        else:
            preloaded = [*PRELOADED, "train.evaluation.pipelined", "launch.evaluation.request"]
            function = partial(_evaluate_as_local_rank, job, network, done)
            num_ranks = network.parallelism.world_size
            run_on_local_ranks(function, network.cluster, num_ranks, preloaded, lambda sent: write(*sent))
        print(write_outcome(job, tasks, records, checkpoint, folder), flush=True)


def _evaluate_here(job: EvaluationJob, tasks: Sequence[OpenTask], done: Done, write: Write) -> None:
    """Evaluates with the whole model in this process."""
    threads = os.environ.get("OMP_NUM_THREADS")
    apply_rank_environment(local_cluster(job.config.device, 1))
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = threads
    source = job.source
    model = load_model(source, job.config.dtype, job.config.device)
    from infer.evaluate.local import LocalModel

    local, tokenizer = LocalModel(model, job.config.batch_size), source.needed_tokenizer("tasks")
    answerer = Answerer(local, tokenizer, source.end_ids, source.model.max_position_tokens)
    run_tasks(tasks, answerer, done, write)


def _evaluate_as_local_rank(job: EvaluationJob, network: InferenceConfig, done: Done, send: Send) -> None:
    _evaluate_as_rank(job, network, done, lambda *record: send(record))


def _evaluate_as_rank(job: EvaluationJob, network: InferenceConfig, done: Done | None, write: Write) -> None:
    """Evaluates as one rank of the job. `done` and `write` of rank 0 are used."""
    from train.evaluation.pipelined import PipelinedModel, share_done

    source, tasks = job.source, job.open_tasks()
    try:
        with open_ranks(network) as pipeline:
            world = pipeline.replica.world
            model = PipelinedModel(pipeline.replica, job.config.batch_size, lambda: pipeline)
            limit, tokenizer = source.model.max_position_tokens, source.needed_tokenizer("tasks")
            answerer = Answerer(model, tokenizer, source.end_ids, limit)
            run_tasks(tasks, answerer, share_done(world, done), write if world.rank == 0 else None)
    finally:
        _close(tasks)


if __name__ == "__main__":
    sys.exit(command("evaluate", main, preview, quiet=is_other_rank(os.environ)))
