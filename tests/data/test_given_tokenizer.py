"""Tests of given tokenizers: their ids, settings in their files, and rejected tokenizers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data.batch_sizes import BatchSizes
from data.config import DataConfig
from data.corpus import DataError, FilesSource, read_documents
from data.loader import Loader
from data.prepare import check_config, prepare
from data.special_tokens import BEGIN_OF_SENTENCE, END_OF_SENTENCE, FIM_HOLE, PAD
from data.tokenizer import SPECIAL_TOKENS, USER, Tokenizer
from tests.data.released_tokenizer import VOCAB_SIZE, write_released
from tests.tiny import write_text

TEXTS = ["a1 b2 c3 d4 e5", "word word é数 other words"] * 20


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    write_text(tmp_path)
    return DataConfig(
        source=FilesSource(kind="files", paths=(str(tmp_path / "text"),), text_field="text"),
        tokenizer=str(write_released(tmp_path / "tokenizer.json", TEXTS)),
        tokenizer_bos=None,
        tokenizer_eos=None,
        tokenizer_pad=None,
        tokenizer_vocab_size=10,
        validation_fraction=0.2,
        fim_rate=0.3,
        seed=0,
        cache_dir=str(tmp_path / "cache"),
    )


def test_given_tokenizer_cuts_and_fills_no_text_and_takes_no_special_token_from_it(config: DataConfig) -> None:
    assert config.tokenizer is not None
    tokenizer = Tokenizer.load(Path(config.tokenizer))
    assert tokenizer.vocab_size == VOCAB_SIZE
    special = {tokenizer.special_id(token) for token in SPECIAL_TOKENS}
    assert max(special) > 2**16
    for text in ("", "a", f"word é {'数' * 40}", *(f"before {token} after" for token in SPECIAL_TOKENS)):
        ids = tokenizer.encode(text)
        assert tokenizer.encode_batch([text]) == [ids]
        assert not special & set(ids)
        assert tokenizer.decode(ids) == text
    assert max(tokenizer.encode(TEXTS[0])) > 2**16


def test_given_tokenizer_is_saved_byte_by_byte(config: DataConfig, tmp_path: Path) -> None:
    assert config.tokenizer is not None
    given = Tokenizer.load(Path(config.tokenizer))
    given.save(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == Path(config.tokenizer).read_bytes()
    assert Tokenizer.load(tmp_path / "again.json").fingerprint == given.fingerprint


def test_given_tokenizer_prepares_every_document_and_its_large_ids_stay(config: DataConfig) -> None:
    assert check_config(config) == VOCAB_SIZE
    prepared = prepare(dataclasses.replace(config, fim_rate=0.0), 512)
    assert prepared.tokenizer.vocab_size == VOCAB_SIZE
    assert prepared.train_tokens_NL.dtype == np.int32
    assert prepared.train_tokens_NL.max() >= 2**16
    rows = [*prepared.train_tokens_NL.tolist(), *prepared.validation_tokens_NL.tolist()]
    written = "".join(prepared.tokenizer.decode(row) for row in rows)
    for document in read_documents(config.source):
        assert f"{BEGIN_OF_SENTENCE}{document.text}" in written
    loader = Loader(prepared, sizes=BatchSizes(1), seed=0)
    batches = [loader.batch(step, 0, 1) for step in range(len(prepared.train_tokens_NL))]
    read = sorted(int(batch.tokens_BT.max()) for batch in batches)
    assert read == sorted(prepared.train_tokens_NL.max(axis=1).tolist())
    assert {batch.pad_id for batch in batches} == {2}


def test_given_tokenizer_counts_in_the_cache_by_its_content(config: DataConfig, tmp_path: Path) -> None:
    first = prepare(config, 16)
    entries = sorted(path.name for path in (tmp_path / "cache").iterdir())
    same = tmp_path / "elsewhere.json"
    same.write_bytes((tmp_path / "tokenizer.json").read_bytes())
    (tmp_path / "tokenizer.json").unlink()
    changed = dataclasses.replace(config, tokenizer=str(same), tokenizer_vocab_size=300)
    assert prepare(changed, 16).fingerprint == first.fingerprint
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == entries
    other = write_released(tmp_path / "tokenizer.json", ["b2 b2 a1 é"] * 9)
    assert prepare(dataclasses.replace(config, tokenizer=str(other)), 16).fingerprint != first.fingerprint
    assert prepare(dataclasses.replace(changed, tokenizer=None), 16).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("without", "fim_rate", "missing"),
    [
        ([], 0.3, ""),
        ([USER], 0.3, ""),
        ([FIM_HOLE, USER], 0.0, ""),
        ([FIM_HOLE], 0.3, ""),
        ([PAD], 0.0, ""),
        ([BEGIN_OF_SENTENCE], 0.0, ""),
        ([END_OF_SENTENCE], 0.0, "tokenizer_eos"),
    ],
)
def test_given_tokenizer_needs_an_end_of_sentence_alone(
    without: list[str], fim_rate: float, missing: str, config: DataConfig, tmp_path: Path
) -> None:
    write_released(tmp_path / "tokenizer.json", TEXTS, without=without)
    config = dataclasses.replace(config, fim_rate=fim_rate)
    if not missing:
        check_config(config)
        assert prepare(config, 16).train_tokens > 0
        return
    for refuse in (check_config, lambda config: prepare(config, 16)):
        with pytest.raises(DataError) as refused:
            refuse(config)
        text = str(refused.value)
        assert text.startswith(f"data.{missing}: ")
        assert str(tmp_path / "tokenizer.json") in text
        assert f"nearest valid: {BEGIN_OF_SENTENCE}, {PAD}" in text


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[1]", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_given_tokenizer_that_is_none_is_rejected_in_one_line(
    content: bytes | None, config: DataConfig, tmp_path: Path
) -> None:
    path = tmp_path / "other.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as refused:
        check_config(dataclasses.replace(config, tokenizer=str(path)))
    assert str(refused.value).startswith(f"data.tokenizer: {path} must be a saved tokenizer: ")
    assert "\n" not in str(refused.value)
