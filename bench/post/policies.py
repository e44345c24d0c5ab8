"""Laws C1 to C3 and C5 of fine-tuning, distillation, rejection sampling, rewards and votes.

C2: rewards teach within bounds of the divergence from the start. C3: a learning rate that is too high is stopped before
the mean reward halves. A vote of k is the plurality of k samples. It answers a problem, and it judges: an answer is
right if it is the plurality of k other samples. Rejection: a teacher answers 1,000 problems once each. A fresh student
learns from the right answers alone, about 600 of them, and must beat the teacher.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.post.recipes import (
    LoadedRun,
    RecipeRates,
    measure_pass_rates,
    run_command,
    train_recipe,
    train_start,
)
from comm.exits import EXIT_NON_FINITE
from data.arithmetic import problems
from score.ratings import Plurality, find_plurality
from train.checkpoint.locate import locate, step_folder
from train.checkpoint.manifest import TOKENIZER_NAME
from train.files.json_lines import read_lines

LEAST_PASS, MOST_PASS = 0.55, 0.65

"""Bounds of pass@1. A model that slips with probability 1/16 at each of 8 digits has 0.597."""

LEAST_GREEDY = 0.90


def problems_of_sft(rates: RecipeRates) -> list[str]:
    """Returns what the rates lack of law C1."""
    found = []
    if not LEAST_PASS <= rates.pass_at_1 <= MOST_PASS:
        found.append(f"pass@1 must be from {LEAST_PASS} to {MOST_PASS}, is {rates.pass_at_1:.3f}")
    if rates.greedy < LEAST_GREEDY:
        found.append(f"greedy must be at least {LEAST_GREEDY}, is {rates.greedy:.2f}")
    return found


def check_sft(folder: Path, seed: int) -> list[str]:
    """Trains once, prints the rates, and returns what law C1 lacks."""
    rates = measure_pass_rates(train_start(folder, seed))
    print(f"seed {seed}: {rates}", flush=True)
    return problems_of_sft(rates)


MOST_PASS_DIFFERENCE = 0.08

"""Largest difference of pass@1 between student and teacher. A standard error of a difference is about 0.03."""

STUDENT_OVERRIDES = ("task.answers=student", "task.student_share=0.5", "task.max_new_tokens=9")

"""Half of the answers are the student's. An answer of the data has 9 tokens."""


def problems_of_distillation(teacher: RecipeRates, student: RecipeRates) -> list[str]:
    """Returns what a student lacks that imitates its teacher."""
    difference = abs(student.pass_at_1 - teacher.pass_at_1)
    if difference > MOST_PASS_DIFFERENCE:
        return [f"pass@1 must differ by at most {MOST_PASS_DIFFERENCE} from the teacher's, differs by {difference:.3f}"]
    return []


def check_student(folder: Path, seed: int, answers: Sequence[str] = ()) -> list[str]:
    """Trains teacher and student, prints their rates, and returns what the student lacks."""
    run = train_start(folder, seed)
    values = (f"seed={seed}", f"data.generator_seed={seed}", f"task.teacher={run}", *answers)
    teacher = measure_pass_rates(run)
    student = measure_pass_rates(train_recipe("arithmetic_distill", folder, *values))
    print(f"seed {seed}: teacher {teacher}\n        student {student}", flush=True)
    return problems_of_distillation(teacher, student)


def check_distill(folder: Path, seed: int) -> list[str]:
    """Checks a student of the data's answers, and one of its own."""
    parts = (folder / name for name in ("data", "student"))
    return [*check_student(next(parts), seed), *check_student(next(parts), seed, STUDENT_OVERRIDES)]


EARLY_STEPS, STEPS = 40, 100

LEAST_GAIN = 0.12

"""Least gain of pass@1 after `EARLY_STEPS`."""

GRPO_LEAST_PASS = 0.82

"""Least pass@1 after `STEPS`."""

LARGEST_LOSS_AT_8 = 0.03

LARGEST_KL = 0.1

"""Bound of the mean of 10 steps, in nats per token."""

TOO_HIGH = ("optim.learning_rate=5e-4", "optim.schedule.warmup=0 steps")

_WINDOW, _REWARD_WINDOW = 10, 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """What a policy can do after some steps: its rates, and the mean divergence of the last steps before."""

    rates: RecipeRates
    kl: float

    def __str__(self) -> str:
        return f"{self.rates}  KL {self.kl:.3f}"


def problems_of_grpo(start: RecipeRates, early: Stage, late: Stage) -> list[str]:
    """Returns what a run lacks of law C2."""
    found = []
    gain = early.rates.pass_at_1 - start.pass_at_1
    if gain < LEAST_GAIN:
        found.append(f"pass@1 must rise by {LEAST_GAIN} in {EARLY_STEPS} steps, rises by {gain:.3f}")
    if late.rates.pass_at_1 < GRPO_LEAST_PASS:
        found.append(f"pass@1 must be {GRPO_LEAST_PASS} after {STEPS} steps, is {late.rates.pass_at_1:.3f}")
    for stage, steps in ((early, EARLY_STEPS), (late, STEPS)):
        if stage.rates.pass_at_8 < start.pass_at_8 - LARGEST_LOSS_AT_8:
            found.append(f"pass@8 must keep {start.pass_at_8:.2f} within 0.03, is {stage.rates.pass_at_8:.2f}")
        if stage.kl > LARGEST_KL:
            found.append(f"KL must be at most {LARGEST_KL} after {steps} steps, is {stage.kl:.3f}")
    return found


