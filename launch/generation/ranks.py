"""Generates on several ranks that hold a model together: local processes, or the ranks of torchrun.

Imports torch only on the ranks, so that all checks run before.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Literal

from comm.config import ClusterConfig, ParallelismConfig
from data.tokenizer import Tokenizer
from dualpipe.config import ScheduleConfig
from dualpipe.registry import FALLBACK, SCHEDULES, check_size
from infer.config import Speculative
from infer.engines.protocol import NumberedPrompt, Request, Rollouts
from launch.config.model_rules import check_expert_ranks, check_experts
from launch.generation.continuations import Transcript
from launch.generation.prompts import Prompt
from launch.ranks.workers import Send, run_on_local_ranks
from model.config import CutError, InferencePrecision, ModelConfig, cut_at, cut_layers
from train.config.errors import ConfigError

_PRELOADED = ["train.post.inference", "infer.engines.pipelined.engine", "launch.generation.ranks"]
_TIMEOUT_SECONDS = 1800.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RankJob:
    """What every rank runs.

    Attributes:
        ckpt: a Hugging Face folder, converted weights, a run's folder or a checkpoint.
        weights: the trained weights, or their moving average.
        model: the architecture. Without MTP modules, those of the weights are not read.
        dtype: type of the weights.
        cluster: the machines.
        parallelism: the mesh.
        kind: schedule whose placement is used.
        cut: layers of each stage.
        prompts: all prompts.
        request: how they are continued.
        given: the prompts as the user gave them, for stop strings.
        tokenizer: for stop strings; None if there are none.
        stop_strings: strings that end a continuation.
        speculative: whether the MTP module drafts tokens.
        cohorts: cohorts of each direction; None for 2 in flight for each rank.
        max_rows: maximum number of prompts of a cohort.
    """

    ckpt: str
    weights: Literal["trained", "ema"]
    model: ModelConfig
    dtype: InferencePrecision
    cluster: ClusterConfig
    parallelism: ParallelismConfig
    kind: str
    cut: tuple[range, ...]
    prompts: tuple[NumberedPrompt, ...]
    request: Request
    given: tuple[Prompt, ...]
    tokenizer: Tokenizer | None
    stop_strings: tuple[str, ...]
    speculative: Speculative
    cohorts: int | None
    max_rows: int


def check_ranks(model: ModelConfig, mesh: ParallelismConfig, schedule: ScheduleConfig) -> tuple[str, tuple[range, ...]]:
    """Checks that a model can be spread over a mesh."""
    if mesh.context > 1:
        raise ConfigError(
            f"parallelism.context: must be 1, because ranks that generate hold whole sequences, is {mesh.context}; "
            f"nearest valid: parallelism.context=1 parallelism.data={mesh.stage_ranks}"
        )
    check_expert_ranks(mesh)
    check_experts(model, mesh.expert)
    kind = FALLBACK if schedule.kind == "auto" else schedule.kind
    check_size(kind, mesh.pipeline, 2 * mesh.pipeline, ranks_key="parallelism.pipeline")
    chunks = SCHEDULES.get(kind).chunk_choices(schedule.chunks)[0]
    num_stages = mesh.pipeline * chunks
    if mesh.cut.kind != "listed":
        return kind, cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=chunks)
    sizes = mesh.cut.layers
    if len(sizes) != num_stages or sum(sizes) != model.num_layers or 0 in sizes[1:-1]:
        even = cut_layers(model.num_layers, num_stages, model.mtp_depth, stages_per_rank=chunks)
        raise CutError(
            f"parallelism.cut: must list the layers of {num_stages} stages that add up to {model.num_layers}, is "
            f"{list(sizes)}; nearest valid: {[len(layers) for layers in even]}, or auto"
        )
    return kind, cut_at(sizes)


def local_cluster(device: str, num_ranks: int) -> ClusterConfig:
    """Returns the configuration of ranks that share this machine, or of those of torchrun."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", num_ranks))
    return ClusterConfig(
        device="cuda" if device == "cuda" else "cpu",
        backend="nccl" if device == "cuda" else "gloo",
        ranks_per_node=here,
        threads_per_rank=max(1, (os.cpu_count() or 1) // here),
        timeout_seconds=_TIMEOUT_SECONDS,
        peak_flops=None,
        memory_bytes=None,
        memory_reserve_bytes=0,
        grace_seconds=10.0,
        max_restarts=0,
    )


def generate_as_rank(job: RankJob) -> Rollouts:
    """Generates as one rank of the job, and returns all rollouts on every rank."""
    from comm.groups import ClusterError
    from infer.engines.pipelined.engine import CohortSizes, PipelinedEngine
    from train.post.inference import InferenceConfig, open_pipeline

    network = InferenceConfig(**{field.name: getattr(job, field.name) for field in fields(InferenceConfig)})
    stop_condition: Callable[[int, int], bool] = lambda index, token: False  # noqa: E731
    if job.stop_strings:
        transcripts = [Transcript(prompt, job.tokenizer, job.stop_strings) for prompt in job.given]
        stop_condition = lambda index, token: transcripts[index].push(token)  # noqa: E731
    try:
        with open_pipeline(network) as pipeline:
            engine = PipelinedEngine(
                pipeline,
                speculative=job.speculative,
                sizes=CohortSizes(cohorts=job.cohorts, max_rows=job.max_rows),
                stop_condition=stop_condition,
            )
            return engine.generate(job.prompts, job.request)
    except ClusterError as error:
        raise ConfigError(f"device: {error}") from error


def generate_on_local_ranks(job: RankJob) -> Rollouts:
    """Starts the job's ranks on this machine and returns their rollouts. No rank outlives the call."""
    rollouts = run_on_local_ranks(partial(_generate, job), job.cluster, job.parallelism.world_size, _PRELOADED)
    assert isinstance(rollouts, Rollouts)
    return rollouts


def _generate(job: RankJob, send: Send) -> Rollouts:
    return generate_as_rank(job)


def as_text_tokens(tokens: Sequence[int], stop: frozenset[int]) -> list[int]:
    """Returns the tokens of a rollout without the stop token that ended it."""
    return list(tokens[:-1] if tokens and tokens[-1] in stop else tokens)


def with_drafts(model: ModelConfig, speculative: Speculative) -> ModelConfig:
    """Returns the architecture without MTP modules if they are not used."""
    return replace(model, mtp_depth=0) if speculative is False else model
