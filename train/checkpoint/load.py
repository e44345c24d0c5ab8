"""Loads checkpoints. Weights have their released names, optimizer state the names of parameters."""

from pathlib import Path

import torch

from comm.dispatch.local import LocalDispatcher
from model.config import Computing, ModelConfig, Products
from model.transformer import Transformer, named_tensors
from train.checkpoint.index import Index, WeightsKind, read_index
from train.checkpoint.manifest import CheckpointError, read_model
from train.checkpoint.parts import PartReader
from train.checkpoint.state import Extras, state_of
from train.checkpoint.together import PartError, run_on_all
from train.checkpoint.weights import CheckpointReader
from train.learner import Learner


def load(learner: Learner, folder: Path) -> None:
    """Fills weights, router bias and optimizer state from a checkpoint of any layout. All ranks call it.

    Each rank reads the index, and the elements that it holds, by itself. Further state is filled if the checkpoint
    holds it.

    Raises:
        CheckpointError: on every rank, if one of them cannot read its part.
    """
    try:
        index = run_on_all(lambda: read_index(folder, read_model(folder)))
        found = _stored_extras(folder, learner, index)
        run_on_all(lambda: PartReader(folder, index).fill(state_of(learner, found)))
    except PartError as failure:
        raise CheckpointError(f"resume: {folder}: cannot be read by {failure}") from failure
    learner.optimizer.loaded()
    for extra in found.values():
        extra.loaded()
    if learner.ema is not None and "ema" not in found:
        learner.ema.follow_weights()


def _stored_extras(folder: Path, learner: Learner, index: Index) -> Extras:
    """Returns the further state of a learner that the checkpoint holds."""
    prefixes = {name.partition(".")[0] for name in index}
    found: Extras = {prefix: extra for prefix, extra in learner.extras.items() if prefix in prefixes}
    if "reference" in learner.extras and "reference" not in found:
        raise CheckpointError(
            f"resume: {folder} must hold the reference of the run's task, is a checkpoint of a task without one; "
            f"nearest valid: init_from={folder}, which starts a run from its weights"
        )
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
        key: configuration key that names the checkpoint, for errors.
        products: precision of the products of linear layers.

    Raises:
        CheckpointError: there is no average, or a file is missing, truncated or of another form.
    """
    model = Transformer(
        config, LocalDispatcher(config.num_routed_experts), dtype, computing=Computing(products=products)
    )
    CheckpointReader(folder, key, kind).fill(named_tensors(model))
    return model
