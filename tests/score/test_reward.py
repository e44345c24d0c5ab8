"""Tests of law F2: a scorer that hangs, fails or returns no number costs one group at most, with a reason."""

import math
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from base.decode import decode
from data.problems import ProblemRecord, read_problem
from score.ratings import ExactConfig, PluralityConfig
from score.reward import (
    GroupSheets,
    Reward,
    RewardConfig,
    ScoreSheet,
    check_problems,
    combine,
    host_parts,
    join_parts,
    part_kind,
    score_judged,
)
from score.score import (
    SCORERS,
    SKIPPED,
    Answer,
    Problem,
    RatingScorer,
    Score,
    ScorerConfig,
    ScorerSpec,
    ScoringError,
    TextAnswer,
    failure,
    verdict,
)
from tests.evaluation.test_judge import CONFIG as JUDGE
from tests.score.groups import TextGroup


class FakeScorer(RatingScorer):
    """Scores the text `right` as correct, and any other text as a test says."""

    def __init__(self, act: Callable[[str], object]) -> None:
        self._act = act

    def score(self, answer: Answer, problem: Problem) -> Score:
        return verdict(is_correct=True) if answer.text == "right" else self._act(answer.text)  # type: ignore[return-value]


class FakeVote(RatingScorer):
    """Scores a group by the number of its answers, or as a test says."""

    def __init__(self, act: Callable[[Sequence[Answer]], list[Score]]) -> None:
        self._act = act

    def score_group(self, answers: Sequence[Answer], problem: Problem) -> list[Score]:
        return self._act(answers)


@pytest.fixture
def score(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GroupSheets]]:
    """Returns a function that scores texts with a scorer, each list of texts as one group."""

    def run(scorer: object, *texts: Sequence[str], weight: float = 1.0) -> list[GroupSheets]:
        spec = ScorerSpec(summary="a fake", config=ScorerConfig, build=lambda config: scorer, has_verdict=True)  # type: ignore[arg-type, return-value]
        monkeypatch.setitem(SCORERS._entries, "fake", spec)
        exact = ExactConfig(kind="exact", weight=1.0, boxed=False, ignore_case=False)
        config = RewardConfig(parts=(exact, ScorerConfig(kind="fake", weight=weight)), num_threads=2)
        groups = [
            TextGroup(
                problem=Problem(prompt="", answer="right"),
                answers=tuple(TextAnswer(text=text, num_tokens=1) for text in each),
            )
            for each in texts
        ]
        with Reward(config, seconds=0.3) as reward:
            return reward.score_groups(groups)

    SCORERS.names()  # registers the others first
    return run


def raise_error(text: str) -> object:
    raise ValueError("no idea")


GROUPS = (["right", "right"], ["right", "odd"], ["right"])


@pytest.mark.parametrize(
    ("act", "outcome", "reason"),
    [
        (raise_error, "error", "fake: ValueError: no idea"),
        (lambda text: Score(value=math.nan, outcome="correct"), "error", "fake: must return a finite value .* nan"),
        (lambda text: Score(value=1e200, outcome="rated"), "error", "fake: must return a finite value .* 1e\\+200"),
        (lambda text: Score(value=-math.inf, outcome="rated"), "error", "fake: must return a finite value .* -inf"),
        (lambda text: 1.0, "error", "fake: must return a score, returned a value of type float"),
        (lambda text: None, "error", "fake: must return a score, returned a value of type NoneType"),
    ],
)
def test_reward_of_a_faulty_scorer_drops_one_group_with_a_reason(
    score: Callable[..., list[GroupSheets]], act: Callable[[str], object], outcome: str, reason: str
) -> None:
    before, dropped, after = score(FakeScorer(act), *GROUPS)
    assert (before.dropped, after.dropped, dropped.dropped) == (None, None, outcome)
    assert [sheet.total for sheet in (*before.sheets, *after.sheets)] == [2.0] * 3
    assert [bool(re.search(reason, sheet.fault)) for sheet in dropped.sheets] == [False, True]
    assert [sheet.fault for sheet in (*before.sheets, dropped.sheets[0])] == [""] * 3
    assert math.isfinite(dropped.sheets[1].total)


@pytest.mark.slow
def test_reward_of_a_scorer_that_hangs_drops_one_group_and_names_the_thread(
    score: Callable[..., list[GroupSheets]],
) -> None:
    event = threading.Event()
    try:
        before, dropped, after = score(FakeScorer(lambda text: event.wait()), *GROUPS)
        assert (before.dropped, dropped.dropped, after.dropped) == (None, "unknown", None)
        assert dropped.sheets[1].fault.startswith("fake: call ")
        with pytest.raises(
            ScoringError, match=r"kind fake: must score an answer within 0\.3 s, does not for 4 answers"
        ):
            score(FakeScorer(lambda text: event.wait()), ["odd"] * 30)
    finally:
        event.set()


