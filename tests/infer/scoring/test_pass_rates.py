"""Tests pass rates against values that were counted by hand."""

from infer.scoring.ratings import PassRates, compute_pass_rates
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Outcome, TextAnswer


def rates_of(*groups: list[tuple[str, Outcome]]) -> PassRates:
    """Returns the rates of groups of answers with their outcomes. A text that ends with `...` was cut."""
    answers = [
        [TextAnswer(text=text, num_tokens=len(text), is_finished=not text.endswith("...")) for text, _ in group]
        for group in groups
    ]
    sheets = [[ScoreSheet(total=0.0, outcome=outcome, parts={}) for _, outcome in group] for group in groups]
    return compute_pass_rates(answers, sheets)


def test_pass_rates_count_answers_problems_and_votes() -> None:
    found = rates_of(
        [("12", "correct"), ("21", "wrong"), (" 12\n", "correct"), ("1", "wrong")],
        [("3", "wrong"), ("4", "correct"), ("3", "wrong"), ("5", "unknown")],
        [("6...", "missing"), ("6...", "missing"), ("7", "correct"), ("8", "wrong")],
        [("9", "wrong"), ("9", "wrong"), ("", "missing"), ("9", "wrong")],
    )
    assert found == PassRates(
        num_samples=4,
        pass_at_1=4 / 15,
        pass_at_n=3 / 4,
        maj_at_n=2 / 4,
        mean_tokens=26 / 16,
        cut_share=2 / 16,
    )


def test_votes_are_about_boxes_and_not_about_thoughts() -> None:
    found = rates_of(
        [
            (r"<think>a</think>so \boxed{2}", "correct"),
            (r"<think>b</think>thus \boxed{2}", "correct"),
            (r"\boxed{3}", "wrong"),
        ]
    )
    assert found.maj_at_n == 1.0
    nothing = rates_of([("a...", "missing"), ("a...", "missing")])
    assert (nothing.maj_at_n, nothing.cut_share) == (0.0, 1.0)
