"""Law C4: reward models of a policy's own answers."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.post.recipes import LoadedRun, train_recipe, train_start
from data.arithmetic import ArithmeticProblem, ProblemPart, problems
from infer.reward import score_answers

NUM_SAMPLES = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnPair:
    """A problem, and a right and a wrong answer of the policy to it."""

    prompt: str
    chosen: str
    rejected: str


def sample_pairs(policy: LoadedRun, count: int, seed: int, part: ProblemPart) -> list[OwnPair]:
    """Samples 8 answers per problem at temperature 1; problems with only one kind of answer give no pair."""
    chosen = problems(seed, count, part=part)
    answers = policy.texts(chosen, NUM_SAMPLES, seed)
    pairs = (_pair(problem, texts) for problem, texts in zip(chosen, answers, strict=True))
    return [pair for pair in pairs if pair is not None]


def _pair(problem: ArithmeticProblem, answers: Sequence[str]) -> OwnPair | None:
    wrong = next((answer for answer in answers if answer and answer != problem.answer), None)
    if wrong is None or problem.answer not in answers:
        return None
    return OwnPair(prompt=problem.prompt, chosen=problem.answer, rejected=wrong)


def write_pairs(path: Path, pairs: Sequence[OwnPair]) -> None:
    """Writes pairs as lines that `data=preferences` reads."""
    lines = (
        json.dumps({"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}) + "\n" for pair in pairs
    )
    path.write_text("".join(lines), encoding="utf-8")


LEAST_ACCURACY = 0.88

TRAINING_PROBLEMS, HELD_OUT_PROBLEMS = 1_300, 400

PAIRS_SEED = 2_000


def accuracy(reward_model: LoadedRun, pairs: Sequence[OwnPair]) -> float:
    """Returns the share of pairs whose right answer has the higher score."""
    answers = [reward_model.sequence(pair.prompt, answer) for pair in pairs for answer in (pair.chosen, pair.rejected)]
    scores = score_answers(reward_model.model, answers, batch_size=64)
    return sum(right > wrong for right, wrong in zip(scores[::2], scores[1::2], strict=True)) / len(pairs)


def train_reward_model(policy: Path, folder: Path, *overrides: str) -> tuple[float, int, int]:
    """Trains a reward model on a policy's own pairs for 100 steps of 24.

    Args:
        policy: folder of the run that answers and whose weights the reward model starts from.

    Returns:
        The accuracy on pairs of held-out problems, and the numbers of pairs for training and held out.
    """
    run = LoadedRun.of(policy)
    pairs = sample_pairs(run, TRAINING_PROBLEMS, PAIRS_SEED, "train")
    held_out = sample_pairs(run, HELD_OUT_PROBLEMS, PAIRS_SEED, "held_out")
    write_pairs(folder / "pairs.jsonl", pairs)
    trained = train_recipe(
        "arithmetic_rm",
        folder,
        f"init_from={policy}",
        "data=preferences",
        f"data.paths=[{folder / 'pairs.jsonl'}]",
        f"data.cache_dir={folder / 'cache'}",
        "validation.sequences=0",
        *overrides,
    )
    return accuracy(LoadedRun.of(trained), held_out), len(pairs), len(held_out)


def check_reward_model(folder: Path, seed: int) -> list[str]:
    """Trains policy and reward model, prints the accuracy, and returns what law C4 lacks."""
    policy = train_start(folder, seed)
    found, num_pairs, num_held_out = train_reward_model(policy, folder, f"seed={seed}", f"data.seed={seed}")
    print(f"seed {seed}: accuracy {found:.3f} on {num_held_out} held-out pairs after 100 steps on {num_pairs} pairs")
    return [] if found >= LEAST_ACCURACY else [f"accuracy must be at least {LEAST_ACCURACY}, is {found:.3f}"]
