"""Limits of rollouts: which steps they refuse, which cause they name, and from which weights a run continues."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from infer.config import GenerateError
from infer.scoring.score import ScoringError
from tests.rollouts import ROLLOUT
from tests.train.test_guard import STOP
from train.errors import StoppedError, UnscoredError
from train.guard.guard import Guard
from train.guard.recovery import ends_of_sampling
from train.guard.rollout_guard import RolloutFigures, RolloutGuard, read_figures
from train.rollout.config import RolloutLimits

NONE = RolloutLimits(kl=None, cut_share=None, equal_steps=None, entropy_share=None, reward_share=None, window_steps=3)
GOOD = RolloutFigures(reward=0.6, entropy=0.4, equal_share=0.25, cut_share=0.0, correct_share=0.6)
CUT = replace(GOOD, cut_share=0.97)
EQUAL = replace(GOOD, equal_share=1.0)


def open_guard(*history: RolloutFigures, **limits: float) -> RolloutGuard:
    """Opens a guard with limits, after some steps."""
    guard = RolloutGuard(replace(ROLLOUT, max_new_tokens=256, samples=8, limits=replace(NONE, **limits)))  # type: ignore[arg-type]
    guard.replace_history(history)
    return guard


def reason(guard: RolloutGuard, figures: RolloutFigures, step: int = 20) -> str:
    """Returns why a step is refused, or an empty text."""
    found = guard.judge_rollout(figures, step)
    return "" if found is None else found.reason


def test_limits_that_are_null_refuse_nothing() -> None:
    guard = open_guard(*[replace(EQUAL, cut_share=1.0, reward=-1.0, entropy=0.0)] * 9)
    assert guard.judge_rollout(replace(EQUAL, cut_share=1.0), 9) is None
    assert guard.judge_kl({"kl": 100.0}, 9, 1e-4) is None


def test_kl_above_its_limit_over_three_steps_names_the_learning_rate() -> None:
    guard = open_guard(kl=0.3)
    assert guard.judge_kl({"main": 9.0}, 8, 5e-4) is None
    # One high estimate is no divergence.
    assert [guard.judge_kl({"kl": kl}, 8, 5e-4) for kl in (0.85, 0.04, 0.01, 0.2, 0.4)] == [None] * 5
    found = guard.judge_kl({"kl": 0.6}, 8, 5e-4)
    assert found is not None
    assert found.reason == (
        "KL is 0.4 nats per token over 3 steps after 8 updates, above rollout.limits.kl=0.3: the learning rate of "
        "0.0005 is probably too high, or task.loss.kl_weight too low"
    )
    assert found.refusal(8).last_good == 5
    guard.replace_history([])
    assert guard.judge_kl({"kl": 0.85}, 6, 5e-4) is None


def test_cut_answers_in_all_steps_of_a_window_name_the_number_of_tokens() -> None:
    assert reason(open_guard(GOOD, CUT, cut_share=0.95), CUT) == ""
    assert reason(open_guard(CUT, CUT, cut_share=0.95), GOOD) == ""
    assert reason(open_guard(CUT, CUT, cut_share=0.95), CUT) == (
        "97 % of answers were cut at 256 tokens, at least rollout.limits.cut_share=0.95 in 3 steps in a row: raise "
        "rollout.max_new_tokens"
    )


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"cut_share": 1.0}, "100 % of answers were cut at 256 tokens: raise rollout.max_new_tokens"),
        ({"correct_share": 1.0}, "all answers are correct: the prompts are too easy by now"),
        (
            {"correct_share": 0.0, "reward": 0.1},
            "no answer is judged correct, the mean reward is 0.1: the prompts are too hard",
        ),
        ({}, "60 % of answers are correct, always to the same prompts: raise rollout.samples=8"),
    ],
)
def test_equal_rewards_of_all_groups_name_their_cause(changes: dict[str, float], cause: str) -> None:
    figures = replace(EQUAL, **changes)
    assert reason(open_guard(*[figures] * 2, equal_steps=4), figures) == ""
    assert reason(open_guard(*[figures] * 2, GOOD, equal_steps=4), figures) == ""
    found = reason(open_guard(*[figures] * 3, equal_steps=4), figures)
    assert found.startswith("each group had equal rewards in 4 steps in a row")
    assert cause in found


@pytest.mark.parametrize("name", ["reward", "entropy"])
def test_mean_of_the_last_steps_is_compared_with_that_of_the_first(name: str) -> None:
    start, low = [replace(GOOD, **{name: value}) for value in (0.8, 0.5, 0.2)], replace(GOOD, **{name: 0.2})
    limits = {f"{name}_share": 0.5}
    assert reason(open_guard(*start[:2], **limits), replace(GOOD, **{name: -9.0})) == ""
    assert reason(open_guard(*start, low, **limits), replace(GOOD, **{name: 0.36})) == ""
    found = open_guard(*start, low, **limits).judge_rollout(replace(GOOD, **{name: 0.3}), 20)
    assert found is not None
    text = f"mean {name} of the last 3 steps is 0.233, below rollout.limits.{name}_share=0.5 x 0.5 at the start: "
    assert found.reason.startswith(text)
    assert found.last_good == 17
    # Rewards that begin at or below 0 have no share.
    assert reason(open_guard(*[replace(GOOD, **{name: 0.0})] * 3, **limits), replace(GOOD, **{name: -9.0})) == ""


def test_only_steps_that_updated_the_weights_are_compared() -> None:
    guard = Guard(STOP, rollouts=open_guard(CUT, cut_share=0.95))
    metrics = {name: getattr(CUT, name) for name in RolloutFigures.__slots__} | {"answers": 64}
    assert guard.judge_rollout(None, 1) is None
    assert guard.judge_rollout(metrics, 1) is None
    assert guard.judge_rollout(metrics, 1) is None
    guard.accept(0.0, 1.0)
    assert guard.judge_rollout(metrics, 2) is not None
    assert Guard(STOP).judge_rollout(metrics, 2) is None


def test_figures_of_earlier_steps_are_read_from_their_records(tmp_path: Path) -> None:
    path, figures = tmp_path / "metrics.jsonl", dict.fromkeys(RolloutFigures.__slots__, 0.5)
    rollouts: list[object] = [figures, 3, {"reward": 1.0}, figures | {"reward": "high"}, figures, figures]
    lines = [json.dumps({"step": step, "rollouts": found}) for step, found in enumerate(rollouts, 1)]
    path.write_text("\n".join([*lines, '{"step": 7, "rollo']))
    assert read_figures(path, 5) == dict.fromkeys((1, 5), RolloutFigures(**figures))
    assert read_figures(tmp_path / "absent.jsonl", 5) == {}


def test_errors_of_scorers_and_of_sampling_end_the_run_on_all_ranks() -> None:
    with pytest.raises(UnscoredError, match=r"answers cannot be scored: reward\.parts\.0"), ends_of_sampling():
        raise ScoringError("reward.parts.0: no worker")
    with (
        pytest.raises(StoppedError, match="answers cannot be sampled: prompt 1: the model's") as found,
        ends_of_sampling(),
    ):
        raise GenerateError("prompt 1: the model's logits must be finite")
    assert not isinstance(found.value, UnscoredError)
