"""Trains arithmetic_grpo from arithmetic_sft and checks laws C2 and C3: `python -m tests.post.grpo`.

C2: rewards teach within bounds of the divergence from the start. C3: a learning rate that is too high is stopped before
the mean reward halves.
"""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comm.exit_codes import EXIT_NON_FINITE
from tests.post.pass_rates import RecipeRates, measure_pass_rates
from tests.post.recipes import check_seeds, train_recipe, train_start
from train.checkpoint.locate import step_folder
from train.files.json_lines import read_lines

EARLY_STEPS, STEPS = 40, 100
LEAST_GAIN = 0.12
"""Least gain of pass@1 after `EARLY_STEPS`."""
LEAST_PASS = 0.82
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
        """Returns the numbers in one line."""
        return f"{self.rates}  KL {self.kl:.3f}"


def problems_of_grpo(start: RecipeRates, early: Stage, late: Stage) -> list[str]:
    """Returns what a run lacks of law C2."""
    found = []
    gain = early.rates.pass_at_1 - start.pass_at_1
    if gain < LEAST_GAIN:
        found.append(f"pass@1 must rise by {LEAST_GAIN} in {EARLY_STEPS} steps, rises by {gain:.3f}")
    if late.rates.pass_at_1 < LEAST_PASS:
        found.append(f"pass@1 must be {LEAST_PASS} after {STEPS} steps, is {late.rates.pass_at_1:.3f}")
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


def check(folder: Path, seed: int) -> list[str]:
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


if __name__ == "__main__":
    sys.exit(check_seeds("tests.post.grpo", __doc__, check))
