"""Tests of fill-in-the-middle: every character is kept, the order is PSM, and only seed and index decide."""

from hypothesis import given, settings
from hypothesis import strategies as st

from data.encode import cut_for_fim, join_fim_tokens
from data.tokenizer import Tokenizer


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(), st.integers(0, 2**63), st.integers(0, 10**9))
def test_fim_keeps_every_character(text: str, seed: int, index: int) -> None:
    parts = cut_for_fim(text, 1.0, seed, index)
    assert parts is not None
    assert parts.prefix + parts.middle + parts.suffix == text
    assert parts == cut_for_fim(text, 1.0, seed, index)
    assert cut_for_fim(text, 0.0, seed, index) is None


def test_fim_turns_its_share_and_a_higher_rate_turns_more_of_the_same() -> None:
    text = "0123456789" * 20
    turned = {rate: {n for n in range(20_000) if cut_for_fim(text, rate, 5, n)} for rate in (0.1, 0.5)}
    # Five standard deviations of a binomial count.
    assert abs(len(turned[0.1]) - 2000) < 5 * (20_000 * 0.1 * 0.9) ** 0.5
    assert turned[0.1] < turned[0.5]
    assert turned[0.1] != {n for n in range(20_000) if cut_for_fim(text, 0.1, 6, n)}


def test_fim_cuts_are_uniform_over_all_places() -> None:
    seen = set()
    for index in range(2000):
        parts = cut_for_fim("abc", 1.0, 0, index)
        assert parts is not None
        seen.add((len(parts.prefix), len(parts.middle)))
    assert seen == {(begin, end - begin) for begin in range(4) for end in range(begin, 4)}


def test_fim_tokens_are_in_psm_order_and_decode_to_the_text() -> None:
    tokenizer = Tokenizer.train(["one two three four"], 270)
    prefix, suffix, middle = (tokenizer.encode(text) for text in ("one ", " four", "two three"))
    ids = join_fim_tokens(tokenizer, prefix_ids=prefix, suffix_ids=suffix, middle_ids=middle)
    assert tokenizer.decode(ids) == "<｜fim▁begin｜>one <｜fim▁hole｜> four<｜fim▁end｜>two three"
