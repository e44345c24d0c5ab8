"""Pairs of answers for tests: batches drawn from a seed, and runs on arithmetic problems."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from data.arithmetic import ArithmeticSource
from data.loader import Batch
from train.config import TrainConfig
from train.tasks.registry import TASKS


@dataclass(frozen=True, slots=True)
class Pair:
    """Tokens of a prompt and of both its answers, of which each ends with an end token."""

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]


def draw_pairs(seed: int, number: int, vocab_size: int, longest: int = 4) -> list[Pair]:
    """Draws pairs with tokens from 3 on; 1 ends an answer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(least: int) -> tuple[int, ...]:
        length = int(torch.randint(least, longest + 1, (), generator=generator))
        return tuple(torch.randint(3, vocab_size, (length,), generator=generator).tolist())

    return [Pair(draw(1), (*draw(0), 1), (*draw(0), 1)) for _ in range(number)]


def batch_of(rows: list[list[Pair]], length: int) -> Batch:
    """Packs pairs into sequences, with the values that the tasks read."""
    shape = (len(rows), length)
    tokens, positions = torch.full(shape, 2), torch.full(shape, -1)
    extras = {name: torch.zeros(shape, dtype=torch.int16) for name in ("weights", "pair", "score")}
    for row, pairs in enumerate(rows):
        end = 0
        for number, pair in enumerate(pairs, 1):
            for sign, answer in ((1, pair.chosen), (-1, pair.rejected)):
                piece = (*pair.prompt, *answer)
                place = slice(end, end + len(piece))
                tokens[row, place] = torch.tensor(piece)
                positions[row, place] = torch.arange(len(piece))
                predicts = slice(end + len(pair.prompt) - 1, place.stop - 1)
                extras["weights"][row, predicts] = 1
                extras["pair"][row, predicts] = sign * number
                extras["score"][row, place.stop - 1] = sign * number
                end = place.stop
        assert end <= length, f"row {row} has {end} tokens, of at most {length}"
    return Batch(tokens_BT=tokens, positions_BT=positions, pad_id=2, extras=extras)


def swapped(batch: Batch) -> Batch:
    """The same pairs, with chosen and rejected answers exchanged."""
    extras = {**batch.extras, "pair": -batch.extras["pair"], "score": -batch.extras["score"]}
    return Batch(tokens_BT=batch.tokens_BT, positions_BT=batch.positions_BT, pad_id=batch.pad_id, extras=extras)


def scores_at(scores_BT: Tensor, batch: Batch, row: int, number: int) -> float:
    """The score of an answer: +k for the chosen one of pair k of a row, -k for the rejected one."""
    return float(scores_BT.detach()[row][batch.extras["score"][row] == number])


def on_pairs(config: TrainConfig, kind: str) -> TrainConfig:
    """Returns a run with the data, the batch and the head that a task on pairs needs."""
    source = ArithmeticSource(
        kind="arithmetic",
        form="preferences",
        template="v3",
        domains=("sort",),
        num_digits=4,
        num_samples=200,
        wrong_share=0.0,
        generator_seed=1,
    )
    head = TASKS.get(kind).head
    depth = config.model.mtp_depth if head == "tokens" else 0
    return replace(
        config,
        data=replace(config.data, source=source),
        batch=replace(config.batch, document_mask=True, sequence_length_tokens=60),
        model=replace(config.model, head=head, mtp_depth=depth),
    )
