"""Tests how votes are rated, and the bounds of law C5; `tests.post.votes` measures them."""

import pytest

from tests.post.votes import VoteRates, problems_of_votes, rate_votes


def test_votes_are_rated_as_answers_and_as_judges() -> None:
    voters = [["12", "12", "21", "12"], ["9", "", "8", "8"], ["", "", "", ""]]
    judged = [["12", "21", "13"], ["9", "8"], ["", "7"]]
    rates = rate_votes(["12", "8", "7"], voters, judged)
    # Of size 1: 12, 9 and none; of size 4: 12, 8 and none. Judged are 12, 21; 8, 9; and 7, which has no wrong answer.
    assert [rates.answers[size] for size in (1, 4)] == pytest.approx([1 / 3, 2 / 3])
    assert [rates.judgements[size] for size in (1, 4)] == pytest.approx([2 / 5, 4 / 5])


def test_bounds_of_votes_reject_gains_below_them() -> None:
    rates = VoteRates(answers={1: 0.6, 8: 0.85}, judgements={1: 0.8, 6: 0.92})
    assert problems_of_votes(rates) == []
    low = VoteRates(answers={1: 0.6, 8: 0.75}, judgements={1: 0.8, 6: 0.85})
    assert problems_of_votes(low) == [
        "maj@8 - maj@1 must be at least 0.2, is 0.150",
        "judge@6 - judge@1 must be at least 0.1, is 0.050",
    ]
