"""Packs the answers of one update, with what the passes over them replay of the sampler."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.loader import Batch
from model.objectives.policy import ADVANTAGE, OLD, SAMPLER
from train.replica import Replica
from train.rollout.groups.records import RolledAnswer, RolledGroup, RolloutRoutes
from train.rollout.kept import KeptSets, read_with_kept
from train.rollout.pack import AnswerPlace, BatchShape, TrainedAnswer, pack_all
from train.rollout.routes.replay import replay_answers
from train.rollout.step_batch import StepBatch
from train.tasks.batch_reader import Read

GroupAnswer = tuple[RolledGroup, RolledAnswer]


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedStep:
    """The packed answers of one update.

    Attributes:
        answers: each with its group, in order.
        places: place of each.
        batch_size: B and T of each batch.
        step: reads the batches and replays their experts.
    """

    answers: Sequence[GroupAnswer]
    places: Sequence[AnswerPlace]
    batch_size: tuple[int, int]
    step: StepBatch


def pack_step(
    replica: Replica,
    answers: Sequence[GroupAnswer],
    shape: BatchShape,
    old_log_probs: Mapping[int, Sequence[float]] | None,
    routes: RolloutRoutes | None,
) -> PackedStep:
    """Packs answers into batches. All ranks call it.

    Args:
        answers: of one update, each with its group, in order.
        old_log_probs: by the number of the answer, log-probability of each token before the update; None: the update
            uses its own.
        routes: this rank's records of experts; None: routers choose.
    """
    trained = [
        _to_trained(*each, None if old_log_probs is None else old_log_probs[at]) for at, each in enumerate(answers)
    ]
    names = [ADVANTAGE, SAMPLER, *([] if old_log_probs is None else [OLD])]
    packed = pack_all(trained, shape, dict.fromkeys(names, np.dtype(np.float64)))
    reads = tuple(_read(batch, number, answers, packed.places) for number, batch in enumerate(packed.batches))
    replays = () if routes is None else replay_answers(replica, routes, answers, packed.places).of_batches(len(reads))
    return PackedStep(
        answers=answers,
        places=packed.places,
        batch_size=(shape.num_sequences, shape.length),
        step=StepBatch(reads, routes=replays),
    )


def _read(batch: Batch, number: int, answers: Sequence[GroupAnswer], places: Sequence[AnswerPlace]) -> Read:
    """Returns the reader of a batch, with kept tokens if they are recorded."""
    sets = [
        KeptSets(row=place.row, first=place.start + len(group.tokens) - 1, sets=answer.kept)
        for (group, answer), place in zip(answers, places, strict=True)
        if place.batch == number and answer.kept
    ]
    return read_with_kept(batch, sets) if any(answer.kept for _, answer in answers) else batch.sequences


def _to_trained(group: RolledGroup, answer: RolledAnswer, old: Sequence[float] | None) -> TrainedAnswer:
    values: dict[str, Any] = {
        ADVANTAGE: np.full(len(answer.tokens), answer.advantage),
        SAMPLER: np.asarray(answer.log_probs, dtype=np.float64),
    }
    if old is not None:
        values[OLD] = np.asarray(old, dtype=np.float64)
    return TrainedAnswer(prompt=group.tokens, answer=answer.tokens, values=values)
