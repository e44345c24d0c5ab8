"""Tests of scorers of text, each against a table, and of the reward that sums them."""

from typing import Any

import pytest

from base.decode import decode
from base.refusal import ConfigError
from score.ratings import (
    ExactConfig,
    FormatConfig,
    LanguageConfig,
    NoPlurality,
    Plurality,
    PluralityConfig,
    PluralityScorer,
    RepetitionConfig,
    Ties,
    find_plurality,
    format_problem,
    length_penalty,
    score_exact,
    score_language,
    score_repetition,
)
from score.reward import Reward, RewardConfig, joint_outcome
from score.score import SCORERS, Answer, Problem, ScoringError, TextAnswer
from tests.score.groups import TextGroup

THOUGHTS = ("required", "opened", "forbidden", "any")
# Text, and for each kind of thoughts whether the format is right.
FORMATS = [
    ("<think>a</think>b", (True, False, False, True)),
    ("\n<think>\na\n</think>\n\nb", (True, False, False, True)),
    ("a</think>b", (False, True, False, False)),
    ("b", (False, False, True, True)),
    ("", (False, False, False, False)),
    ("<think></think>b", (False, False, False, False)),
    ("<think>a</think>", (False, False, False, False)),
    ("<think>a</think> \n", (False, False, False, False)),
    ("x<think>a</think>b", (False, False, False, False)),
    ("<think>a", (False, False, False, False)),
    ("</think>a<think>b", (False, False, False, False)),
    ("<think>a</think>b<think>c</think>d", (False, False, False, False)),
    ("<think><think>a</think>b", (False, False, False, False)),
    ("<think>a</think></think>b", (False, False, False, False)),
    (" </think>b", (False, False, False, False)),
]


def format_config(**changes: Any) -> FormatConfig:
    values = {"thoughts": "any", "boxed": False, "code": False, "ended": False, **changes}
    return FormatConfig(kind="format", weight=1.0, **values)


def answer(text: str, **changes: Any) -> Answer:
    return TextAnswer(text=text, num_tokens=1, **changes)


@pytest.mark.parametrize(("text", "expected"), FORMATS)
def test_format_of_thoughts_is_judged_as_in_the_table(text: str, expected: tuple[bool, ...]) -> None:
    found = tuple(format_problem(answer(text), format_config(thoughts=kind)) is None for kind in THOUGHTS)
    assert found == expected


@pytest.mark.parametrize(
    ("text", "changes", "problem"),
    [
        (r"\boxed{3}", {"boxed": True}, None),
        (r"\boxed{3} \boxed{3}", {"boxed": True}, "2 boxes, not 1"),
        ("3", {"boxed": True}, "0 boxes, not 1"),
        (r"<think>\boxed{3}</think>3", {"boxed": True}, "0 boxes, not 1"),
        (r"\boxed{}", {"boxed": True}, "an empty or open box"),
        (r"\boxed{3", {"boxed": True}, "an empty or open box"),
        ("```python\nx\n```", {"code": True}, None),
        ("```\nx\n```", {"code": True}, None),
        ("~~~~ python\nx\n~~~~", {"code": True}, None),
        ("```python\nx", {"code": True}, "no block of code"),
        ("```sh\nx\n```", {"code": True}, "no block of code"),
        ("x", {"code": True}, "no block of code"),
        ("cut", {}, None),
        ("cut", {"ended": True}, "cut at the limit of tokens"),
    ],
)
def test_format_of_boxes_code_and_ends_is_judged_as_in_the_table(text: str, changes: dict, problem: str | None) -> None:
    assert format_problem(answer(text, is_finished=text != "cut"), format_config(**changes)) == problem


