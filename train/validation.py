"""Runs forward-only passes: validation, and log-probabilities of tokens."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.loader import Batch, Loader
from model.objective import MAIN, LossSums
from train.config import TaskConfig
from train.records.by_position import LossByPosition, PositionMeans
from train.replica import Replica
from train.step import Losses, compare, is_reported, reduce_losses
from train.tasks.batch_reader import BatchReader, Read, first_sequence
from train.tasks.reference import Reference
from train.tasks.registry import StepRates, open_task
from train.teacher.replica import Teacher

_NO_RATES = StepRates(learning_rate=0.0, mtp_loss_weight=0.0, bias_update=0.0)


@dataclass(frozen=True, slots=True)
class Validation:
    """Means over held-out sequences: the main loss, the task's others by name, and losses by position."""

    loss: float
    reported: Mapping[str, float]
    by_position: PositionMeans | None = None


def validate(
    replica: Replica,
    task: TaskConfig,
    loader: Loader,
    num_sequences: int,
    reference: Reference | Teacher | None = None,
    by_position: LossByPosition | None = None,
) -> Validation:
    """Returns the main loss and reported means over validation sequences. All ranks call it.

    Args:
        num_sequences: number of sequences to read, or fewer if the corpus has fewer.
        reference: model with which the task compares, if it does.
        by_position: measures the loss by position; None: it is not measured.
    """
    size = replica.global_sequences
    # A part that is smaller than a global batch is one pass, filled with empty sequences.
    passes = max(min(num_sequences, loader.num_validation_sequences) // size, 1)
    totals, counts = defaultdict[str, float](float), defaultdict[str, float](float)
    for index in range(passes):
        read = partial(_read_validation, loader, index * size)
        losses, found = validate_pass(replica, task, read, reference, by_position)
        for name, mean in losses.by_name.items():
            totals[name] += mean * found[name]
            counts[name] += found[name]
    replica.observers.traffic.take()  # the next step's record must not count this traffic
    replica.observers.clips.take()
    means = {name: total / (counts[name] or 1) for name, total in totals.items()}
    reported = {name: mean for name, mean in means.items() if is_reported(name)}
    return Validation(means.get(MAIN, 0.0), reported, None if by_position is None else by_position.means(replica.world))


def validate_pass(
    replica: Replica,
    config: TaskConfig,
    read: Read,
    reference: Reference | Teacher | None = None,
    by_position: LossByPosition | None = None,
) -> tuple[Losses, dict[str, float]]:
    """Runs a forward pass of one global batch.

    Args:
        read: as in `accumulate`.
        reference: model with which the task compares, if it does.
        by_position: as in `validate`.

    Returns:
        The losses, with MTP losses left out of the total, and the denominator of each mean by name.
    """
    sums, losses, counts = _forward(replica, config, read, reference=reference, by_position=by_position)
    return losses, dict(zip(sums.names, counts.tolist(), strict=True))


def score_pass(replica: Replica, config: TaskConfig, read: Read) -> tuple[Losses, Tensor]:
    """Runs a forward pass of one global batch and returns every main target's log-probability.

    All ranks call it. A network with a score head returns the score of every token instead.

    Returns:
        The losses, and log-probabilities [B, T], float64, in the order of the global batch, on the host of every rank.
        A position without a target has 0.
    """
    sums, losses, _ = _forward(replica, config, read, log_probs={})
    batch = replica.config.batch
    found_BT = torch.zeros(replica.global_sequences, batch.sequence_length_tokens, dtype=torch.float64)
    parts = replica.parts
    for (direction, micro_batch), log_probs_BT in (sums.log_probs or {}).items():
        first = first_sequence(replica, direction, micro_batch)
        rows_BT = found_BT[first : first + batch.micro_sequences]
        parts.put(log_probs_BT.cpu(), replica.part_of(micro_batch), rows_BT)  # host sync
    # One rank holds the log-probability of a token; all others add zeros.
    return losses, replica.world.reduce(found_BT, "sum of log-probabilities")


def _forward(
    replica: Replica,
    config: TaskConfig,
    read: Read,
    *,
    log_probs: dict[tuple[int, int], Tensor] | None = None,
    reference: Reference | Teacher | None = None,
    by_position: LossByPosition | None = None,
) -> tuple[LossSums, Losses, Tensor]:
    task = open_task(config, replica.config.model, replica.config.batch)
    if by_position is not None:
        log_probs, read = {}, partial(_read_marked, by_position, read)
    batches, sums = BatchReader(replica, task, read), LossSums(task.names, log_probs)
    counts = batches.count()
    replica.forward(batches, compare(reference, batches, task.objective(counts, _NO_RATES)), sums)
    if by_position is not None:
        for place, log_probs_BT in (sums.log_probs or {}).items():
            batch = batches(*place)
            assert batch is not None
            by_position.add(batch, log_probs_BT)
    return sums, reduce_losses(replica, task, sums, counts, _NO_RATES), counts


def _read_marked(by_position: LossByPosition, read: Read, first: int, count: int) -> Batch:
    return by_position.mark(read(first, count))


def _read_validation(loader: Loader, offset: int, first: int, count: int) -> Batch:
    return loader.validation_batch(offset + first, count)
