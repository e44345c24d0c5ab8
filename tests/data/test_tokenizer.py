"""Tests of the tokenizer: nothing is lost, special tokens come only from ids, training depends only on the text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.corpus import DataError
from data.tokenizer import MIN_VOCAB_SIZE, SPECIAL_TOKENS, Tokenizer

TEXTS = [f"def function_{number}(value):\n    return value + {number * 37}  # 数字 é\n" for number in range(200)]
TOKENIZER = Tokenizer.train(TEXTS, 400)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_categories=("Cs",))))
def test_any_text_round_trips(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_special_ids_are_the_first_in_their_order() -> None:
    ids = [TOKENIZER.special_id(token) for token in SPECIAL_TOKENS]
    assert ids == list(range(8))
    assert ids[:3] == [TOKENIZER.begin_of_sentence_id, TOKENIZER.end_of_sentence_id, TOKENIZER.pad_id]
    assert TOKENIZER.decode(ids) == "".join(SPECIAL_TOKENS)
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == ""


def test_text_never_becomes_a_special_token(tmp_path: Path) -> None:
    TOKENIZER.save(tmp_path / "tokenizer.json")
    for tokenizer in (TOKENIZER, Tokenizer.load(tmp_path / "tokenizer.json")):
        for token in SPECIAL_TOKENS:
            text = f"before {token} after"
            ids = tokenizer.encode(text)
            assert min(ids) >= len(SPECIAL_TOKENS)
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode_batch([text]) == [ids]


def test_training_reaches_the_size_and_is_reproducible(tmp_path: Path) -> None:
    assert TOKENIZER.vocab_size == 400
    again = Tokenizer.train(iter(TEXTS), 400)
    again.save(tmp_path / "again.json")
    TOKENIZER.save(tmp_path / "first.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "first.json").read_bytes()
    assert len(again.encode(TEXTS[0])) < len(TEXTS[0].encode()) / 2


def test_a_tiny_corpus_gives_fewer_tokens_and_too_small_a_size_is_rejected() -> None:
    assert MIN_VOCAB_SIZE < Tokenizer.train(["abab abab"], 4096).vocab_size < 300
    with pytest.raises(DataError, match=r"data\.tokenizer_vocab_size: must be at least 264 .* got 263; nearest: 264"):
        Tokenizer.train(["abab"], MIN_VOCAB_SIZE - 1)


def test_saved_is_loaded_and_a_broken_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TOKENIZER.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.vocab_size == TOKENIZER.vocab_size
    assert loaded.encode_batch(TEXTS) == TOKENIZER.encode_batch(TEXTS) == [TOKENIZER.encode(text) for text in TEXTS]
    path.write_text("{}", encoding="utf-8")
    for broken in (path, tmp_path / "missing.json"):
        with pytest.raises(DataError, match=broken.name):
            Tokenizer.load(broken)


def test_digits_are_split_by_three_and_line_breaks_join_punctuation() -> None:
    tokenizer = Tokenizer.train(["1234567890);\n"] * 50, 300)
    pieces = [tokenizer.decode([token]) for token in tokenizer.encode("1234567);\n")]
    assert pieces == ["123", "456", "7", ");\n"]