@pytest.mark.parametrize(
    ("text", "language", "share"),
    [
        ("The answer is 3.", "latin", 1.0),
        ("Où est-ce? Größe", "latin", 1.0),
        ("答案是三", "chinese", 1.0),
        ("答案是三", "latin", 0.0),
        ("ab答案", "latin", 0.5),
        ("ab答案", "chinese", 0.5),
        ("これはテストです。漢字", "japanese", 1.0),
        ("これは", "chinese", 0.0),
        ("답은", "korean", 1.0),
        ("Ответ", "cyrillic", 1.0),
        ("Απάντηση", "greek", 1.0),
        ("جواب", "arabic", 1.0),
        ("תשובה", "hebrew", 1.0),
        ("उत", "devanagari", 1.0),
        ("กข", "thai", 1.0),
        ("ＡＢ", "latin", 1.0),
        ("123 + 4 = !", "latin", 1.0),
        ("", "chinese", 1.0),
        ("答案 $x + y$ `code` ```python\ndef f(): pass\n``` \\frac https://a.b/c <think>", "chinese", 1.0),
        ("答案 ```python\nopen", "chinese", 1.0),
    ],
)
def test_language_share_is_as_in_the_table(text: str, language: str, share: float) -> None:
    config = LanguageConfig(kind="language", weight=1.0, language=language)  # type: ignore[arg-type]
    assert score_language(config, answer(text), Problem(prompt="")).value == share


@pytest.mark.parametrize(
    ("num_tokens", "limit", "buffer", "penalty"),
    [
        (0, 100, 20, 0.0),
        (80, 100, 20, 0.0),
        (81, 100, 20, -0.05),
        (90, 100, 20, -0.5),
        (99, 100, 20, -0.95),
        (100, 100, 20, -1.0),
        (101, 100, 20, -1.0),
        (99, 100, 0, 0.0),
        (100, 100, 0, 0.0),
        (101, 100, 0, -1.0),
        (50, 100, 100, -0.5),
    ],
)
def test_length_penalty_is_as_in_the_table(num_tokens: int, limit: int, buffer: int, penalty: float) -> None:
    assert length_penalty(num_tokens, limit, buffer) == pytest.approx(penalty)


@pytest.mark.parametrize(
    ("text", "ngram_words", "share"),
    [
        ("", 3, 0.0),
        ("a b", 3, 0.0),
        ("a b c", 3, 0.0),
        ("a b c d e", 3, 0.0),
        ("a a a a a", 1, 0.8),
        ("a a a a a", 3, 2 / 3),
        ("a b a b a b", 2, 0.6),
        ("答案答案答案", 2, 0.6),
        ("a,b,c", 1, 0.2),
        ("la " * 1000, 4, 1 - 1 / 997),
    ],
)
def test_repeated_share_is_as_in_the_table(text: str, ngram_words: int, share: float) -> None:
    config = RepetitionConfig(kind="repetition", weight=1.0, ngram_words=ngram_words)
    assert score_repetition(config, answer(text), Problem(prompt="")).value == pytest.approx(-share)


@pytest.mark.parametrize(
    ("text", "changes", "outcome"),
    [
        ("1 2  3\n", {}, "correct"),
        ("1 3 2", {}, "wrong"),
        ("<think>1 2 3</think>", {}, "missing"),
        ("<think>9</think>1 2 3", {}, "correct"),
        (r"\boxed{1 2 3}", {}, "wrong"),
        (r"It is \boxed{1 2 3}.", {"boxed": True}, "correct"),
        ("1 2 3", {"boxed": True}, "missing"),
    ],
)
def test_exact_answers_are_judged_as_in_the_table(text: str, changes: dict, outcome: str) -> None:
    config = ExactConfig(kind="exact", weight=1.0, **{"boxed": False, "ignore_case": False, **changes})
    score = score_exact(config, answer(text), Problem(prompt="", answer="1 2 3"))
    assert (score.outcome, score.value) == (outcome, float(outcome == "correct"))
    assert score_exact(config, answer(text, is_finished=False), Problem(prompt="", answer="1 2 3")).value == 0
    assert score_exact(config, answer(text), Problem(prompt="")).outcome == "skipped"


