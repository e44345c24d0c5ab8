"""Tests the bounds of the laws of post-training, which the modules of this folder measure for three seeds."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.programs.post.policies import (
    Stage,
    VoteRates,
    problems_of_collapse,
    problems_of_distillation,
    problems_of_grpo,
    problems_of_sft,
    problems_of_votes,
    rate_votes,
)
from tests.programs.post.recipes import RecipeRates, measure_pass_rates, train_recipe


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


def test_bound_of_distillation_rejects_a_student_unlike_its_teacher() -> None:
    teacher = RecipeRates(pass_at_1=0.6, pass_at_8=0.97, maj_at_8=0.91, greedy=0.95)
    assert problems_of_distillation(teacher, replace(teacher, pass_at_1=0.66)) == []
    assert problems_of_distillation(teacher, replace(teacher, pass_at_1=0.5)) == [
        "pass@1 must differ by at most 0.08 from the teacher's, differs by 0.100"
    ]


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