def problems_of_collapse(rewards: Sequence[float]) -> list[str]:
    """Returns what the steps before the end of a run with a too high learning rate lack of law C3."""
    last = rewards[-_REWARD_WINDOW:]
    mean = sum(last) / len(last)
    return [f"mean reward {mean:.3f} is below half of {rewards[0]:.3f}"] if mean < rewards[0] / 2 else []


def train_policy(start: Path, folder: Path, seed: int) -> tuple[Stage, Stage]:
    """Trains from a run, and measures the policy after `EARLY_STEPS` and `STEPS`."""
    values = [f"init_from={start}", f"seed={seed}", f"data.generator_seed={seed}", "checkpointing.every_steps=20"]
    run = train_recipe("arithmetic_grpo", folder, *values, "validation.every_steps=0")
    records = list(read_lines(run / "metrics.jsonl"))

    def stage(steps: int) -> Stage:
        divergences = [record["kl"] for record in records[steps - _WINDOW : steps]]
        return Stage(rates=measure_pass_rates(step_folder(run, steps)), kl=sum(divergences) / len(divergences))

    return stage(EARLY_STEPS), stage(STEPS)


def train_too_fast(start: Path, folder: Path, seed: int) -> tuple[int, str, list[float]]:
    """Trains with a learning rate that is too high. Returns the exit code, the last line and the rewards by step."""
    out_dir = folder / "too_fast"
    command = [sys.executable, "-m", "launch.train", "experiment=arithmetic_grpo", f"out_dir={out_dir}", *TOO_HIGH]
    command += [f"init_from={start}", f"seed={seed}", f"data.generator_seed={seed}", "validation.every_steps=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    records: list[dict[str, Any]] = list(read_lines(out_dir / "metrics.jsonl"))
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.startswith("error: ")]
    return done.returncode, "".join(lines[-1:]), [record["rollouts"]["reward"] for record in records]


def check_grpo(folder: Path, seed: int) -> list[str]:
    """Trains a policy, and one too fast, prints the numbers, and returns what laws C2 and C3 lack."""
    sft = train_start(folder, seed)
    start = measure_pass_rates(sft)
    print(f"seed {seed}: start           {start}", flush=True)
    early, late = train_policy(sft, folder, seed)
    code, end, rewards = train_too_fast(sft, folder, seed)
    print(f"seed {seed}: {EARLY_STEPS} steps        {early}", f"seed {seed}: {STEPS} steps       {late}", sep="\n")
    print(f"seed {seed}: too fast ends with {code} after {len(rewards)} steps: {end}")
    found = problems_of_grpo(start, early, late) + problems_of_collapse(rewards)
    if code not in (0, EXIT_NON_FINITE):
        found.append(f"the run that is too fast must end with 0 or {EXIT_NON_FINITE}, ends with {code}")
    return found


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
        rows = (("maj", self.answers), ("judge", self.judgements))
        return "  ".join(f"{name}@{size} {rate:.3f}" for name, rates in rows for size, rate in rates.items())


def vote(ballots: Sequence[str | None]) -> str | None:
    """Returns the plurality, of several the one that occurs first; None if no answer was complete."""
    found = find_plurality(ballots, quorum=0.0, ties="first")
    return found.ballot if isinstance(found, Plurality) else None


def rate_votes(truths: Sequence[str], voters: Sequence[Sequence[str]], judged: Sequence[Sequence[str]]) -> VoteRates:
    """Rates votes on problems.

    Args:
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


def check_votes(folder: Path, seed: int) -> list[str]:
    """Trains once, prints the rates of its votes, and returns what law C5 lacks."""
    rates = measure_votes(LoadedRun.of(train_start(folder, seed)))
    print(f"seed {seed}: {rates}", flush=True)
    return problems_of_votes(rates)


REJECTION_NUM_PROBLEMS, STUDENT_STEPS = 1000, 140

REJECTION_LEAST_GAIN = 0.08

"""Least pass@1 of the student above that of the teacher."""


def sample_right_answers(teacher: Path, out: Path, seed: int) -> str:
    """Runs `launch.sample` on generated problems. Returns its summary."""
    values = [
        f"ckpt={teacher}",
        "problems=arithmetic",
        f"problems.count={REJECTION_NUM_PROBLEMS}",
        f"out={out}",
        f"seed={seed}",
    ]
    values += [f"problems.generator_seed={seed + 1}", "num_samples=1", "chat=v3", "max_new_tokens=12", "temperature=1"]
    return run_command("sample", *values, "batch_size=200")


def train_student(teacher: Path, kept: Path, folder: Path, seed: int) -> Path:
    """Trains fresh weights on kept samples. Returns the folder of the run."""
    return train_recipe(
        "arithmetic_sft",
        folder,
        "data=chat",
        f"data.paths=[{kept}]",
        f"data.tokenizer={locate(str(teacher)).folder / TOKENIZER_NAME}",
        f"data.cache_dir={folder / 'cache'}",
        f"task.steps={STUDENT_STEPS}",
        f"seed={seed}",
        "validation.sequences=0",
        run_name="student",
    )


def check_rejection(folder: Path, seed: int) -> list[str]:
    """Trains teacher and student, prints their rates, and returns what is missing if the student gains too little."""
    teacher = train_start(folder, seed)
    print(sample_right_answers(teacher, folder / "kept.jsonl", seed), end="", flush=True)
    student = train_student(teacher, folder / "kept.jsonl", folder, seed)
    rates = [measure_pass_rates(run) for run in (teacher, student)]
    gain = rates[1].pass_at_1 - rates[0].pass_at_1
    print(f"seed {seed}: teacher {rates[0]}", f"seed {seed}: student {rates[1]}", sep="\n")
    return [] if gain >= REJECTION_LEAST_GAIN else [f"the gain must be at least {REJECTION_LEAST_GAIN}, is {gain:+.3f}"]