def test_reward_of_a_group_scorer_sees_whole_groups(score: Callable[..., list[GroupSheets]]) -> None:
    def count(answers: Sequence[Answer]) -> list[Score]:
        return [Score(value=float(len(answers)), outcome="rated")] * len(answers)

    found = score(FakeVote(count), *GROUPS)
    assert [sheet.parts["fake"].value for each in found for sheet in each.sheets] == [2, 2, 2, 2, 1]
    assert all(each.dropped is None for each in found)
    for broken in (count, raise_error):
        wrong = FakeVote(lambda answers, act=broken: act(answers)[:-1])  # type: ignore[misc]
        assert [each.dropped for each in score(wrong, *GROUPS)] == ["error"] * 3


def test_reward_part_that_is_only_reported_drops_no_group(score: Callable[..., list[GroupSheets]]) -> None:
    [found] = score(FakeScorer(raise_error), ["odd"], weight=0.0)
    assert (found.dropped, found.sheets[0].outcome) == (None, "wrong")
    assert found.sheets[0].parts["fake"].outcome == "error"


def test_reward_scorer_may_end_the_run(score: Callable[..., list[GroupSheets]]) -> None:
    def stop(text: str) -> object:
        raise ScoringError("all workers died")

    with pytest.raises(ScoringError, match="all workers died"):
        score(FakeScorer(stop), *GROUPS)


def test_reward_part_that_skips_all_problems_is_refused() -> None:
    exact, maths, code = (ScorerConfig(kind=kind, weight=1.0) for kind in ("exact", "maths", "code"))
    answered, tested = {"prompt": "1+1", "answer": "2"}, {"prompt": "f", "tests": "assert f()"}
    problems = [read_problem(each, "key", "p.jsonl:1", needs_answer=True) for each in (answered, answered, tested)]

    def check(problems: Sequence[ProblemRecord], *parts: ScorerConfig) -> None:
        check_problems(RewardConfig(parts=parts, num_threads=1), lambda: problems)

    check(problems, exact, maths, code)
    check(problems[:1], ScorerConfig(kind="python", weight=1.0), replace(code, weight=0.0))
    with pytest.raises(
        ScoringError,
        match=r"reward\.parts: kind code must apply to a problem, needs the field tests, which none of the problems "
        "has; nearest valid: reward=exact, reward=maths",
    ):
        check(problems[:2], exact, code)
    with pytest.raises(ScoringError, match=r"kind exact must .* nearest valid: reward=code"):
        check(problems[2:], exact)
    writing = read_problem({"prompt": "Write.", "answer": None, "domain": "writing"}, "key", "p.jsonl:4")
    essays = ScorerConfig(kind="reward_model", weight=1.0, domains=("writing", "poems"))
    check([*problems, writing], exact, code, essays)
    with pytest.raises(
        ScoringError, match=r"^p\.jsonl:4: must be judged by .* its domain is writing, and it lacks answer and tests;"
    ):
        check([*problems, writing], exact, code)
    with pytest.raises(ScoringError, match=r"^p\.jsonl:1: .* is null; nearest valid: a part with domains: null"):
        check([*problems, writing], essays, replace(exact, weight=0.0))
    with pytest.raises(ScoringError, match=r"judges domains \[poem\], which none .* nearest valid: \['writing'\]"):
        check([*problems, writing], exact, code, replace(essays, domains=("poem",)))


def test_reward_with_checks_that_do_not_apply_is_skipped_and_trained_on_the_other_parts() -> None:
    parts = {"code": SKIPPED, "format": Score(value=1.0, outcome="rated")}
    sheet = join_parts(parts, {"code": 1.0, "format": 0.1})
    assert (sheet.outcome, sheet.total, sheet.is_verdict) == ("skipped", 0.1, True)
    assert join_parts(parts, {"code": 0.0, "format": 0.1}).outcome == "rated"


def test_reward_total_must_be_finite() -> None:
    with pytest.raises(ScoringError, match="weighted sum must be finite, is inf of exact 1e\\+308"):
        ScoreSheet(total=math.inf, outcome="rated", parts={"exact": Score(value=1e308, outcome="rated")})


PLURALITY = PluralityConfig(kind="plurality", weight=0.5, boxed=False, ignore_case=False, quorum=0.5, ties="drop")
EXACT = {"kind": "exact", "weight": 0, "boxed": False, "ignore_case": False}
ANSWERED = [
    TextGroup(
        problem=Problem(prompt="21", answer=answer),
        answers=tuple(TextAnswer(text=text, num_tokens=2) for text in ("12", "12", "21")),
    )
    for answer in ("12", "21", None)
]


