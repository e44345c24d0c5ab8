"""Tests the bounds of the laws of post-training, which the modules of this folder measure for three seeds."""

from pathlib import Path

import pytest

from bench.post.policies import (
    problems_of_sft,
    rate_votes,
)
from bench.post.recipes import measure_pass_rates, train_recipe


@pytest.mark.exhaustive
def test_arithmetic_sft_learns_the_predicted_rate_of_right_answers(tmp_path: Path) -> None:
    rates = measure_pass_rates(train_recipe("arithmetic_sft", tmp_path, f"data.cache_dir={tmp_path / 'cache'}"))
    assert not problems_of_sft(rates), str(rates)


def test_votes_are_rated_as_answers_and_as_judges() -> None:
    voters = [["12", "12", "21", "12"], ["9", "", "8", "8"], ["", "", "", ""]]
    judged = [["12", "21", "13"], ["9", "8"], ["", "7"]]
    rates = rate_votes(["12", "8", "7"], voters, judged)
    # Of size 1: 12, 9 and none; of size 4: 12, 8 and none. Judged are 12, 21; 8, 9; and 7, which has no wrong answer.
    assert [rates.answers[size] for size in (1, 4)] == pytest.approx([1 / 3, 2 / 3])
    assert [rates.judgements[size] for size in (1, 4)] == pytest.approx([2 / 5, 4 / 5])
