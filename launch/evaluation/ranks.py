"""Evaluates on several ranks that hold a model together: local processes, or the ranks of torchrun.

Imports torch only on the ranks, so that all checks run before.
"""

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial

from infer.evaluate.answers import Answerer
from infer.evaluate.run import Write, run_tasks
from launch.evaluation.request import EvaluationJob
from launch.generation.ranks import check_ranks, local_cluster
from launch.ranks.environment import is_torchrun
from launch.ranks.workers import Send, run_on_local_ranks
from train.config.errors import ConfigError

_PRELOADED = ["train.post.inference", "train.evaluation.pipelined", "launch.evaluation.ranks"]

Done = Mapping[str, Collection[str | int]]
"""The ids of the samples of each task that have a record."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationPlacement:
    """Placement of a model: the kind of schedule that defines it, and the layers of each stage."""

    kind: str
    cut: tuple[range, ...]


def check_placement(job: EvaluationJob) -> EvaluationPlacement:
    """Checks that the model can be spread over the ranks."""
    mesh, started = job.config.parallelism, os.environ.get("WORLD_SIZE")
    if is_torchrun(os.environ) and started != str(mesh.world_size):
        raise ConfigError(
            f"parallelism: pipeline={mesh.pipeline} x data={mesh.data} makes {mesh.world_size} ranks, but torchrun "
            f"started WORLD_SIZE={started}; start {mesh.world_size} ranks, or change parallelism"
        )
    kind, cut = check_ranks(job.source.model, mesh, job.config.schedule)
    return EvaluationPlacement(kind=kind, cut=cut)


def evaluate_on_local_ranks(job: EvaluationJob, placement: EvaluationPlacement, done: Done, write: Write) -> None:
    """Starts ranks on this machine, which evaluate. No rank outlives the call."""
    cluster = local_cluster(job.config.device, job.config.parallelism.world_size)
    function = partial(_evaluate, job, placement, done)
    run_on_local_ranks(function, cluster, job.config.parallelism.world_size, _PRELOADED, lambda sent: write(*sent))


def _evaluate(job: EvaluationJob, placement: EvaluationPlacement, done: Done, send: Send) -> None:
    evaluate_as_rank(job, placement, done, lambda *record: send(record))


def evaluate_as_rank(job: EvaluationJob, placement: EvaluationPlacement, done: Done | None, write: Write) -> None:
    """Evaluates as one rank of the job."""
    from comm.groups import ClusterError
    from train.evaluation.pipelined import PipelinedModel, share_done
    from train.post.inference import InferenceConfig, open_pipeline

    config, source = job.config, job.source
    network = InferenceConfig(
        ckpt=config.ckpt,
        weights=config.weights,
        model=source.model,
        dtype=source.resolve(config.dtype),
        cluster=local_cluster(config.device, config.parallelism.world_size),
        parallelism=config.parallelism,
        kind=placement.kind,
        cut=placement.cut,
    )
    tasks = job.open_tasks()
    try:
        with open_pipeline(network) as pipeline:
            assert source.tokenizer is not None
            world = pipeline.replica.world
            model = PipelinedModel(pipeline.replica, config.batch_size, lambda: pipeline)
            answerer = Answerer(model, source.tokenizer, source.end_ids, source.model.max_position_tokens)
            run_tasks(tasks, answerer, share_done(world, done), write if world.rank == 0 else None)
    except ClusterError as error:
        raise ConfigError(f"device: {error}") from error
    finally:
        for each in tasks:
            each.task.close()
