"""Computes log-probabilities of answers before any update of a rollout.

The pass packs the answers as the update does. So the first update's ratios are exactly 1.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.loader import Batch
from model.objective import BALANCE, LossSums, Objective
from model.objectives.preference import TokenLogProbs
from train.replica import Replica
from train.rollout.pack import BatchShape, TrainedAnswer, pack_all
from train.tasks.batch_reader import BatchReader, first_sequence
from train.tasks.registry import Task


def answer_log_probs(
    replica: Replica,
    task: Task,
    answers: Sequence[TrainedAnswer],
    shape: BatchShape,
    types: Mapping[str, np.dtype[Any]],
    temperature: float,
) -> list[tuple[float, ...]]:
    """Returns the log-probability of each token of answers under the present weights.

    All ranks call it.

    Args:
        replica: the policy.
        task: reads packed answers.
        answers: of one update, in order.
        shape: of its batches.
        types: of the values of the batches.
        temperature: divisor of the logits.
    """
    packed = pack_all(answers, shape, types)
    found = [pass_log_probs(replica, task, TokenLogProbs(temperature=temperature), batch) for batch in packed.batches]
    made = []
    for answer, place in zip(answers, packed.places, strict=True):
        first = place.start + len(answer.prompt) - 1
        made.append(tuple(found[place.batch][place.row, first : first + len(answer.answer)].tolist()))
    return made


def pass_log_probs(replica: Replica, task: Task, objective: Objective, batch: Batch) -> Tensor:
    """Returns the log-probabilities that an objective records of a global batch, BT.

    All ranks call it, and each gets them in float64 on the host.

    Args:
        replica: the network.
        task: reads the batch.
        objective: records log-probabilities.
        batch: global batch, equal on all ranks.
    """
    batches, sums = BatchReader(replica, task, batch.sequences), LossSums((BALANCE,), {})
    replica.forward(batches, objective, sums)
    # Records of steps count the traffic of the training pass.
    replica.observers.traffic.take()
    replica.observers.clips.take()
    found_BT = torch.zeros(batch.tokens_BT.shape, dtype=torch.float64)
    for (direction, micro_batch), log_probs_BT in (sums.log_probs or {}).items():
        first = first_sequence(replica, direction, micro_batch)
        found_BT[first : first + len(log_probs_BT)] = log_probs_BT.cpu()  # host sync
    # One rank holds the log-probabilities of a micro-batch; all others add zeros.
    return replica.world.reduce(found_BT, "log-probabilities of answers")
