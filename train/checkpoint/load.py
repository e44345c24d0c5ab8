"""Loads checkpoints by torch's DCP.

Weights have their released names, optimizer state the names of parameters.
"""

import warnings
from pathlib import Path

import torch
from torch.distributed.checkpoint.metadata import Metadata

from comm.agreement import exchange_reports
from comm.dispatch.local import LocalDispatcher
from data.prepare import Prepared
from model.config import Computing, ModelConfig, Products
from model.transformer import Transformer, named_tensors
from train.checkpoint.dcp.collective import PartError, load_on_all
from train.checkpoint.dcp.metadata import read_metadata
from train.checkpoint.dcp.storage import TensorsReader
from train.checkpoint.manifest import CheckpointError
from train.checkpoint.save import CheckpointSaver
from train.checkpoint.state import Extras, SliceLoadPlanner, state_of
from train.checkpoint.weights import CheckpointReader, WeightsKind
from train.config import TrainConfig
from train.learner import Learner


def save(config: TrainConfig, learner: Learner, step: int, prepared: Prepared) -> Path:
    """Writes the state after `step` updates and the tokenizer, and returns the folder. All ranks call it.

    Raises:
        OSError: on every rank, if one of them cannot write its part.
    """
    saver = CheckpointSaver(config, learner, prepared)
    saver.save(step)
    folder = saver.close()
    assert folder is not None
    return folder


def load(learner: Learner, folder: Path, extras: Extras | None = None) -> None:
    """Fills weights, router bias and optimizer state from a checkpoint of any layout. All ranks call it.

    Args:
        extras: further state, which is filled if the checkpoint holds it; all ranks pass the same, or none.

    Raises:
        CheckpointError: on every rank, if one of them cannot read its part.
    """
    metadata = _read_metadata(folder)
    names = metadata.state_dict_metadata
    extras = learner.extras if extras is None else extras
    found = {prefix: each for prefix, each in extras.items() if any(name.startswith(f"{prefix}.") for name in names)}
    if "reference" in extras and "reference" not in found:
        raise CheckpointError(
            f"resume: {folder} must hold the reference of the run's task, is a checkpoint of a task without one; "
            f"nearest valid: init_from={folder}, which starts a run from its weights"
        )
    reader = TensorsReader(folder, metadata)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # DCP warns of deprecations in its own code
        try:
            load_on_all(state_of(learner, found), metadata, reader, SliceLoadPlanner())
        except PartError as failure:
            raise CheckpointError(f"resume: {folder}: cannot be read by {failure}") from failure
    learner.optimizer.loaded()
    for extra in found.values():
        extra.loaded()
    if learner.ema is not None and "ema" not in found:
        learner.ema.follow_weights()


def _read_metadata(folder: Path) -> Metadata:
    """Reads the list of the checkpoint's tensors on every rank.

    Raises:
        CheckpointError: on every rank, if one of them cannot read it.
    """
    found: Metadata | CheckpointError
    try:
        found = read_metadata(folder, "resume")
    except CheckpointError as error:
        found = error
    if text := exchange_reports(str(found) if isinstance(found, CheckpointError) else None).first_text:
        raise CheckpointError(text)
    assert isinstance(found, Metadata)
    return found


def load_whole(
    config: ModelConfig,
    folder: Path,
    dtype: torch.dtype,
    key: str = "resume",
    kind: WeightsKind = "trained",
    *,
    products: Products = "own",
) -> Transformer:
    """Loads the whole model of a checkpoint of any layout in this process alone.

    Args:
        dtype: type of the model's weights.
        key: configuration key that names the checkpoint, for errors.
        kind: the trained weights, or their moving average.
        products: precision of the products of linear layers.

    Raises:
        CheckpointError: there is no average, or a file is missing, truncated or of another form.
    """
    computing = Computing(products=products)
    model = Transformer(config, LocalDispatcher(config.num_routed_experts), dtype, computing=computing)
    CheckpointReader(folder, key, kind).fill(named_tensors(model))
    return model
