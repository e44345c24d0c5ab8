"""Measures votes of the recipe arithmetic_sft, and checks law C5: `python -m tests.post.votes`.

A vote of k is the plurality of k samples. It answers a problem, and it judges: an answer is right if it is the
plurality of k other samples.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data.arithmetic.problems import ArithmeticProblem, problems
from infer.config import Sampling
from infer.engines.local import LocalEngine
from infer.engines.protocol import NumberedPrompt, Request
from infer.scoring.votes import Plurality, find_plurality
from tests.post.own_pairs import LONGEST_ANSWER_TOKENS, LoadedRun
from tests.post.sft import train_recipe

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
    chosen, samples = problems(VOTES_SEED, NUM_PROBLEMS), max(SIZES) + NUM_JUDGED
    texts = _sample(run, chosen, samples)
    voters, judged = ([each[part] for each in texts] for part in (slice(max(SIZES)), slice(max(SIZES), None)))
    return rate_votes([problem.answer for problem in chosen], voters, judged)


def _sample(run: LoadedRun, chosen: Sequence[ArithmeticProblem], samples: int) -> list[list[str]]:
    """Returns the texts of all samples of each problem; of a cut answer an empty one."""
    prompts = [
        NumberedPrompt(number=number, tokens=run.prompt_tokens(problem.prompt)) for number, problem in enumerate(chosen)
    ]
    request = Request(
        samples=samples,
        max_new_tokens=LONGEST_ANSWER_TOKENS,
        sampling=Sampling(temperature=1.0, seed=VOTES_SEED),
        stop=frozenset([run.tokenizer.end_of_sentence_id]),
    )
    made = LocalEngine(run.model, batch_size=200).generate(prompts, request).rollouts
    texts = [run.tokenizer.decode(each.tokens[:-1]) if each.finish == "stop" else "" for each in made]
    return [texts[first : first + samples] for first in range(0, len(texts), samples)]


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


def main(seeds: Sequence[int]) -> int:
    """Trains once for each seed, prints the rates of its votes, and returns 1 if one of them breaks a bound."""
    failures = 0
    for seed in seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            run = train_recipe("arithmetic_sft", Path(folder), f"seed={seed}", f"data.generator_seed={seed}")
            rates = measure_votes(LoadedRun.of(run))
        found = problems_of_votes(rates)
        failures += bool(found)
        print(f"seed {seed}: {rates}  {time.perf_counter() - began:.0f} s  {'; '.join(found)}", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.post.votes", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sys.exit(main(parser.parse_args().seeds))
