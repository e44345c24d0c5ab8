"""Adds the tokens that sampling kept to the sequences of a batch of packed answers.

Sets differ in size. So they are padded only within the sequences that are read together. Shape legend: B sequences, T
tokens, C kept tokens of the largest set.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from data.loader import Batch
from model.objectives.sampled import KEPT
from train.tasks.batch_reader import Read

_NO_TOKEN = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class KeptSets:
    """The kept tokens of a packed answer.

    Attributes:
        row: its sequence within the batch.
        first: position that predicts its first token.
        sets: the kept tokens of each of its tokens.
    """

    row: int
    first: int
    sets: tuple[tuple[int, ...], ...]


def read_with_kept(batch: Batch, answers: Iterable[KeptSets]) -> Read:
    """Returns a reader of a batch that adds the kept tokens, int64 BTC, with -1 in free places."""
    by_row: dict[int, list[KeptSets]] = defaultdict(list)
    for answer in answers:
        by_row[answer.row].append(answer)

    def read(first: int, count: int) -> Batch:
        found = [(row - first, answer) for row in range(first, first + count) for answer in by_row[row]]
        widest = max((len(kept) for _, answer in found for kept in answer.sets), default=1)
        sequences = batch.sequences(first, count)
        kept_BTC = torch.full((*sequences.tokens_BT.shape, widest), _NO_TOKEN, dtype=torch.int64)
        for row, answer in found:
            for position, kept in enumerate(answer.sets, answer.first):
                kept_BTC[row, position, : len(kept)] = torch.tensor(kept)
        return replace(sequences, extras={**sequences.extras, KEPT: kept_BTC})

    return read
