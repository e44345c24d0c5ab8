"""Tests of text streams: pieces join to the text, none ends within a character, and a stop string ends the text."""

import random

import pytest

from data.tokenizer import Tokenizer
from infer.text import REPLACEMENT, TextStream

TOKENIZER = Tokenizer.train(["def f(x):\n    return x + 1\n", "naïve café 🙂 日本語 text"] * 9, 290)
TEXTS = ["def g(y): return 2", "žluťoučký kůň", "日本語🙂🙂 e\u0301", "a\ufffdb", "", "<｜User｜>"]


def pieces_of(stream: TextStream, tokens: list[int]) -> list[str]:
    return [*(stream.push(token) for token in tokens), stream.close()]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_the_text_and_whole_characters(text: str) -> None:
    tokens = TOKENIZER.encode(text)
    pieces = pieces_of(TextStream(TOKENIZER.decode), tokens)
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in piece for piece in pieces)
    assert all("".join(pieces[: at + 1]) == text[: len("".join(pieces[: at + 1]))] for at in range(len(pieces)))


def test_character_comes_with_its_last_byte() -> None:
    tokens = TOKENIZER.encode("ů")
    assert len(tokens) == 2
    stream = TextStream(TOKENIZER.decode)
    assert [stream.push(token) for token in tokens] == ["", "ů"]


def test_pieces_of_any_tokens_are_their_text() -> None:
    """The texts have special tokens, invalid bytes, and incomplete characters at the end."""
    chance = random.Random(5)
    for _ in range(300):
        tokens = [chance.randrange(TOKENIZER.vocab_size) for _ in range(chance.randrange(30))]
        pieces = pieces_of(TextStream(TOKENIZER.decode), tokens)
        assert "".join(pieces) == TOKENIZER.decode(tokens)


def test_stop_string_ends_as_in_the_whole_text() -> None:
    chance = random.Random(6)
    stopped = 0
    for _ in range(400):
        text = "".join(chance.choice("abů") for _ in range(chance.randrange(20)))
        stops = ["".join(chance.choice("abů") for _ in range(chance.randrange(1, 5))) for _ in range(2)]
        stream = TextStream(TOKENIZER.decode, stops)
        pieces = pieces_of(stream, TOKENIZER.encode(text))
        # The stop text that is complete first ends the text; of several the one that begins first.
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        first = min(ends)[0] if ends else 0
        begins = [text[:first].find(stop) for stop in stops if stop in text[:first]]
        assert stream.is_stopped == bool(ends)
        assert "".join(pieces) == (text[: min(begins)] if ends else text)
        stopped += stream.is_stopped
    assert 100 < stopped < 400


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(lambda ids: "".join(chr(number) for number in ids), ["\n\ndef"])
    assert [stream.push(ord(letter)) for letter in "x\n\ny\n\nde"] == ["x", "", "", "\n\ny", "", "", "", ""]
    assert not stream.is_stopped
    assert stream.close() == "\n\nde"
