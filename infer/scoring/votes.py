"""Scores answers by a vote of their group: an answer is right if most others agree with it.

A model's plurality is often right where no rule can check it. Source: TTRL, arXiv:2504.16084.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from infer.scoring.answer_text import normalize_text, shown_answer
from infer.scoring.score import SCORERS, Answer, Problem, RatingScorer, Score, ScorerConfig, ScorerSpec, failure
from kernels.ranges import Share

Ties = Literal["drop", "first"]


@dataclass(frozen=True, kw_only=True, slots=True)
class PluralityConfig(ScorerConfig):
    """The configuration of a vote.

    Attributes:
        boxed: whether the last box is compared instead of the whole text after the thoughts.
        ignore_case: whether capital and small letters are equal.
        quorum: least share of a group's answers that must vote.
        ties: what happens if several answers have the most votes. drop: there is no plurality; first: the one that
            occurs first counts.
    """

    boxed: bool
    ignore_case: bool
    quorum: Share
    ties: Ties


@dataclass(frozen=True, kw_only=True, slots=True)
class Plurality:
    """The most frequent ballot of a group.

    Attributes:
        ballot: the ballot with the most votes.
        num_votes: number of its votes.
    """

    ballot: str
    num_votes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NoPlurality:
    """A group without a plurality, and the reason in a few words."""

    reason: str


def find_plurality(ballots: Sequence[str | None], quorum: float, ties: Ties) -> Plurality | NoPlurality:
    """Returns the most frequent ballot of a group.

    Args:
        ballots: one of each answer; None abstains.
        quorum: least share of them that must not abstain.
        ties: what happens if several ballots have the most votes.
    """
    valid = Counter(ballot for ballot in ballots if ballot is not None)
    if not valid or valid.total() < quorum * len(ballots):
        return NoPlurality(reason=f"{valid.total()} of {len(ballots)} answers vote, which is below the quorum")
    # Ballots with equally many votes are in the order of their first occurrence.
    (ballot, num_votes), *others = valid.most_common(2)
    if ties == "drop" and others and others[0][1] == num_votes:
        return NoPlurality(reason=f"several answers have {num_votes} of {len(ballots)} votes")
    return Plurality(ballot=ballot, num_votes=num_votes)


class PluralityScorer(RatingScorer):
    """Compares each answer with the plurality of its group.

    The mean value over a group is its agreement: the share of answers that equal the plurality.
    """

    def __init__(self, config: PluralityConfig) -> None:
        """Stores the configuration."""
        self._config = config

    def score_group(self, answers: Sequence[Answer], problem: Problem) -> list[Score]:
        """Returns 1 for each answer that equals the plurality, and 0 for the others.

        An answer that abstains is missing. Without a plurality, all outcomes are unknown, so that the group is not
        trained.
        """
        ballots = [self._ballot(answer) for answer in answers]
        found = find_plurality(ballots, self._config.quorum, self._config.ties)
        if isinstance(found, NoPlurality):
            return [failure("unknown", found.reason)] * len(answers)
        detail = f"{found.num_votes} of {len(answers)} votes for {found.ballot[:80]}"
        return [
            failure("missing", "abstains: no answer was found")
            if ballot is None
            else Score(value=float(ballot == found.ballot), outcome="rated", detail=detail)
            for ballot in ballots
        ]

    def _ballot(self, answer: Answer) -> str | None:
        shown = shown_answer(answer.text, boxed=self._config.boxed) if answer.is_finished else None
        return None if shown is None else normalize_text(shown, ignore_case=self._config.ignore_case)


SCORERS.register(
    "plurality",
    ScorerSpec(
        summary="the answer is the plurality of its group",
        config=PluralityConfig,
        build=PluralityScorer,
        has_verdict=False,
    ),
)
