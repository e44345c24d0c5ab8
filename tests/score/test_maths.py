r"""Tests of the scorer of mathematical answers against a table of pairs."""

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from score.maths_program import compare
from score.score import Answer, Problem, TextAnswer
from score.scorers import MathsConfig, MathsScorer

pytestmark = pytest.mark.slow

# The whole answer, the outcome if 7 is expected.
ANSWERS = [
    (r"\boxed{7}", "correct"),
    (r"First \boxed{3}, then \boxed{7}.", "correct"),
    (r"First \boxed{7}, then \boxed{3}.", "wrong"),
    (r"\boxed{7} is the answer to all.", "correct"),
    (r"\boxed{\boxed{7}}", "correct"),
    (r"\boxed{\boxed{3} + 4}", "wrong"),
    (r"\boxed{ 7 }", "correct"),
    (r"\boxed{7", "missing"),
    (r"\boxed{3} and \boxed{7", "wrong"),
    (r"\fbox{7}", "correct"),
    ("7", "missing"),
    ("", "missing"),
    (r"<think>\boxed{7}</think>", "missing"),
    (r"<think>\boxed{7}</think> \boxed{3}", "wrong"),
    (r"<think>\boxed{3}</think> \boxed{7}", "correct"),
    (r"\boxed{3}</think> \boxed{7}", "correct"),
    (r"<think>\boxed{7}", "missing"),
    (r"</think>\boxed{7}<think>", "missing"),
    (r"<think>a</think>\boxed{7}</think>\boxed{3}", "wrong"),
    (r"$\boxed{\frac{14}{2}}$", "correct"),
    (r"\boxed{" + "7" * 5000 + "}", "wrong"),
]
ENDLESS = [("3", "7" * 1900), ("3", "(" * 900 + "3" + ")" * 900 + "+1"), ("3", "-" * 1500 + "3-1"), ("4", "4" * 1999)]
# Each takes minutes or all memory if it is computed. Sums are not read.
BOMBS = {
    "9^{9^{9^{9}}}": "timeout",
    "2^{10000000000}": "timeout",
    r"\sum_{i=1}^{10000000} \frac{1}{i^{i}}": "wrong",
    "(" * 400 + "7" + ")" * 400: "wrong",
}


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathsScorer]:
    made = MathsScorer(MathsConfig(kind="maths", weight=1.0, seconds=20.0, num_workers=2, memory_gib=2.0))
    yield made
    made.close()


def box(text: str) -> Answer:
    return TextAnswer(text=f"<think>hm</think>The answer is \\boxed{{{text}}}.", num_tokens=1)


def read_pairs(which: str) -> dict[str, list[tuple[str, str]]]:
    """Returns the equal or unequal pairs of an expected answer and what a box holds, by topic."""
    topics: dict[str, list[tuple[str, str]]] = {}
    for line in Path(__file__).with_name("maths_pairs.jsonl").read_text().splitlines():
        kind, topic, expected, answer = json.loads(line)
        if kind == which:
            topics.setdefault(topic, []).append((expected, answer))
    return topics


every_pair = pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.exhaustive)], ids=["sample", "all"])
"""Every fourth pair of each topic, or all."""


@every_pair
def test_maths_no_unequal_pair_is_correct(step: int) -> None:
    pairs = [pair for topic in read_pairs("unequal").values() for pair in topic[::step]] + ENDLESS[::step]
    assert len(pairs) > 800 / step
    assert [pair for pair in pairs if compare(*pair)["outcome"] == "correct"] == []


@pytest.mark.exhaustive
def test_maths_no_unequal_pair_is_correct_with_its_sides_exchanged() -> None:
    pairs = [pair[::-1] for topic in read_pairs("unequal").values() for pair in topic] + [
        pair[::-1] for pair in ENDLESS
    ]
    assert [pair for pair in pairs if compare(*pair)["outcome"] == "correct"] == []


@every_pair
def test_maths_at_most_three_percent_of_equal_pairs_are_missed(step: int) -> None:
    pairs = [pair for topic in read_pairs("equal").values() for pair in topic[::step]]
    missed = [pair for pair in pairs if compare(*pair)["outcome"] != "correct"]
    assert len(pairs) > 400 / step
    assert len(missed) <= 0.03 * len(pairs), missed


def test_maths_pairs_are_judged_from_any_thread(scorer: MathsScorer) -> None:
    pairs = [(topic[0], which == "equal") for which in ("unequal", "equal") for topic in read_pairs(which).values()]
    with ThreadPoolExecutor(4) as threads:  # no thread is the main one
        scores = list(
            threads.map(lambda pair: scorer.score(box(pair[0][1]), Problem(prompt="", answer=pair[0][0])), pairs)
        )
    values = [(*pair, score.value, score.outcome == "correct") for (pair, _), score in zip(pairs, scores, strict=True)]
    assert values == [(*pair, float(is_equal), is_equal) for pair, is_equal in pairs]


def test_maths_only_the_last_box_after_the_thoughts_counts(scorer: MathsScorer) -> None:
    found = {
        text: scorer.score(TextAnswer(text=text, num_tokens=1), Problem(prompt="", answer="7")).outcome
        for text, _ in ANSWERS
    }
    assert found == dict(ANSWERS)


def test_maths_bombs_end_as_timeout_and_later_answers_are_judged() -> None:
    scorer = MathsScorer(MathsConfig(kind="maths", weight=1.0, seconds=2.0, num_workers=1, memory_gib=1.5))
    problem = Problem(prompt="", answer="7")
    assert scorer.score(box("7"), problem).outcome == "correct"
    for bomb, outcome in BOMBS.items():
        begin = time.monotonic()
        score = scorer.score(box(bomb), problem)
        assert (score.value, score.outcome) == (0, outcome), (bomb, score)
        assert time.monotonic() - begin < 5, bomb
        assert scorer.score(box("7.0"), problem).outcome == "correct", bomb
    scorer.close()


def test_maths_problem_without_an_answer_is_skipped_and_a_faulty_one_is_an_error(scorer: MathsScorer) -> None:
    assert scorer.score(box("7"), Problem(prompt="")).outcome == "skipped"
    assert scorer.score(box("7"), Problem(prompt="", answer="")).outcome == "error"
