"""Tests of the loader: a step's batch depends only on its number, and targets stay within pieces."""

import random

import numpy as np
import pytest
import torch

from data.batch_sizes import BatchSizes
from data.config import DataConfig
from data.corpus import DataError, FilesSource
from data.loader import IGNORE, Batch, Loader, SampleOrder, permutation
from data.prepare import Prepared, prepare


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    lines = [f'{{"text": "{" ".join(str(rng.random()) for _ in range(rng.randrange(1, 9)))}"}}' for _ in range(150)]
    (folder / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(
        source=FilesSource(kind="files", paths=(str(folder),), text_field="text"),
        tokenizer=None,
        tokenizer_bos=None,
        tokenizer_eos=None,
        tokenizer_pad=None,
        tokenizer_vocab_size=300,
        validation_fraction=0.2,
        fim_rate=0.1,
        seed=0,
        cache_dir=str(folder / "cache"),
    )
    return prepare(config, 32)


@pytest.mark.parametrize(("num_sequences", "global_batch"), [(1, 3), (7, 2), (12, 4), (5, 13)])
def test_every_sample_occurs_exactly_once_per_epoch(num_sequences: int, global_batch: int) -> None:
    order = SampleOrder(num_sequences, seed=11)
    steps = [order.indices(step, BatchSizes(global_batch)) for step in range(6 * num_sequences)]
    stream = np.concatenate(steps)
    assert stream.dtype == np.int64
    for epoch in range(len(stream) // num_sequences):
        seen = stream[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(seen.tolist()) == list(range(num_sequences))


def test_order_depends_on_the_place_alone() -> None:
    stream = SampleOrder(10, seed=3).range(0, 200)
    fresh = SampleOrder(10, seed=3)
    for step in (17, 2, 2, 19, 0):
        assert fresh.indices(step, BatchSizes(8)).tolist() == stream[step * 8 : (step + 1) * 8].tolist()
    # Another batch size reads the same stream: a run with a changed global batch continues where the old one stopped.
    assert fresh.indices(3, BatchSizes(16)).tolist() == stream[48:64].tolist()


def test_order_is_the_same_on_every_machine_and_differs_by_seed_and_epoch() -> None:
    assert permutation(8, seed=1, epoch=0).tolist() == [3, 5, 2, 7, 0, 6, 1, 4]
    first = permutation(100, seed=1, epoch=0).tolist()
    assert first != permutation(100, seed=2, epoch=0).tolist()
    assert first != permutation(100, seed=1, epoch=1).tolist()
    assert sorted(permutation(100, seed=-5, epoch=2**40).tolist()) == list(range(100))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 12])
def test_any_splitting_into_ranks_reads_the_same_samples(prepared: Prepared, num_ranks: int) -> None:
    whole = Loader(prepared, sizes=BatchSizes(12), seed=5)
    share = 12 // num_ranks
    for step in (0, 1, 9):
        expected = whole.batch(step, 0, 12)
        parts = [
            Loader(prepared, sizes=BatchSizes(12), seed=5).batch(step, rank * share, share) for rank in range(num_ranks)
        ]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), expected.tokens_BT)
        assert torch.equal(torch.cat([part.positions_BT for part in parts]), expected.positions_BT)


def test_batches_are_the_ordered_rows_of_the_arrays(prepared: Prepared) -> None:
    loader = Loader(prepared, sizes=BatchSizes(6), seed=5)
    batch = loader.batch(3, 0, 6)
    indices = SampleOrder(len(prepared.train_tokens_NL), seed=5).indices(3, BatchSizes(6))
    assert batch.tokens_BT.dtype == batch.positions_BT.dtype == torch.int64
    assert batch.tokens_BT.tolist() == prepared.train_tokens_NL[indices].tolist()
    assert batch.positions_BT.tolist() == prepared.train_positions_NL[indices].tolist()


def test_validation_is_every_sequence_once_in_a_fixed_order(prepared: Prepared) -> None:
    loader = Loader(prepared, sizes=BatchSizes(6), seed=5)
    number = loader.num_validation_sequences
    whole = loader.validation_batch(0, number).tokens_BT
    one_by_one = [loader.validation_batch(place, 1).tokens_BT for place in range(number)]
    assert torch.equal(torch.cat(one_by_one), whole)
    assert sorted(whole.tolist()) == sorted(prepared.validation_tokens_NL.tolist())
    again = Loader(prepared, sizes=BatchSizes(3), seed=5).validation_batch(0, number).tokens_BT
    assert torch.equal(again, whole)


def test_targets_and_inputs_follow_the_pieces() -> None:
    # Pieces [10 11 12], [20 21], one place of padding.
    batch = Batch(
        tokens_BT=torch.tensor([[10, 11, 12, 20, 21, 2]]),
        positions_BT=torch.tensor([[0, 1, 2, 0, 1, -1]]),
        pad_id=2,
    )
    no = IGNORE
    assert batch.targets(1).tolist() == [[11, 12, no, 21, no, no]]
    assert batch.targets(2).tolist() == [[12, no, no, no, no, no]]
    assert batch.targets(3).tolist() == [[no] * 6]
    assert batch.targets(9).tolist() == [[no] * 6]
    assert batch.inputs(0).tolist() == batch.tokens_BT.tolist()
    assert batch.inputs(1).tolist() == [[11, 12, 20, 21, 2, 2]]
    assert batch.inputs(9).tolist() == [[2] * 6]


def test_padding_before_a_piece_predicts_nothing() -> None:
    batch = Batch(tokens_BT=torch.tensor([[2, 10, 11]]), positions_BT=torch.tensor([[-1, 0, 1]]), pad_id=2)
    assert batch.targets(1).tolist() == [[IGNORE, 11, IGNORE]]


def test_targets_equal_the_rule_written_as_loops(prepared: Prepared) -> None:
    batch = Loader(prepared, sizes=BatchSizes(8), seed=0).batch(0, 0, 8)
    tokens, positions = batch.tokens_BT.tolist(), batch.positions_BT.tolist()
    for shift in (1, 2, 3):
        expected = [
            [
                row[i + shift]
                if i + shift < len(row) and place[i] >= 0 and place[i + shift] == place[i] + shift
                else IGNORE
                for i in range(len(row))
            ]
            for row, place in zip(tokens, positions, strict=True)
        ]
        assert batch.targets(shift).tolist() == expected
        assert (batch.targets(shift) != IGNORE).any()


def test_slices_outside_are_rejected(prepared: Prepared) -> None:
    loader = Loader(prepared, sizes=BatchSizes(4), seed=0)
    with pytest.raises(DataError, match="the global batch has 4 sequences, got the slice from 3 of 2"):
        loader.batch(0, 3, 2)
    with pytest.raises(DataError, match="the validation part has"):
        loader.validation_batch(loader.num_validation_sequences, 1)


def test_a_validation_part_below_a_batch_is_filled_with_empty_sequences(prepared: Prepared) -> None:
    number = len(prepared.validation_tokens_NL)
    loader = Loader(prepared, sizes=BatchSizes(number + 3), seed=5)
    whole = loader.validation_batch(0, number + 3)
    assert torch.equal(whole.tokens_BT[:number], loader.validation_batch(0, number).tokens_BT)
    assert (whole.tokens_BT[number:] == whole.pad_id).all()
    assert (whole.targets(1)[number:] == IGNORE).all()
    assert torch.equal(loader.validation_batch(number + 1, 2).tokens_BT, whole.tokens_BT[number + 1 :])
