"""Tests the bounds of arithmetic_grpo; `python -m tests.post.grpo` trains with three seeds."""

from dataclasses import replace

from tests.post.grpo import Stage, problems_of_collapse, problems_of_grpo
from tests.post.pass_rates import RecipeRates

START = RecipeRates(pass_at_1=0.6, pass_at_8=0.97, maj_at_8=0.9, greedy=0.94)


def test_bounds_of_grpo_reject_each_number_outside_of_them() -> None:
    early = Stage(rates=replace(START, pass_at_1=0.75), kl=0.05)
    late = Stage(rates=replace(START, pass_at_1=0.83), kl=0.1)
    assert problems_of_grpo(START, early, late) == []
    assert problems_of_grpo(START, Stage(rates=START, kl=0.11), Stage(rates=replace(START, pass_at_8=0.9), kl=0.1)) == [
        "pass@1 must rise by 0.12 in 40 steps, rises by 0.000",
        "pass@1 must be 0.82 after 100 steps, is 0.600",
        "KL must be at most 0.1 after 40 steps, is 0.110",
        "pass@8 must keep 0.97 within 0.03, is 0.90",
    ]


def test_bounds_of_a_collapse_compare_the_last_20_steps_with_the_first() -> None:
    assert problems_of_collapse([0.6, 0.1]) == []
    assert problems_of_collapse([0.6] + [0.31] * 20) == []
    assert problems_of_collapse([0.6] + [0.29] * 20) == ["mean reward 0.290 is below half of 0.600"]
