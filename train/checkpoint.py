"""Checkpoints through torch's DCP: weights under their released names, optimiser shards by rank.

A checkpoint is written under a temporary name and renamed when every rank is done, its manifest last.
"""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from comm.local import LocalDispatcher
from data.prepare import Prepared
from dualpipe.ir import to_json
from model.config import ModelConfig
from model.transformer import Transformer, named_tensors
from train.assemble import Assembly
from train.checkpoint_reader import EMA_PREFIX, WEIGHTS_PREFIX, CheckpointReader, Kept, first_line, read_list
from train.manifest import SCHEDULE_NAME, TOKENIZER_NAME, CheckpointError, write_manifest


def step_folder(out_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lives."""
    return out_dir / "checkpoints" / f"step-{step:08d}"


def save(assembly: Assembly, step: int, prepared: Prepared) -> Path:
    """Writes the state after `step` updates, and the tokenizer; every rank calls it. Returns the folder.

    Raises:
        OSError: on every rank, where one of them cannot write its part.
    """
    final = step_folder(Path(assembly.config.out_dir), step)
    partial = final.with_name(final.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier(group=assembly.groups.world)
    try:
        _quietly(dcp_save, _state(assembly) | _averages(assembly), partial)
    except CheckpointException as failure:
        rank, (cause, _) = min(failure.failures.items())
        raise OSError(f"{partial}: cannot be written by rank {rank}: {first_line(cause)}") from failure
    if dist.get_rank() == 0:
        (partial / SCHEDULE_NAME).write_text(to_json(assembly.schedule) + "\n", encoding="utf-8")
        prepared.tokenizer.save(partial / TOKENIZER_NAME)
        write_manifest(partial, step, assembly.config, prepared.fingerprint)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
    dist.barrier(group=assembly.groups.world)
    return final


def load(assembly: Assembly, folder: Path) -> None:
    """Fills weights, router bias and optimiser state from a checkpoint of the same layout; every rank calls it.

    Raises:
        CheckpointError: on every rank, where one of them cannot read its part.
    """
    averages = _averages(assembly) if _holds_averages(folder) else {}
    try:
        _quietly(dcp_load, _state(assembly) | averages, folder)
    except CheckpointException as failure:
        rank, (cause, _) = min(failure.failures.items())
        raise CheckpointError(f"resume: {folder}: cannot be read by rank {rank}: {first_line(cause)}") from failure
    assembly.optimiser.loaded()
    if assembly.ema is not None and not averages:
        assembly.ema.follow_weights()


def load_whole(
    config: ModelConfig, folder: Path, dtype: torch.dtype, key: str = "resume", kept: Kept = "trained"
) -> Transformer:
    """The whole model of a checkpoint in this process alone, whatever layout wrote it.

    Args:
        config: the checkpoint's architecture.
        folder: of the checkpoint.
        dtype: of the model's weights.
        key: of the configuration that names the checkpoint, for errors.
        kept: the trained weights, or their average.

    Raises:
        CheckpointError: there is no average; a file is missing, cut short or of another form.
    """
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype)
    CheckpointReader(folder, key, kept).fill(named_tensors(model))
    return model


def _state(assembly: Assembly) -> dict[str, Any]:
    shards = assembly.optimiser.state()
    return _weights(assembly.model) | {f"optimiser.{dist.get_rank()}.{key}": value for key, value in shards.items()}


def _averages(assembly: Assembly) -> dict[str, Any]:
    averages = {} if assembly.ema is None else assembly.ema.state()
    return {f"{EMA_PREFIX}{name}": average for name, average in averages.items()}


def _holds_averages(folder: Path) -> bool:
    return any(name.startswith(EMA_PREFIX) for name in read_list(folder, "resume").state_dict_metadata)


def _weights(model: Transformer) -> dict[str, Tensor]:
    return {f"{WEIGHTS_PREFIX}{name}": tensor for name, tensor in named_tensors(model).items()}


def _quietly(call: Any, state: dict[str, Any], folder: Path) -> None:
    """DCP warns of deprecations in its own code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(state, checkpoint_id=folder)
