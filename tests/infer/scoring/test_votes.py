"""Tests of votes: pluralities of a group with ties, abstentions and a quorum, against tables."""

import pytest

from infer.scoring.score import Answer, Problem
from infer.scoring.votes import NoPlurality, Plurality, PluralityConfig, PluralityScorer, Ties, find_plurality

PROBLEM = Problem(prompt="213")


def config(**changes) -> PluralityConfig:
    values = {"boxed": False, "ignore_case": False, "quorum": 0.5, "ties": "drop", **changes}
    return PluralityConfig(kind="plurality", weight=1.0, **values)


def answers(*texts: str) -> list[Answer]:
    """Returns one answer per text. An answer that ends with an ellipsis is cut."""
    return [Answer(text=text, num_tokens=3, is_finished=not text.endswith("...")) for text in texts]


@pytest.mark.parametrize(
    ("ballots", "quorum", "ties", "ballot", "num_votes"),
    [
        (["a", "b", "a"], 0.5, "drop", "a", 2),
        (["b", "a", "a", "b"], 0.5, "drop", None, 2),
        (["b", "a", "a", "b"], 0.5, "first", "b", 2),
        (["a", "b", "c"], 0.0, "drop", None, 1),
        (["a", None, None, "a"], 0.5, "drop", "a", 2),
        (["a", None, None, "a"], 0.51, "drop", None, 0),
        (["a", None, None, None], 0.25, "drop", "a", 1),
        ([None, None], 0.0, "first", None, 0),
        (["a"], 1.0, "drop", "a", 1),
    ],
)
def test_plurality_is_as_in_the_table(
    ballots: list[str | None], quorum: float, ties: Ties, ballot: str | None, num_votes: int
) -> None:
    found = find_plurality(ballots, quorum, ties)
    if ballot is None:
        assert isinstance(found, NoPlurality)
    else:
        assert found == Plurality(ballot=ballot, num_votes=num_votes)


@pytest.mark.parametrize(
    ("texts", "changes", "values"),
    [
        (["123", " 123\n", "132", "312"], {}, [1, 1, 0, 0]),
        (["<think>9</think>123", "<think>8</think>123", "9"], {}, [1, 1, 0]),
        (["Yes", "yes", "no"], {"ignore_case": True}, [1, 1, 0]),
        ([r"It is \boxed{3}.", r"So \boxed{3}", r"\boxed{4}", "3"], {"boxed": True}, [1, 1, 0, None]),
        (["123", "123", "12...", "", "<think>1"], {"quorum": 0.4}, [1, 1, None, None, None]),
    ],
)
def test_votes_compare_normalized_text_after_the_thoughts(
    texts: list[str], changes: dict, values: list[int | None]
) -> None:
    scores = PluralityScorer(config(**changes)).score_group(answers(*texts), PROBLEM)
    assert [None if score.outcome == "missing" else score.value for score in scores] == values
    assert {score.outcome for score in scores} <= {"rated", "missing"}


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        (["1", "2"], "several answers have 1 of 2 votes"),
        (["1", "1", "", "", ""], "2 of 5 answers vote, which is below the quorum"),
    ],
)
def test_a_group_without_plurality_has_no_reward(texts: list[str], reason: str) -> None:
    scores = PluralityScorer(config()).score_group(answers(*texts), PROBLEM)
    assert [(score.value, score.outcome, score.detail) for score in scores] == [(0.0, "unknown", reason)] * len(texts)
