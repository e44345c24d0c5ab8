"""Splitting of tokens that join punctuation and line breaks."""

import pytest

from data.encode import DocumentEncoder, NewlineSplitter
from data.registry import Document
from data.tokenizer import Tokenizer

LINES = 'f(x);\n\nif a:\n\treturn {1: 2},\r\n "quoted."\n\nword\n! \n'
TOKENIZER = Tokenizer.train([LINES * 50], 400)
DOCUMENTS = [Document(key=f"file:{number}", text=LINES * (number % 7)) for number in range(400)]
KEYS = [document.key for document in DOCUMENTS]


def split(share: float, seed: int = 0) -> list[list[int]]:
    encoded = TOKENIZER.encode_flat([document.text for document in DOCUMENTS])
    result = NewlineSplitter(TOKENIZER, share, seed).split(encoded, KEYS)
    return [result.of(number).tolist() for number in range(len(DOCUMENTS))]


def joint(documents: list[list[int]]) -> int:
    """Counts tokens that end in a line break after something else than white space."""
    names = [TOKENIZER.decode([token]) for ids in documents for token in ids]
    return sum(name.endswith(("\n", "\r")) and bool(name.strip()) for name in names)


def test_text_stays_and_the_share_of_joint_tokens_is_split() -> None:
    whole = joint(split(0.0))
    assert whole > 4000
    for share in (0.05, 0.5, 1.0):
        parts = split(share)
        assert [TOKENIZER.decode(ids) for ids in parts] == [document.text for document in DOCUMENTS]
        # Five standard deviations of a binomial count.
        assert abs(joint(parts) - whole * (1 - share)) <= 5 * (whole * share * (1 - share)) ** 0.5
    assert split(0.0) == [TOKENIZER.encode(document.text) for document in DOCUMENTS]


def test_a_draw_depends_on_seed_and_key_and_not_on_other_documents() -> None:
    together = split(0.3)
    assert together != split(0.3, seed=1)
    splitter = NewlineSplitter(TOKENIZER, 0.3, 0)
    for number in (3, 4, 200):
        alone = splitter.split(TOKENIZER.encode_flat([DOCUMENTS[number].text]), [KEYS[number]])
        assert alone.ids.tolist() == together[number]
    assert together[3] != together[10]  # equal text, another key


@pytest.mark.parametrize("fim_rate", [0.0, 0.5])
def test_documents_keep_their_marks(fim_rate: float) -> None:
    plain = DocumentEncoder(TOKENIZER, fim_rate=fim_rate, seed=2).encode(DOCUMENTS)
    parts = DocumentEncoder(TOKENIZER, fim_rate=fim_rate, seed=2, newline_split=0.4).encode(DOCUMENTS)
    assert len(parts.ids) > len(plain.ids)
    for number in range(len(DOCUMENTS)):
        first, second = (TOKENIZER.decode(encoded.of(number).tolist()) for encoded in (plain, parts))
        assert first == second
