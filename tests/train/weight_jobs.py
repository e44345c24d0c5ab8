"""Runs one rank of a test's job that starts from given weights."""

import os
import resource
import signal
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from data.prepare import prepare
from dualpipe.registry import ScheduleConfig
from model.hf.reader import HfReader
from model.transformer import named_tensors
from tests.tiny import BATCH, TASK, tiny_config
from tests.train.job import close_job, open_job, open_loader, save_checkpoint
from train.checkpoint import load as checkpoint
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.sources import load_initial
from train.config import TokenSchedule, TrainConfig
from train.core.step import train_step

# The last bytes that can be written are in the middle of a tensor, or in its header.
FILE_LIMITS_BYTES = (3_000, 10_000, 50_000, 50_700, 51_400, 100_100)

LAYOUTS = {
    "one": (ParallelismConfig(pipeline=1, data=1, expert=1), "1f1b"),
    "two": (ParallelismConfig(pipeline=1, data=2, expert=2), "1f1b"),
    "four": (ParallelismConfig(pipeline=2, data=2, expert=2), "dualpipe"),
}


def run_config(folder: Path, source: str, layout: str, name: str, **changes: Any) -> TrainConfig:
    """A run of two steps from the weights in `folder/source`, with a learning rate that moves them well."""
    parallelism, schedule = LAYOUTS[layout]
    config = tiny_config(
        folder,
        out_dir=str(folder / name),
        init_from=str(folder / source),
        model=HfReader(folder / source).config,
        parallelism=parallelism,
        batch=replace(BATCH, global_sequences=8),
        schedule=ScheduleConfig(kind=schedule, chunks=None, pairing="overlapped"),
        task=replace(TASK, bias_update_rate=TokenSchedule.constant(0.01)),
    )
    return replace(config, **changes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """A rank's weights at the start and at the end, by released name, and main losses step by step."""

    said: str
    first: dict[str, Tensor]
    last: dict[str, Tensor]
    losses: list[float]
    checkpoint: Path | None


def start_jobs(rank: int, world_size: int, configs: list[TrainConfig], saves: bool) -> list[Started]:
    """Starts each run from its `init_from`, takes its steps, and saves if requested."""
    return [_start(config, saves) for config in configs]


def _start(config: TrainConfig, saves: bool) -> Started:
    learner, loader = open_job(config), open_loader(config)
    prepared = prepare(config.data, config.batch.sequence_length_tokens)
    said = load_initial(config, learner, prepared.tokenizer)
    first = copies(learner.replica.model)
    losses = [train_step(learner, config.task, loader, step).losses.main for step in range(config.task.steps)]
    folder = save_checkpoint(config, learner, config.task.steps, prepared) if saves else None
    started = Started(said=said, first=first, last=copies(learner.replica.model), losses=losses, checkpoint=folder)
    dist.barrier()
    close_job(learner)
    return started


def use_broken(rank: int, world_size: int, config: TrainConfig) -> tuple[str, list[str]]:
    """Returns the errors of resuming from a truncated file, and of saving under limits of file size."""
    learner, prepared = open_job(config), prepare(config.data, config.batch.sequence_length_tokens)
    read, written = "", []
    folder = save_checkpoint(config, learner, 0, prepared)
    if rank == 0:
        os.truncate(folder / "rank_00001.safetensors", 3000)
    dist.barrier()
    try:
        checkpoint.load(learner, folder)
    except CheckpointError as error:
        read = str(error)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for size_bytes in FILE_LIMITS_BYTES:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, limits[1]))
        try:
            save_checkpoint(config, learner, 1, prepared)
        except OSError as error:
            written.append(str(error))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    dist.barrier()
    close_job(learner)
    return read, written


def copies(model: torch.nn.Module) -> dict[str, Tensor]:
    """Every weight and router bias held, by released name."""
    return {name: tensor.clone() for name, tensor in named_tensors(model).items()}  # type: ignore[arg-type]
