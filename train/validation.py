"""Validates a run's model: computes the loss of held-out sequences."""

from functools import partial

from data.loader import Batch, Loader
from train.config import TaskConfig
from train.replica import Replica
from train.step import validate_pass


def validate(replica: Replica, task: TaskConfig, loader: Loader, num_sequences: int) -> float:
    """Returns the main loss over validation sequences in nats per token. All ranks call it.

    Args:
        replica: network to validate.
        task: of the run.
        loader: of the data.
        num_sequences: number of sequences to read, or fewer if the corpus has fewer.
    """
    size = replica.global_sequences
    passes = min(num_sequences, loader.num_validation_sequences) // size
    nats, targets = 0.0, 0.0
    for index in range(passes):
        losses, count = validate_pass(replica, task, partial(_read_validation, loader, index * size))
        nats += losses.main * count
        targets += count
    replica.observers.traffic.take()  # the next step's record must not count this traffic
    replica.observers.clips.take()
    return nats / (targets or 1)


def _read_validation(loader: Loader, offset: int, first: int, count: int) -> Batch:
    return loader.validation_batch(offset + first, count)
