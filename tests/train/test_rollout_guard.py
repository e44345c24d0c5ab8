"""Limits of rollouts: which steps they refuse, which cause they name, and from which weights a run continues."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from infer.config import GenerateError
from infer.protocol import Sample
from score.reward import GroupSheets, join_parts
from score.score import SCORERS, Outcome, Score, ScoringError
from tests.rollouts import ROLLOUT, answer_of, group_of, header_of
from tests.train.core.test_guard import STOP
from train.config.tasks import RolloutLimits
from train.core.guard import Figures, Guard, RolloutGuard, read_figures
from train.errors import StoppedError, UnscoredError
from train.loop import ends_of_sampling
from train.post.sample import NO_VERDICT, ScoredRollout, rollout_metrics, with_advantages

NONE = RolloutLimits(
    kl=None,
    cut_share=None,
    no_verdict_share=None,
    equal_steps=None,
    entropy_share=None,
    reward_share=None,
    window_steps=3,
)
GOOD: Figures = {
    "reward": 0.6,
    "entropy": 0.4,
    "equal_share": 0.25,
    "idle_share": 0.25,
    "cut_share": 0.0,
    "correct_share": 0.6,
}
CUT: Figures = {**GOOD, "cut_share": 0.97}
EQUAL: Figures = {**GOOD, "equal_share": 1.0, "idle_share": 1.0}
UNJUDGED: Figures = {
    **GOOD,
    "no_verdict_share": 0.5,
    "no_verdict_groups": 0.75,
    "no_verdict_reason": "bad.py: score: ValueError: no idea",
}


def open_guard(*history: Figures, **limits: float) -> RolloutGuard:
    """Opens a guard with limits, after some steps."""
    guard = RolloutGuard(replace(ROLLOUT, max_new_tokens=256, samples=8, limits=replace(NONE, **limits)))  # type: ignore[arg-type]
    guard.replace_history(history)
    return guard


def reason(guard: RolloutGuard, figures: Figures, step: int = 20) -> str:
    """Returns why a step is refused, or an empty text."""
    found = guard.judge_rollout(figures, step)
    return "" if found is None else found.reason


def test_limits_that_are_null_refuse_nothing() -> None:
    guard = open_guard(*[{**EQUAL, "cut_share": 1.0, "reward": -1.0, "entropy": 0.0, "no_verdict_share": 1.0}] * 9)
    assert guard.judge_rollout({**EQUAL, "cut_share": 1.0}, 9) is None
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
    assert found.last_good == 5
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
        ({"skipped_share": 0.9}, "90 % of answers are skipped, because no check of reward.parts fits their problems"),
        ({}, "60 % of answers are correct, always to the same prompts: raise rollout.samples=8"),
    ],
)
def test_equal_rewards_of_all_groups_name_their_cause(changes: dict[str, float], cause: str) -> None:
    figures = {**EQUAL, **changes}
    assert reason(open_guard(*[figures] * 2, equal_steps=4), figures) == ""
    assert reason(open_guard(*[figures] * 2, GOOD, equal_steps=4), figures) == ""
    found = reason(open_guard(*[figures] * 3, equal_steps=4), figures)
    assert found.startswith("each group had equal rewards in 4 steps in a row")
    assert cause in found


@pytest.mark.parametrize("name", ["reward", "entropy"])
def test_mean_of_the_last_steps_is_compared_with_that_of_the_first(name: str) -> None:
    start, low = [{**GOOD, name: value} for value in (0.8, 0.5, 0.2)], {**GOOD, name: 0.2}
    limits = {f"{name}_share": 0.5}
    assert reason(open_guard(*start[:2], **limits), {**GOOD, name: -9.0}) == ""
    assert reason(open_guard(*start, low, **limits), {**GOOD, name: 0.36}) == ""
    found = open_guard(*start, low, **limits).judge_rollout({**GOOD, name: 0.3}, 20)
    assert found is not None
    text = f"mean {name} of the last 3 steps is 0.233, below rollout.limits.{name}_share=0.5 x 0.5 at the start: "
    assert found.reason.startswith(text)
    assert found.last_good == 17
    # Rewards that begin at or below 0 have no share.
    assert reason(open_guard(*[{**GOOD, name: 0.0}] * 3, **limits), {**GOOD, name: -9.0}) == ""


def test_only_steps_that_updated_the_weights_are_compared() -> None:
    guard = Guard(STOP, rollouts=open_guard(CUT, cut_share=0.95))
    metrics = {**CUT, "answers": 64}
    assert guard.judge_rollout(None, 1) is None
    assert guard.judge_rollout(metrics, 1) is None
    assert guard.judge_rollout(metrics, 1) is None
    guard.accept(0.0, 1.0)
    assert guard.judge_rollout(metrics, 2) is not None
    assert Guard(STOP).judge_rollout(metrics, 2) is None


def test_figures_of_earlier_steps_are_read_from_their_records(tmp_path: Path) -> None:
    path, figures = tmp_path / "metrics.jsonl", {**GOOD, "parts": {"exact": 0.5}}
    rollouts: list[object] = [figures, 3, {"reward": 1.0}, GOOD, GOOD]
    lines = [json.dumps({"step": step, "rollouts": found}) for step, found in enumerate(rollouts, 1)]
    path.write_text("\n".join([*lines, '{"step": 7, "rollo']))
    assert read_figures(path, 4) == {1: GOOD, 3: {"reward": 1.0}, 4: GOOD}
    assert read_figures(tmp_path / "absent.jsonl", 5) == {}


def test_figures_of_another_type_are_no_figures() -> None:
    odd = {**CUT, "cut_share": "high"}
    assert reason(open_guard(CUT, odd, cut_share=0.95), CUT) == ""


def test_answers_without_verdict_end_the_run_with_the_reason_whatever_the_guard() -> None:
    assert reason(open_guard(UNJUDGED, GOOD | {"no_verdict_share": 0.4}, no_verdict_share=0.5), UNJUDGED) == ""  # type: ignore[operator]
    found = open_guard(UNJUDGED, UNJUDGED, no_verdict_share=0.5).judge_rollout(UNJUDGED, 20)
    assert found is not None
    assert found.ends_run
    assert found.reason == (
        "50 % of answers have no verdict, at least rollout.limits.no_verdict_share=0.5 in 3 steps in a row; the first "
        "of them: bad.py: score: ValueError: no idea"
    )


def test_groups_without_verdict_count_among_those_from_which_nothing_is_learned() -> None:
    mixed = {**UNJUDGED, "idle_share": 1.0, "no_verdict_share": 0.2}
    found = reason(open_guard(mixed, mixed, equal_steps=3), mixed)
    assert found.startswith("each group had equal rewards or no verdict in 3 steps in a row")
    assert found.endswith("the first of them: bad.py: score: ValueError: no idea")


def test_errors_of_scorers_and_of_sampling_end_the_run_on_all_ranks() -> None:
    with pytest.raises(UnscoredError, match=r"answers cannot be scored: reward\.parts\.0"), ends_of_sampling():
        raise ScoringError("reward.parts.0: no worker")
    with (
        pytest.raises(StoppedError, match="answers cannot be sampled: prompt 1: the model's") as found,
        ends_of_sampling(),
    ):
        raise GenerateError("prompt 1: the model's logits must be finite")
    assert not isinstance(found.value, UnscoredError)


LIMITS: dict[str, float] = {
    "cut_share": 0.9,
    "no_verdict_share": 0.5,
    "equal_steps": 3,
    "entropy_share": 0.5,
    "reward_share": 0.5,
}


def judged(kind: str, number: int, *, value: float = 1.0, outcome: Outcome | None = None, **changes: Any) -> Sample:
    """Returns an answer as a reward of one kind scores it: with a verdict if the kind has verdicts."""
    verdict: Outcome = ("correct" if value else "wrong") if SCORERS.get(kind).has_verdict else "rated"
    sheet = join_parts({kind: Score(value=value, outcome=outcome or verdict, detail="why")}, {kind: 1.0})
    values = {"log_probs": (-1.0, -0.5), "sheet": sheet, "reward": sheet.total, **changes}
    return answer_of(number, (1, 2), **values)


def metrics_of(*answers: Sample) -> dict[str, Any]:
    sheets = GroupSheets(sheets=tuple(answer.sheet for answer in answers))
    group = group_of(*answers, dropped="" if sheets.dropped is None else f"{NO_VERDICT}: {sheets.dropped}")
    groups = (with_advantages(group, "centered", drop_equal=True),)
    return rollout_metrics(ScoredRollout(header=header_of(counts={"groups": 1, "draws": 1}), groups=groups), 0)


@pytest.mark.parametrize("limit", [*LIMITS, "kl"])
@pytest.mark.parametrize("kind", SCORERS.names())
def test_each_limit_holds_for_each_reward(kind: str, limit: str) -> None:
    config = replace(ROLLOUT, limits=replace(NONE, **({"kl": 0.1} if limit == "kl" else {limit: LIMITS[limit]})))  # type: ignore[arg-type]
    guard = Guard(STOP, rollouts=RolloutGuard(config))
    good = metrics_of(judged(kind, 0), judged(kind, 1, value=0.5))
    broken = {
        "cut_share": metrics_of(*(judged(kind, each, value=each, finish="length") for each in range(2))),
        "no_verdict_share": metrics_of(judged(kind, 0), judged(kind, 1, outcome="error")),
        "equal_steps": metrics_of(judged(kind, 0), judged(kind, 1)),
        "entropy_share": metrics_of(*(judged(kind, each, value=each, log_probs=(0.0, -0.1)) for each in range(2))),
        "reward_share": metrics_of(judged(kind, 0, value=0.2), judged(kind, 1, value=0.0)),
        "kl": good,
    }
    reasons = []
    for metrics in [good] * 3 + [broken[limit]] * 4:
        bad = guard.judge_rollout(metrics, 1) or guard.judge_kl(
            {"kl": 0.3 if metrics is broken["kl"] else 0.0}, 1, 1e-4
        )
        reasons.append("" if bad is None else bad.reason)
        guard.accept(0.0, 1.0)
    assert f"rollout.limits.{limit}" in reasons[-1], reasons
    assert limit == "kl" or reasons[:3] == ["", "", ""], reasons