@pytest.mark.parametrize(("ignore_case", "outcome"), [(True, "correct"), (False, "wrong")])
def test_exact_case_is_ignored_if_configured(ignore_case: bool, outcome: str) -> None:
    config = ExactConfig(kind="exact", weight=1.0, boxed=False, ignore_case=ignore_case)
    assert score_exact(config, answer("Paris"), Problem(prompt="", answer="PARIS")).outcome == outcome


PARTS = [
    {"kind": "exact", "weight": 1, "boxed": False, "ignore_case": False},
    {"kind": "length", "weight": 0.5, "limit_tokens": 10, "buffer_tokens": 10},
    {"kind": "language", "weight": 0, "language": "latin"},
]


def test_reward_is_the_weighted_sum_of_its_parts_and_reports_each() -> None:
    with Reward(decode(RewardConfig, {"parts": PARTS, "num_threads": 2})) as reward:
        answers = tuple(TextAnswer(text=text, num_tokens=4) for text in ("a", "б"))
        [scored] = reward.score_groups([TextGroup(problem=Problem(prompt="", answer="a"), answers=answers)])
    right, wrong = scored.sheets
    assert scored.dropped is None
    assert (right.total, right.outcome) == (pytest.approx(1 - 0.2), "correct")
    assert (wrong.total, wrong.outcome) == (pytest.approx(-0.2), "wrong")
    assert {kind: score.value for kind, score in wrong.parts.items()} == {"exact": 0, "length": -0.4, "language": 0}


@pytest.mark.parametrize(
    ("outcomes", "joint"),
    [
        (["rated", "skipped"], "skipped"),
        (["skipped", "wrong"], "wrong"),
        ([], "rated"),
        (["correct", "rated"], "correct"),
        (["correct", "wrong"], "wrong"),
        (["wrong", "unknown"], "unknown"),
        (["correct", "error", "unknown"], "error"),
        (["correct", "skipped"], "correct"),
        (["missing", "wrong"], "missing"),
    ],
)
def test_reward_outcome_is_the_first_in_the_order_of_precedence(outcomes: list, joint: str) -> None:
    assert joint_outcome(outcomes) == joint


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "reward.parts: must have at least one part"),
        ([{**PARTS[0], "domains": []}], "kind exact: domains must name at least one domain, is \\[\\]"),
        ([{**PARTS[0], "kind": "exakt"}], "must be one of exact, maths, code, .* is 'exakt'; did you mean exact"),
        ([{**PARTS[1], "buffer_tokens": 11}], r"length: buffer_tokens must be at most limit_tokens \(10\), is 11"),
        ([{**PARTS[2], "language": "latn"}], "language: must be one of latin, .*; did you mean latin"),
    ],
)
def test_reward_that_is_not_valid_is_refused_by_name(parts: list, message: str) -> None:
    with pytest.raises((ScoringError, ConfigError), match=message):
        decode(RewardConfig, {"parts": parts, "num_threads": 2})


def test_scorers_are_registered_with_a_summary() -> None:
    rules = ("exact", "maths", "code", "format", "language", "length", "repetition", "python", "reasoning_gym")
    own = (*rules, "plurality", "judge", "reward_model")
    # Other tests of this process may have registered more.
    assert SCORERS.names()[: len(own)] == own
    assert all(spec.summary and issubclass(spec.config, object) for _, spec in SCORERS.items())


def plurality_config(**changes: Any) -> PluralityConfig:
    values = {"boxed": False, "ignore_case": False, "quorum": 0.5, "ties": "drop", **changes}
    return PluralityConfig(kind="plurality", weight=1.0, **values)


def answers(*texts: str) -> list[Answer]:
    """Returns one answer per text. An answer that ends with an ellipsis is cut."""
    return [TextAnswer(text=text, num_tokens=3, is_finished=not text.endswith("...")) for text in texts]


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
    scores = PluralityScorer(plurality_config(**changes)).score_group(answers(*texts), Problem(prompt="213"))
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
    scores = PluralityScorer(plurality_config()).score_group(answers(*texts), Problem(prompt="213"))
    assert [(score.value, score.outcome, score.detail) for score in scores] == [(0.0, "unknown", reason)] * len(texts)
