"""Computes log-probabilities of answers before any update of a rollout.

The pass packs the answers as the update does. So the first update's ratios are exactly 1.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from model.objective import BALANCE, LossSums, Objective
from model.objectives.preference import TokenLogProbs
from model.router import Routes
from train.replica import Replica
from train.rollout.groups.packed_step import PackedStep
from train.tasks.batch_reader import BatchReader, Read, first_sequence
from train.tasks.registry import Task


def answer_log_probs(replica: Replica, task: Task, packed: PackedStep, temperature: float) -> list[tuple[float, ...]]:
    """Returns the log-probability of each token of answers under the present weights.

    All ranks call it.
    """
    replays: Sequence[Routes | None] = packed.step.routes or [None] * len(packed.step.reads)
    objective, size = TokenLogProbs(temperature=temperature), packed.batch_size
    found = [
        pass_log_probs(replica, task, objective, read, size, routes)
        for read, routes in zip(packed.step.reads, replays, strict=True)
    ]
    made = []
    for (group, answer), place in zip(packed.answers, packed.places, strict=True):
        first = place.start + len(group.tokens) - 1
        made.append(tuple(found[place.batch][place.row, first : first + len(answer.tokens)].tolist()))
    return made


def pass_log_probs(
    replica: Replica,
    task: Task,
    objective: Objective,
    read: Read,
    size: tuple[int, int],
    routes: Routes | None = None,
) -> Tensor:
    """Returns the log-probabilities that an objective records of a global batch, BT.

    All ranks call it, and each gets them in float64 on the host.

    Args:
        read: reads sequences of the global batch.
        routes: replays experts; None: the routers choose.
    """
    batches, sums = BatchReader(replica, task, read), LossSums((BALANCE,), {})
    replica.forward(batches, objective, sums, routes)
    # Records of steps count the traffic of the training pass.
    replica.observers.traffic.take()
    replica.observers.clips.take()
    found_BT = torch.zeros(size, dtype=torch.float64)
    for (direction, micro_batch), log_probs_BT in (sums.log_probs or {}).items():
        first = first_sequence(replica, direction, micro_batch)
        found_BT[first : first + len(log_probs_BT)] = log_probs_BT.cpu()  # host sync
    # One rank holds the log-probabilities of a micro-batch; all others add zeros.
    return replica.world.reduce(found_BT, "log-probabilities of answers")
