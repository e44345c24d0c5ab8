"""A step's batch depends only on its number; sizes, long documents and whole samples."""

import random
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from data.config import BatchRamp, BatchSizes, DataConfig, LongDocumentsConfig, ramp_sizes
from data.corpus import DataError
from data.loader import IGNORE, Batch, Loader
from data.mix.mixture import single_order
from data.pack import WEIGHTS, pack_samples
from data.prepare import prepare
from data.registry import SamplePiece, TrainingSample
from data.shards.open import Prepared
from tests.tiny import data_config, tiny_config


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp("text")
    rng = random.Random(0)
    lines = [f'{{"text": "{" ".join(str(rng.random()) for _ in range(rng.randrange(1, 9)))}"}}' for _ in range(150)]
    (folder / "text").mkdir()
    (folder / "text" / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    config = data_config(folder, fim_rate=0.1)
    return prepare(config, 32)


@pytest.mark.parametrize(("num_sequences", "global_batch"), [(1, 3), (7, 2), (12, 4), (5, 13)])
def test_every_sample_occurs_exactly_once_per_epoch(num_sequences: int, global_batch: int) -> None:
    order = single_order(num_sequences, seed=11)
    steps = [order.range(step * global_batch, global_batch) for step in range(6 * num_sequences)]
    stream = np.concatenate(steps)
    assert stream.dtype == np.int64
    for epoch in range(len(stream) // num_sequences):
        seen = stream[epoch * num_sequences : (epoch + 1) * num_sequences]
        assert sorted(seen.tolist()) == list(range(num_sequences))


def test_order_depends_on_the_place_alone() -> None:
    stream = single_order(10, seed=3).range(0, 200)
    fresh = single_order(10, seed=3)
    # Another batch size reads the same stream: a run with a changed global batch continues where the old one stopped.
    for first, count in ((136, 8), (16, 8), (16, 8), (152, 8), (0, 8), (48, 16)):
        assert fresh.range(first, count).tolist() == stream[first : first + count].tolist()


def test_order_is_the_same_on_every_machine_and_differs_by_seed_and_epoch() -> None:
    assert single_order(8, seed=1).range(0, 8).tolist() == [6, 3, 5, 4, 7, 2, 0, 1]
    first = single_order(100, seed=1).range(0, 100).tolist()
    assert first != single_order(100, seed=2).range(0, 100).tolist()
    assert first != single_order(100, seed=1).range(100, 100).tolist()
    assert sorted(single_order(100, seed=-5).range(100 * 2**40, 100).tolist()) == list(range(100))


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 12])
def test_any_splitting_into_ranks_reads_the_same_samples(prepared: Prepared, num_ranks: int) -> None:
    whole = Loader(prepared, sizes=BatchSizes(12))
    share = 12 // num_ranks
    for step in (0, 1, 9):
        expected = whole.batch(step, 0, 12)
        parts = [Loader(prepared, sizes=BatchSizes(12)).batch(step, rank * share, share) for rank in range(num_ranks)]
        assert torch.equal(torch.cat([part.tokens_BT for part in parts]), expected.tokens_BT)
        assert torch.equal(torch.cat([part.positions_BT for part in parts]), expected.positions_BT)


def test_batches_are_the_ordered_rows_of_the_arrays(prepared: Prepared) -> None:
    loader = Loader(prepared, sizes=BatchSizes(6))
    batch = loader.batch(3, 0, 6)
    indices = prepared.order.range(18, 6)
    assert batch.tokens_BT.dtype == batch.positions_BT.dtype == torch.int64
    assert batch.tokens_BT.tolist() == prepared.train.tokens_NL[indices].tolist()
    assert batch.positions_BT.tolist() == prepared.train.positions_NL[indices].tolist()


def test_validation_is_every_sequence_once_in_a_fixed_order(prepared: Prepared) -> None:
    loader = Loader(prepared, sizes=BatchSizes(6))
    number = loader.num_validation_sequences
    whole = loader.validation_batch(0, number).tokens_BT
    one_by_one = [loader.validation_batch(place, 1).tokens_BT for place in range(number)]
    assert torch.equal(torch.cat(one_by_one), whole)
    assert sorted(whole.tolist()) == sorted(prepared.validation.tokens_NL[:].tolist())
    again = Loader(prepared, sizes=BatchSizes(3)).validation_batch(0, number).tokens_BT
    assert torch.equal(again, whole)


