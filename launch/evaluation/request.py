"""Reads the request of `launch.evaluate`: configuration, weights and tasks. Imports no torch."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from infer.evaluate.protocol import TaskContext
from infer.evaluate.registry import EVALUATION_TASKS
from infer.evaluate.run import OpenTask, open_tasks
from kernels.ranges import NonNegativeInt, PositiveInt
from launch.config.compose import compose
from launch.generation.source import GenerationSource, find_weights
from train.checkpoint.manifest import digest
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.config.evaluation import EvaluationTasksConfig

FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateCommandConfig:
    """Configuration of an evaluation: weights, output and ranks (`conf/evaluate.yaml`)."""

    ckpt: str
    weights: Literal["trained", "ema"]
    out: str
    compare: str | None
    seed: NonNegativeInt
    batch_size: PositiveInt
    parallelism: ParallelismConfig
    schedule: ScheduleConfig
    dtype: Literal["auto", "float64", "float32", "bf16"]
    device: Literal["cpu", "cuda"]
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What is evaluated: configuration, tasks' settings, and weights that are not read yet."""

    config: EvaluateCommandConfig
    tasks: EvaluationTasksConfig
    source: GenerationSource

    def open_tasks(self) -> list[OpenTask]:
        """Builds the tasks, which check all of their files."""
        source = self.source
        if source.tokenizer is None:
            raise ConfigError(f"ckpt: tasks need a tokenizer, {source.folder} holds none")
        for name in self.tasks.tasks:
            heads = EVALUATION_TASKS.get(name).heads
            if source.model.head not in heads:
                raise ConfigError(
                    f"tasks: {name} needs weights with model.head={' or '.join(heads)}, {source.folder} has "
                    f"{source.model.head}; nearest valid: other tasks or weights"
                )
        context = TaskContext(
            tokenizer=source.tokenizer, max_tokens=source.model.max_position_tokens, seed=self.config.seed
        )
        return open_tasks(self.tasks.tasks, self.tasks.settings, context)


def read_job(overrides: Sequence[str]) -> EvaluationJob:
    """Composes and checks the configuration, and locates the weights without reading them."""
    values: dict[str, Any] = compose("evaluate", overrides)
    names = [name for name in ("tasks", *EVALUATION_TASKS.names()) if name in values]
    tasks = EvaluationTasksConfig.from_plain({name: values.pop(name) for name in names})
    config = decode(EvaluateCommandConfig, values)
    if not tasks.tasks:
        raise ConfigError(f"tasks: must name at least one task, is []; valid: {', '.join(EVALUATION_TASKS.names())}")
    if not config.out:
        raise ConfigError("out: a value is needed, is empty; write out=FOLDER")
    found = find_weights(config.ckpt, config.weights, drop_mtp=True, needs_tokenizer=True)
    source = replace(found, model=replace(found.model, mtp_depth=0))  # no task uses MTP modules
    return EvaluationJob(config=config, tasks=tasks, source=source)


def identity(job: EvaluationJob, checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the records, as plain values. Those of equal evaluations are equal."""
    settings = {name: encode(job.tasks.settings[name]) for name in job.tasks.tasks}
    return {
        "format": FORMAT,
        "ckpt": {key: value for key, value in checkpoint.items() if key != "folder"},
        "dtype": job.source.resolve(job.config.dtype),
        "seed": job.config.seed,
        "tasks": list(job.tasks.tasks),
        **settings,
        "versions": {name: EVALUATION_TASKS.get(name).version for name in job.tasks.tasks},
        "files": {
            path: digest(Path(path).expanduser()).sha256
            for name in job.tasks.tasks
            for path in EVALUATION_TASKS.get(name).files(job.tasks.settings[name])
        },
    }
