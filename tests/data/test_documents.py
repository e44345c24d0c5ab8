"""Tests the up-sampling of long documents: shares, the order as a function of the position, and errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from data.batch_sizes import BatchSizes
from data.config import DataConfig, LongDocumentsConfig
from data.corpus import DataError
from data.loader import Loader
from data.prepare import Prepared, prepare
from tests.tiny import tiny_config

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


def prepared(config: DataConfig, share: float, least: int = LONG) -> Prepared:
    return prepare(replace(config, long_documents=LongDocumentsConfig(min_document_tokens=least, share=share)), LENGTH)


def loader(data: Prepared, sequences: int = 10) -> Loader:
    return Loader(data, sizes=BatchSizes(sequences, LENGTH, None), seed=3)


@pytest.mark.parametrize("share", [0.1, 0.35, 0.5, 1.0])
def test_steps_have_the_share_of_sequences_with_long_documents(config: DataConfig, share: float) -> None:
    data = prepared(config, share)
    long = data.long_documents
    assert long is not None
    texts = [data.tokenizer.decode(row.tolist()) for row in data.train_tokens_NL]
    is_long = np.array(["x" in text for text in texts])
    assert is_long.tolist() == [True] * long.num_sequences + [False] * long.other_sequences
    read = np.concatenate([loader(data).sample_ids(step) for step in range(40)])
    for end in range(1, len(read) + 1):
        assert abs(is_long[read[:end]].sum() - share * end) < 1
    shares = [loader(data).long_document_share(step) for step in range(40)]
    assert np.mean([each for each in shares if each is not None]) == pytest.approx(long.read_share, abs=0.02)
    assert long.own_share == pytest.approx(long.tokens / data.train_tokens)


def test_order_is_a_function_of_the_position(config: DataConfig) -> None:
    """Slices, batch sizes and a resumed run read the same sequences, each once per epoch of its kind."""
    data = prepared(config, 0.4)
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
    found = [prepared(config, 0.3), prepared(config, 0.3), prepared(config, 0.6), prepare(config, LENGTH)]
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
        prepared(config, share, least)


def test_only_long_documents_is_a_share_of_one(config: DataConfig, tmp_path: Path) -> None:
    data = prepared(config, 1.0, least=1)
    assert data.long_documents is not None
    assert data.long_documents.read_share == 1
    assert len(loader(data).sample_ids(100)) == 10