def test_targets_and_inputs_follow_the_pieces() -> None:
    # Pieces [10 11 12], [20 21], one place of padding.
    batch = Batch(
        tokens_BT=torch.tensor([[10, 11, 12, 20, 21, 2]]), positions_BT=torch.tensor([[0, 1, 2, 0, 1, -1]]), pad_id=2
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
    batch = Loader(prepared, sizes=BatchSizes(8)).batch(0, 0, 8)
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
    loader = Loader(prepared, sizes=BatchSizes(4))
    with pytest.raises(DataError, match="the global batch has 4 sequences, got the slice from 3 of 2"):
        loader.batch(0, 3, 2)
    with pytest.raises(DataError, match="the validation part has"):
        loader.validation_batch(loader.num_validation_sequences, 1)


def test_a_validation_part_below_a_batch_is_filled_with_empty_sequences(prepared: Prepared) -> None:
    number = len(prepared.validation.tokens_NL)
    loader = Loader(prepared, sizes=BatchSizes(number + 3))
    whole = loader.validation_batch(0, number + 3)
    assert torch.equal(whole.tokens_BT[:number], loader.validation_batch(0, number).tokens_BT)
    assert (whole.tokens_BT[number:] == whole.pad_id).all()
    assert (whole.targets(1)[number:] == IGNORE).all()
    assert torch.equal(loader.validation_batch(number + 1, 2).tokens_BT, whole.tokens_BT[number + 1 :])


def test_batch_sizes_without_a_ramp_are_one() -> None:
    sizes = BatchSizes(12, 10)
    assert sizes.sizes == (12,)
    assert [sizes.sequences(step) for step in (0, 7, 10**9)] == [12] * 3
    assert sizes.sequences_before(5) == 60
    assert sizes.tokens_before(5) == 600


@pytest.mark.parametrize(
    ("last", "length", "ramp"),
    [
        (16, 10, BatchRamp(start_sequences=4, end_tokens=777, num_sizes=4)),
        (5, 3, BatchRamp(start_sequences=1, end_tokens=1, num_sizes=5)),
        (7, 1, BatchRamp(start_sequences=6, end_tokens=1000, num_sizes=2)),
    ],
)
def test_batch_sizes_of_a_ramp_leave_no_sequence_out_and_read_none_twice(
    last: int, length: int, ramp: BatchRamp
) -> None:
    sizes, read = BatchSizes(last, length, ramp), 0
    seen = []
    for step in range(1200):
        assert sizes.sequences_before(step) == read
        assert sizes.tokens_before(step) == read * length
        if read * length < ramp.end_tokens:
            assert sizes.sequences(step) < last
        seen.append(sizes.sequences(step))
        read += seen[-1]
    assert all(later >= earlier for earlier, later in pairwise(seen))
    assert set(seen) == set(sizes.sizes) <= set(ramp_sizes(last, ramp))
    assert seen[0] == ramp.start_sequences
    assert seen[-1] == last
    grown = seen.index(last)
    assert sizes.tokens_before(grown) < ramp.end_tokens + ramp.num_sizes * last * length


def test_batch_sizes_of_deepseek_v3_reach_the_last_after_469_billion_tokens() -> None:
    sizes = BatchSizes(15360, 4096, BatchRamp(start_sequences=3072, end_tokens=469 * 10**9, num_sizes=5))
    assert sizes.sizes == (3072, 6144, 9216, 12288, 15360)
    grown = next(step for step in range(0, 10**5) if sizes.sequences(step) == 15360)
    assert 469e9 <= sizes.tokens_before(grown) < 469e9 + 5 * 63e6
    assert 15_000 < grown < 20_000


LENGTH, LONG = 32, 100


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Few long documents among many short ones; text of a document is one repeated letter."""
    folder = tmp_path_factory.mktemp("long")
    (folder / "text").mkdir()
    for number in range(40):
        text = "x y " * 120 if number % 8 == 0 else "a b " * 6
        (folder / "text" / f"{number:02}.txt").write_text(text, encoding="utf-8")
    return replace(tiny_config(folder).data, fim_rate=0.0, tokenizer_vocab_size=280)


def prepared_of_long(config: DataConfig, share: float, least: int = LONG) -> Prepared:
    return prepare(replace(config, long_documents=LongDocumentsConfig(min_document_tokens=least, share=share)), LENGTH)


def loader(data: Prepared, sequences: int = 10) -> Loader:
    return Loader(data, sizes=BatchSizes(sequences, LENGTH, None))


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 1.0])
def test_steps_have_the_share_of_sequences_with_long_documents(config: DataConfig, share: float) -> None:
    data = prepared_of_long(config, share)
    long = data.long_documents
    assert long is not None
    texts = [data.tokenizer.decode(row.tolist()) for row in data.train.tokens_NL]
    is_long = np.array(["x" in text for text in texts])
    assert is_long.tolist() == [True] * long.num_sequences + [False] * long.other_sequences
    read = np.concatenate([loader(data).sample_ids(step) for step in range(40)])
    for end in range(1, len(read) + 1):
        assert abs(is_long[read[:end]].sum() - share * end) < 1
    shares = [loader(data).long_document_share(step) for step in range(40)]
    assert np.mean([each for each in shares if each is not None]) == pytest.approx(long.read_share, abs=0.02)
    assert long.own_share == pytest.approx(long.tokens / data.train.num_tokens)


def test_order_is_a_function_of_the_position(config: DataConfig) -> None:
    """Slices, batch sizes and a resumed run read the same sequences, each once per epoch of its kind."""
    data = prepared_of_long(config, 0.4)
    long = data.long_documents
    assert long is not None
    whole = [sample for step in range(30) for sample in loader(data).sample_ids(step)]
    assert whole == [sample for step in range(100) for sample in loader(data, 3).sample_ids(step)]
    firsts = [sample for sample in whole if sample < long.num_sequences][: long.num_sequences]
    assert sorted(firsts) == list(range(long.num_sequences))
    half = loader(data).batch(7, 4, 3)
    assert half.tokens_BT.tolist() == loader(data).batch(7, 0, 10).tokens_BT[4:7].tolist()


def test_without_up_sampling_every_sequence_is_read_once_per_epoch(config: DataConfig) -> None:
    data = prepare(config, LENGTH)
    assert data.long_documents is None
    assert loader(data).long_document_share(0) is None


def test_share_belongs_to_the_fingerprint(config: DataConfig) -> None:
    """A run that resumes with another share would read other samples."""
    found = [
        prepared_of_long(config, 0.3),
        prepared_of_long(config, 0.3),
        prepared_of_long(config, 0.6),
        prepare(config, LENGTH),
    ]
    assert found[0].fingerprint == found[1].fingerprint
    assert len({each.fingerprint for each in found}) == 3


@pytest.mark.parametrize(
    ("share", "least", "words"),
    [
        (0.5, 10_000, r"min_document_tokens: at least one training document must .* longest has \d+, is 10000; near"),
        (0.5, 1, "share: must be 1, because every training document has at least 1 tokens, is 0.5; nearest: 1"),
    ],
)
def test_up_sampling_that_cannot_be_is_an_error(config: DataConfig, share: float, least: int, words: str) -> None:
    with pytest.raises(DataError, match=words):
        prepared_of_long(config, share, least)


def test_only_long_documents_is_a_share_of_one(config: DataConfig, tmp_path: Path) -> None:
    data = prepared_of_long(config, 1.0, least=1)
    assert data.long_documents is not None
    assert data.long_documents.read_share == 1
    assert len(loader(data).sample_ids(100)) == 10


def sample(key: str, *sizes: int, may_be_cut: bool = False, first_target: int = 0) -> TrainingSample:
    """Returns a sample whose tokens count from 1 and whose weights are 1 from `first_target` on."""
    pieces = []
    for size in sizes:
        weights = (np.arange(size) >= first_target).astype(np.float32)
        weights[-1] = 0
        tops = np.arange(size * 2, dtype=np.int32).reshape(size, 2)
        pieces.append(SamplePiece(tokens=np.arange(1, size + 1), values={WEIGHTS: weights, "tops": tops}))
    return TrainingSample(key=key, pieces=tuple(pieces), may_be_cut=may_be_cut)


def test_pieces_of_a_sample_stay_together_and_keep_their_values() -> None:
    packed = pack_samples([sample("a", 3, 2), sample("b", 4), sample("c", 2, 2)], 6, pad_id=0, vocab_size=10)
    assert packed.counts.kept == 3
    rows = {tuple(row) for row in packed.tokens_NL.tolist()}
    assert rows == {(1, 2, 3, 1, 2, 0), (1, 2, 3, 4, 0, 0), (1, 2, 1, 2, 0, 0)}
    row = packed.tokens_NL.tolist().index([1, 2, 3, 1, 2, 0])
    assert packed.positions_NL[row].tolist() == [0, 1, 2, 0, 1, -1]
    assert packed.values[WEIGHTS][row].tolist() == [1, 1, 0, 1, 0, 0]
    assert packed.values["tops"][row].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [0, 0]]


def test_long_samples_are_cut_if_they_may_be_and_else_dropped() -> None:
    samples = [
        sample("cut", 8, may_be_cut=True),
        sample("dropped", 8),
        sample("prompt too long", 8, may_be_cut=True, first_target=5),
        sample("pair", 3, 4),
    ]
    packed = pack_samples(samples, 6, pad_id=0, vocab_size=10)
    assert (packed.counts.kept, packed.counts.cut, packed.counts.dropped) == (1, 1, 3)
    assert packed.tokens_NL.tolist() == [[1, 2, 3, 4, 5, 6]]
    assert packed.values[WEIGHTS].tolist() == [[1, 1, 1, 1, 1, 0]]
