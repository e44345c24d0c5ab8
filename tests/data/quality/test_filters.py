"""Tests of filters: each limit drops its documents, and configurations are refused in one line."""

import importlib.util

import numpy as np
import pytest

from data.corpus import DataError
from data.quality.filters import FilterConfig, Inspector, filter_config
from tests.data.quality.test_duplicates import Writer


def reasons(config: FilterConfig | None, documents: list[str]) -> list[str | None]:
    return Inspector(config, None, with_sketches=False).inspect(documents).reasons


def test_each_limit_drops_its_documents_and_no_others() -> None:
    writer = Writer(6)
    prose = [writer.document() for _ in range(20)]
    code = "def area(radius):\n    return 3.14 * radius ** 2\n\n\nassert area(1) == 3.14\n"
    bad = {
        "min_words": "only four words here",
        "max_words": writer.words(101),
        "max_symbol_share": "#### |---|---|---| **** ==== a b c d e //// ----",
        "max_repeated_line_share": "the same line every time\n" * 9 + writer.words(10),
        "max_repeated_ngram_share": "one two three four five six seven eight nine ten " * 9,
    }
    config = FilterConfig(max_words=100)
    found = reasons(config, [*bad.values(), code, "中文没有空格也是文字"])
    assert found == [*bad, None, None]
    assert reasons(FilterConfig(), prose) == [None] * 20
    assert reasons(None, list(bad.values())) == [None] * 5


def test_hashes_ignore_case_and_space_and_nothing_else() -> None:
    inspector = Inspector(None, None, with_sketches=False)
    same = ["A b, c\n d", "a B,\tC d ", "a b, c d", "a b,\u00a0c d"]
    other = ["a b c d", "a b, cd", "a b, c d d", "a b; c d", "a b, c é", "a b, c 1.5", "a b, c 15", ""]
    hashes = inspector.inspect([*same, *other]).hashes
    assert len(np.unique(hashes[:4], axis=0)) == 1
    assert len(np.unique(hashes[3:], axis=0)) == 1 + len(other)
    assert np.array_equal(hashes[4:], inspector.inspect(other).hashes)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"min_word": 3}, "mix.yaml: filters.min_word: must be one of the fields .* nearest valid: min_words"),
        ({"min_words": 2.5}, "yaml: filters.min_words: must be a whole number 0 or above, is 2.5; nearest valid: 2"),
        ({"max_symbol_share": 40}, "max_symbol_share: must be a number between 0 and 1, is 40; nearest valid: 1"),
        ({"max_words": 3}, "max_words: must be at least min_words, 5, is 3; nearest: 5"),
        ({"datatrove": ["gopher"]}, "datatrove.0.: must be .* or .*, is gopher; nearest valid: gopher_quality"),
        ([], "mix.yaml: filters: must be an object"),
    ],
)
def test_wrong_filters_are_refused(value: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        filter_config(value, "mix.yaml: filters")


def test_filters_of_datatrove_decide_or_name_what_is_missing() -> None:
    value = {"datatrove": ["fineweb"], "min_words": None}
    if importlib.util.find_spec("datatrove") is None:
        with pytest.raises(DataError, match=r"fineweb needs the package datatrove, .* pip install '.\[datatrove\]'"):
            filter_config(value, "filters")
        return
    good = "\n".join(f"This is sentence number {number}, and it ends as a sentence should." for number in range(9))
    assert reasons(filter_config(value, "filters"), [good, "no\nend\nof\nlines"]) == [None, "fineweb"]
