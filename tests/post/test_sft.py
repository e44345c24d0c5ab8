"""Tests that the recipe arithmetic_sft learns what arithmetic predicts; `tests.post.sft` checks three seeds."""

from pathlib import Path

import pytest

from tests.post.pass_rates import RecipeRates, measure_pass_rates
from tests.post.recipes import train_recipe
from tests.post.sft import problems_of_sft


@pytest.mark.long
def test_arithmetic_sft_learns_the_predicted_rate_of_right_answers(tmp_path: Path) -> None:
    rates = measure_pass_rates(train_recipe("arithmetic_sft", tmp_path, f"data.cache_dir={tmp_path / 'cache'}"))
    assert not problems_of_sft(rates), str(rates)


def test_bounds_of_sft_reject_rates_outside_of_them() -> None:
    right = RecipeRates(pass_at_1=0.6, pass_at_8=0.97, maj_at_8=0.91, greedy=0.95)
    assert problems_of_sft(right) == []
    wrong = RecipeRates(pass_at_1=0.66, pass_at_8=0.97, maj_at_8=0.91, greedy=0.89)
    assert problems_of_sft(wrong) == [
        "pass@1 must be from 0.55 to 0.65, is 0.660",
        "greedy must be at least 0.9, is 0.89",
    ]
