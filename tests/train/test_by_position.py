"""Tests losses of validation by position: ranges are right, and no layout of ranks changes the means."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from data.documents import count_token_bytes
from data.loader import IGNORE, Loader
from data.tokenizer import Tokenizer
from dualpipe.config import ScheduleConfig
from model.objective import MicroBatch
from tests.ranks import run_ranks
from tests.tiny import tiny_config, write_text
from tests.train.job import close_job, open_job
from train.config import TrainConfig
from train.corpus import prepare_corpus
from train.listeners.validation import Validation, validate
from train.records.by_position import LossByPosition

FIRST_RANGE, BASE = 4, 10
RANGES = ("0-3", "4-7", "8-15", "16-31")
NUM_SEQUENCES = 16


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    folder = tmp_path_factory.mktemp("by_position")
    write_text(folder)
    config = tiny_config(folder)
    data = replace(config.data, validation_fraction=0.5)
    return replace(config, data=data)


def run_validation(rank: int, world_size: int, config: TrainConfig) -> Validation:
    """Validates the initial weights on one rank of a job."""
    learner, prepared = open_job(config), prepare_corpus(config)
    loader = Loader(prepared, sizes=config.batch_sizes, seed=config.data.seed)
    by_position = LossByPosition(config.batch.sequence_length_tokens, BASE, prepared.tokenizer, FIRST_RANGE)
    found = validate(learner.replica, config.task, loader, NUM_SEQUENCES, by_position=by_position)
    close_job(learner)
    return found


@pytest.mark.slow
def test_every_layout_has_the_same_means_and_they_are_those_of_the_tokens(config: TrainConfig) -> None:
    """The mean of all ranges is the validation loss."""
    alone = run_ranks(1, run_validation, config)[0]
    schedule = ScheduleConfig(kind="dualpipe", chunks=None, pairing="overlapped")
    meshes = ({"pipeline": 2, "data": 2, "expert": 2}, {"pipeline": 2, "context": 2, "expert": 2})
    wide = [replace(config, parallelism=replace(config.parallelism, **mesh), schedule=schedule) for mesh in meshes]
    assert alone.by_position is not None
    assert list(alone.by_position.losses) == list(RANGES)
    for found in (found for each in wide for found in run_ranks(4, run_validation, each)):
        assert found.by_position is not None
        assert found.by_position.losses == pytest.approx(alone.by_position.losses, rel=1e-10)
        assert found.by_position.bits_per_byte == pytest.approx(alone.by_position.bits_per_byte, rel=1e-10)
    counts = count_targets(config)
    total = sum(alone.by_position.losses[name] * count for name, count in counts.items())
    assert total / sum(counts.values()) == pytest.approx(alone.loss, rel=1e-10)


def count_targets(config: TrainConfig) -> Counter[str]:
    """Counts the targets of each range, token by token."""
    loader = Loader(prepare_corpus(config), sizes=config.batch_sizes, seed=config.data.seed)
    batch = loader.validation_batch(0, NUM_SEQUENCES)
    counts = Counter[str]()
    for row, targets in zip(batch.positions_BT.tolist(), batch.targets(1).tolist(), strict=True):
        for position, target in zip(row, targets, strict=True):
            if target != IGNORE:
                counts[next(name for name in RANGES if position + 1 <= int(name.split("-")[1]))] += 1
    return counts


def test_default_ranges_begin_at_128_and_double() -> None:
    tokenizer = Tokenizer.train(["some text"], 320)
    measured = LossByPosition(1025, 128, tokenizer)
    tokens = torch.zeros(1, 1025, dtype=torch.int64)
    batch = MicroBatch(inputs_BT=(tokens,), targets_BT=(tokens,), extras={"positions": torch.arange(1025)[None] - 1})
    measured.add(batch, torch.full((1, 1025), -1.0))
    found = measured.means(OneRank())  # type: ignore[arg-type]
    assert found.losses == dict.fromkeys(["0-127", "128-255", "256-511", "512-1023", "1024-2047"], 1.0)
    assert found.record() == {"loss_by_position": found.losses}


class OneRank:
    """A world in which sums are complete."""

    def reduce(self, values: torch.Tensor, what: str) -> torch.Tensor:
        return values


def test_bytes_of_tokens_add_up_to_those_of_the_text() -> None:
    """Also for characters of several bytes, which byte-level tokens split."""
    tokenizer = Tokenizer.train(["naïve café, 中文"] * 3, 300)
    counts = count_token_bytes(tokenizer)
    for text in ("naïve café", "中文字符", "plain text\n  with spaces", "\u00a0x"):
        assert counts[tokenizer.encode(text)].sum() == len(text.encode("utf-8"))
    assert counts[[tokenizer.end_of_sentence_id, tokenizer.pad_id]].sum() == 0