def reward_config(*parts: object) -> RewardConfig:
    return decode(RewardConfig, {"parts": list(parts), "num_threads": 2})


def rated(*values: float) -> list[Score]:
    return [Score(value=value, outcome="rated") for value in values]


def test_plurality_is_rewarded_and_the_truth_is_reported() -> None:
    """A scorer of weight 0 shows how many answers are right; the votes do not know it."""
    with Reward(reward_config(PLURALITY, EXACT)) as reward:
        found = reward.score_groups(ANSWERED)
    assert [[sheet.total for sheet in group.sheets] for group in found] == [[0.5, 0.5, 0.0]] * 3
    assert [group.dropped for group in found] == [None] * 3
    assert [[sheet.parts["exact"].value for sheet in group.sheets] for group in found] == [
        [1, 1, 0],
        [0, 0, 1],
        [0] * 3,
    ]
    outcomes = [[sheet.outcome for sheet in group.sheets] for group in found]
    assert outcomes == [["correct", "correct", "wrong"], ["wrong", "wrong", "correct"], ["rated"] * 3]


def test_parts_judge_the_problems_of_their_domains() -> None:
    """A repeated kind has a number in its name, and an answer that a part does not judge gets nothing from it."""
    words = {**EXACT, "weight": 1, "domains": ["words"]}
    config = reward_config(words, {**words, "weight": 2, "domains": ["digits"]}, {**EXACT, "weight": 4}, JUDGE)
    groups = [
        replace(group, problem=replace(group.problem, domain=domain))
        for group, domain in zip(ANSWERED, ("words", "digits", None), strict=True)
    ]
    host = host_parts(config)
    assert host is not None
    with Reward(host) as reward:
        sheets = reward.score_groups(groups)
    judged = score_judged(replace(JUDGE, domains=("digits",)), groups, lambda groups: [rated(8, 8, 8) for _ in groups])
    found = combine(config, groups, sheets, {"judge": judged})
    assert [list(sheet.parts) for sheet in found[0].sheets] == [["exact", "exact_2", "exact_3", "judge"]] * 3
    assert [[sheet.total for sheet in group.sheets] for group in found] == [[5, 5, 0], [8, 8, 14], [0, 0, 0]]
    outcomes = [[score.outcome for score in group.sheets[0].parts.values()] for group in found]
    assert outcomes == [
        ["correct", "skipped", "correct", "skipped"],
        ["skipped", "wrong", "wrong", "rated"],
        ["skipped"] * 4,
    ]
    assert [part_kind(name) for name in found[0].sheets[0].parts] == ["exact"] * 3 + ["judge"]


def test_score_of_a_model_that_is_no_number_is_an_error_of_its_group() -> None:
    config = reward_config(JUDGE)
    found = combine(config, ANSWERED[:2], None, {"judge": [rated(1.0, math.nan, math.inf), rated(1, 0, 0)]})
    assert [[sheet.outcome for sheet in group.sheets] for group in found] == [
        ["rated", "error", "error"],
        ["rated"] * 3,
    ]
    assert found[0].sheets[1].fault == "judge: must return a finite value of at most 1e+30 in size, returned nan"


def test_scores_of_models_join_those_of_rules() -> None:
    config = reward_config(JUDGE, PLURALITY)
    host = host_parts(config)
    assert host == reward_config(PLURALITY)
    with Reward(host) as reward:
        sheets = reward.score_groups(ANSWERED)
    votes = [rated(1.0, 0.5, 0.25), rated(0, 0, 1), [*rated(1, 1), failure("unknown", "no votes")]]
    found = combine(config, ANSWERED, sheets, {"judge": votes})
    assert [[sheet.total for sheet in group.sheets] for group in found] == [
        [1.5, 1, 0.25],
        [0.5, 0.5, 1],
        [1.5, 1.5, 0],
    ]
    assert [group.dropped for group in found] == [None, None, "unknown"]
    assert all(list(sheet.parts) == ["judge", "plurality"] for group in found for sheet in group.sheets)


def test_a_reward_may_have_parts_of_models_alone() -> None:
    config = reward_config(JUDGE)
    assert host_parts(config) is None
    (found,) = combine(config, ANSWERED[:1], None, {"judge": [rated(1, 0, 0.5)]})
    assert [sheet.total for sheet in found.sheets] == [1, 0, 0.5]


def test_a_command_without_the_models_refuses_them() -> None:
    with pytest.raises(ScoringError, match="kind judge needs a model on the ranks of a training run"):
        Reward(reward_config(JUDGE))
