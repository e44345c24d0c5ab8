"""Tests the text of single tokens: together that of the answer, each character at the token that completes it."""

from pathlib import Path

from data.arithmetic.source import arithmetic_tokenizer
from data.tokenizer import Tokenizer
from train.report.viewer import TokenPieces, find_tokenizer


def test_pieces_are_the_text_of_the_answer_token_by_token() -> None:
    tokenizer = Tokenizer.train(["Sort the digits of a number. " * 20], 300)
    pieces = TokenPieces(tokenizer)
    for text in ("Sort the number.", " two  spaces\n", "a\u6f22\U0001f600b", "e\u0301"):
        ids = [*tokenizer.encode(text), tokenizer.end_of_sentence_id]
        found = pieces.of(ids)
        assert len(found) == len(ids)
        assert "".join(found[:-1]) == text
        assert found[-1] == tokenizer.token_names["eos_token"]


def test_character_belongs_to_the_token_that_completes_it() -> None:
    tokenizer = Tokenizer.train(["digits"], 300)
    ids = tokenizer.encode("a\U0001f600")
    assert TokenPieces(tokenizer).of(ids) == ["a", "", "", "", "\U0001f600"]
    assert TokenPieces(tokenizer).of(ids[:3]) == ["a", "\ufffd", "\ufffd"]  # cut within the character


def test_unknown_id_is_empty() -> None:
    assert TokenPieces(arithmetic_tokenizer()).of([19, 2**31 - 1]) == ["0", ""]


def test_newest_checkpoint_has_the_tokenizer_and_else_the_configuration(tmp_path: Path) -> None:
    given = tmp_path / "given.json"
    assert find_tokenizer(tmp_path, str(given)) is None
    given.write_text("{}")
    assert find_tokenizer(tmp_path, str(given)) == given
    for step in (2, 11):
        (tmp_path / "checkpoints" / f"step-{step:08}").mkdir(parents=True)
        (tmp_path / "checkpoints" / f"step-{step:08}" / "tokenizer.json").write_text("{}")
    assert find_tokenizer(tmp_path, None) == tmp_path / "checkpoints" / "step-00000011" / "tokenizer.json"
