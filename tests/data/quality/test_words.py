"""Tests of words: they are those of a plain search, and their n-grams are equal exactly if their words are."""

import random
import re
import unicodedata

import numpy as np
import pytest

from data.quality import words as module
from data.quality.words import split_words

ODD = [
    "",
    " ",
    "Hello, World! It's 3.14",
    "don't_stop",
    "émile ÉMILE e\u0301mile",
    "\ud800 lone",
    "ｆｕｌｌ\u00a0width",
]


def plain_words(document: str) -> list[str]:
    return re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", document).lower())


def random_documents(seed: int) -> list[str]:
    rng = random.Random(seed)
    vocabulary = ["the", "The", "a", "B7", "straße", "ünder", "ж", "x" * 40, "12"]
    separators = [" ", "\n", ", ", "--", " \u2014 ", "\t(", "_"]
    return [
        "".join(rng.choice(vocabulary) + rng.choice(separators) for _ in range(rng.randrange(40))) for _ in range(60)
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 8, 13])
def test_ngrams_are_equal_exactly_if_their_words_are(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    documents = [*ODD, *random_documents(length)]
    monkeypatch.setattr(module, "_PIECE_CHARACTERS", 160)  # longer documents are cut at white space
    monkeypatch.setattr(module, "_GROUP_CHARACTERS", 100)
    ngrams = split_words(documents).ngrams(length)
    hash_of: dict[tuple[str, ...], int] = {}
    for document, start, end in zip(documents, ngrams.ends - ngrams.counts, ngrams.ends, strict=True):
        words = plain_words(document) if "\ud800" not in document else ["\ud800", "lone"]
        runs = [tuple(words[first : first + length]) for first in range(len(words) - length + 1)]
        hashes = ngrams.hashes[start:end].tolist()
        assert len(hashes) == len(runs), document
        assert all(hash_of.setdefault(run, value) == value for run, value in zip(runs, hashes, strict=True)), document
    assert len(set(hash_of.values())) == len(hash_of)


def test_words_of_a_document_do_not_depend_on_the_others() -> None:
    documents = [*ODD, *random_documents(0), "中文字符 test かな 🙂🙂"]
    together = split_words(documents)
    alone = [split_words([document]) for document in documents]
    assert np.array_equal(together.hashes, np.concatenate([words.hashes for words in alone]))
    assert together.counts.tolist() == [len(words.hashes) for words in alone]
    assert together.num_letters.tolist() == [words.num_letters.item() for words in alone]
    assert len(alone[-1].hashes) == 4 + 1 + 2 + 4  # characters of scripts without spaces are words
