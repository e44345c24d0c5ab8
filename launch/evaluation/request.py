"""Reads the request of `launch.evaluate`: configuration, weights and tasks. Imports no torch."""

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comm.config import ParallelismConfig
from dualpipe.config import ScheduleConfig
from infer.evaluate.protocol import TaskContext
from infer.evaluate.registry import EVALUATION_TASKS
from infer.evaluate.run import OpenTask, open_tasks
from kernels.ranges import NonNegativeInt, PositiveInt
from launch.config.compose import compose
from launch.job import Device, Dtype, WeightsSource, find_weights, spread_over_ranks
from train.checkpoint.index import WeightsKind
from train.checkpoint.manifest import MANIFEST_NAME, digest
from train.config import InferenceConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError
from train.config.evaluation import EvaluationTasksConfig

FORMAT = 1
_HASHED_SUFFIXES = (".safetensors", ".json", ".model")


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateCommandConfig:
    """Configuration of an evaluation. `conf/evaluate.yaml` explains the keys."""

    ckpt: str
    weights: WeightsKind
    out: str
    compare: str | None
    seed: NonNegativeInt
    batch_size: PositiveInt
    parallelism: ParallelismConfig
    schedule: ScheduleConfig
    dtype: Dtype
    device: Device
    plugins: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationJob:
    """What is evaluated: configuration, tasks' settings, and weights that are not read yet."""

    config: EvaluateCommandConfig
    tasks: EvaluationTasksConfig
    source: WeightsSource

    def open_tasks(self) -> list[OpenTask]:
        """Builds the tasks, which check all of their files."""
        source, tokenizer = self.source, self.source.needed_tokenizer("tasks")
        for name in self.tasks.tasks:
            heads = EVALUATION_TASKS.get(name).heads
            if source.model.head not in heads:
                raise ConfigError(
                    f"tasks: {name} needs weights with model.head={' or '.join(heads)}, {source.folder} has "
                    f"{source.model.head}; nearest valid: other tasks or weights"
                )
        limit, seed = source.model.max_position_tokens, self.config.seed
        context = TaskContext(tokenizer=tokenizer, max_tokens=limit, seed=seed)
        return open_tasks(self.tasks.tasks, self.tasks.settings, context)

    def spread(self) -> InferenceConfig | None:
        """Returns how ranks hold the model together, or None if one process holds the whole model."""
        config = self.config
        return spread_over_ranks(self.source, config.dtype, config.device, config.parallelism, config.schedule)


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
    source = find_weights(config.ckpt, config.weights, drop_mtp=True, needs_tokenizer=True)
    # No task uses MTP modules.
    return EvaluationJob(config=config, tasks=tasks, source=source.without_mtp())


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


def describe_checkpoint(source: WeightsSource) -> dict[str, Any]:
    """Returns folder, kind, step and hash of weights; all files of a Hugging Face folder are read."""
    if source.is_hf:
        paths = sorted(path for path in source.folder.iterdir() if path.suffix in _HASHED_SUFFIXES)
        with ThreadPoolExecutor() as pool:
            digests = pool.map(digest, paths)
            hashes = {path.name: file.sha256 for path, file in zip(paths, digests, strict=True)}
        return {"folder": str(source.folder), "kind": "huggingface", "step": None, "weights": "trained", **_sum(hashes)}
    manifest = json.loads((source.folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    hashes = {name: str(file["sha256"]) for name, file in manifest["files"].items()}
    folder, step = str(source.folder.resolve()), manifest["step"]
    return {"folder": folder, "kind": "checkpoint", "step": step, "weights": source.weights, **_sum(hashes)}


def _sum(hashes: dict[str, str]) -> dict[str, str]:
    return {"sha256": hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()}
