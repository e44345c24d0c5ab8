"""Computes how many problems a model solves by one of several answers, by any of k, and by their vote."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from statistics import mean

from infer.scoring.answer_text import normalize_text, shown_answer
from infer.scoring.ratings import Plurality, find_plurality
from infer.scoring.reward import ScoreSheet
from infer.scoring.score import Answer


@dataclass(frozen=True, kw_only=True, slots=True)
class PassRates:
    """Shares of problems that are solved, and sizes of the answers.

    Attributes:
        pass_at_1: share of answers with a verdict that are correct; 0 if none has one.
        maj_at_n: share of problems whose most frequent answer is correct; of several, the one that occurs first.
        cut_share: share of answers that reached the limit of tokens.
    """

    num_samples: int
    pass_at_1: float
    pass_at_n: float
    maj_at_n: float
    mean_tokens: float
    cut_share: float


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Returns an unbiased estimate that one of k answers is correct (arXiv:2107.03374, section 2.1)."""
    return 1.0 - comb(num_samples - num_correct, k) / comb(num_samples, k)


def compute_pass_rates(answers: Sequence[Sequence[Answer]], sheets: Sequence[Sequence[ScoreSheet]]) -> PassRates:
    """Returns the pass rates of a model, given equally many answers to each problem, at least one."""
    drawn = [answer for group in answers for answer in group]
    correct = [[sheet.outcome == "correct" for sheet in group] for group in sheets]
    return PassRates(
        num_samples=len(answers[0]),
        pass_at_1=sum(map(sum, correct)) / max(1, sum(sheet.is_verdict for group in sheets for sheet in group)),
        pass_at_n=mean(float(any(group)) for group in correct),
        maj_at_n=mean(float(_is_vote_correct(*group)) for group in zip(answers, correct, strict=True)),
        mean_tokens=mean(answer.num_tokens for answer in drawn),
        cut_share=mean(float(not answer.is_finished) for answer in drawn),
    )


def _is_vote_correct(answers: Sequence[Answer], correct: Sequence[bool]) -> bool:
    """Returns whether the most frequent answer of a group is correct; answers that were cut abstain."""
    ballots = [_ballot(answer) if answer.is_finished else None for answer in answers]
    plurality = find_plurality(ballots, quorum=0.0, ties="first")
    return isinstance(plurality, Plurality) and correct[ballots.index(plurality.ballot)]


def _ballot(answer: Answer) -> str | None:
    """Returns the last box of an answer, or the text after its thoughts if there is no box."""
    text = shown_answer(answer.text, boxed=True) or shown_answer(answer.text, boxed=False)
    return None if text is None else normalize_text(text, ignore_case=False)
