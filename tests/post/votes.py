"""Measures votes of the recipe arithmetic_sft, and checks law C5: `python -m tests.post.votes`.

A vote of k is the plurality of k samples. It answers a problem, and it judges: an answer is right if it is the
plurality of k other samples.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.arithmetic import problems
from infer.scoring.ratings import Plurality, find_plurality
from tests.post.recipes import LoadedRun, check_seeds, train_start

LEAST_VOTE_GAIN = 0.20
"""Least share of problems by which the plurality of 8 samples beats one sample."""
LEAST_JUDGE_GAIN = 0.10
"""Least accuracy by which a vote of 6 judges better than one of 1."""
SIZES = (1, 2, 4, 6, 8, 16)
NUM_PROBLEMS, NUM_JUDGED = 80, 8
VOTES_SEED = 3_000


@dataclass(frozen=True, kw_only=True, slots=True)
class VoteRates:
    """Accuracy of votes by their size: of their answers to problems, and of their judgements of answers."""

    answers: dict[int, float]
    judgements: dict[int, float]

    def __str__(self) -> str:
        """Returns the rates in one line."""
        rows = (("maj", self.answers), ("judge", self.judgements))
        return "  ".join(f"{name}@{size} {rate:.3f}" for name, rates in rows for size, rate in rates.items())


def vote(ballots: Sequence[str | None]) -> str | None:
    """Returns the plurality, of several the one that occurs first; None if no answer was complete."""
    found = find_plurality(ballots, quorum=0.0, ties="first")
    return found.ballot if isinstance(found, Plurality) else None


def rate_votes(truths: Sequence[str], voters: Sequence[Sequence[str]], judged: Sequence[Sequence[str]]) -> VoteRates:
    """Rates votes on problems.

    Args:
        truths: right answer to each problem.
        voters: samples whose first k vote.
        judged: other samples, of which the first wrong one is judged, in addition to the right answer.
    """
    answers, judgements = {}, {}
    for size in SIZES:
        votes = [vote([text or None for text in texts[:size]]) for texts in voters]
        answers[size] = sum(map(str.__eq__, truths, map(str, votes))) / len(truths)
        verdicts = []
        for truth, found, texts in zip(truths, votes, judged, strict=True):
            verdicts.append(found == truth)
            wrong = next((text for text in texts if text and text != truth), None)
            if wrong is not None:
                verdicts.append(found != wrong)
        judgements[size] = sum(verdicts) / len(verdicts)
    return VoteRates(answers=answers, judgements=judgements)


def measure_votes(run: LoadedRun) -> VoteRates:
    """Lets a model answer held-out problems many times at temperature 1, and rates its votes."""
    texts = run.texts(problems(VOTES_SEED, NUM_PROBLEMS), max(SIZES) + NUM_JUDGED, VOTES_SEED)
    voters, judged = ([each[part] for each in texts] for part in (slice(max(SIZES)), slice(max(SIZES), None)))
    return rate_votes([problem.answer for problem in problems(VOTES_SEED, NUM_PROBLEMS)], voters, judged)


def problems_of_votes(rates: VoteRates) -> list[str]:
    """Returns what the rates lack of law C5."""
    found = []
    gain = rates.answers[8] - rates.answers[1]
    if gain < LEAST_VOTE_GAIN:
        found.append(f"maj@8 - maj@1 must be at least {LEAST_VOTE_GAIN}, is {gain:.3f}")
    gain = rates.judgements[6] - rates.judgements[1]
    if gain < LEAST_JUDGE_GAIN:
        found.append(f"judge@6 - judge@1 must be at least {LEAST_JUDGE_GAIN}, is {gain:.3f}")
    return found


def check(folder: Path, seed: int) -> list[str]:
    """Trains once, prints the rates of its votes, and returns what law C5 lacks."""
    rates = measure_votes(LoadedRun.of(train_start(folder, seed)))
    print(f"seed {seed}: {rates}", flush=True)
    return problems_of_votes(rates)


if __name__ == "__main__":
    sys.exit(check_seeds("tests.post.votes", __doc__, check))
