"""Compares a student of kept samples with its teacher: `python -m tests.post.rejection`.

The teacher is the recipe arithmetic_sft, trained on demonstrations of which half are wrong. It answers 1,000 problems
once each. A fresh student learns from the right answers alone, about 600 of them, and must beat the teacher.
"""

import sys
from pathlib import Path

from tests.post.pass_rates import measure_pass_rates
from tests.post.recipes import check_seeds, run_command, train_recipe, train_start
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME

NUM_PROBLEMS, STUDENT_STEPS = 1000, 140
LEAST_GAIN = 0.08
"""Least pass@1 of the student above that of the teacher."""


def sample_right_answers(teacher: Path, out: Path, seed: int) -> str:
    """Runs `launch.sample` on generated problems. Returns its summary."""
    values = [f"ckpt={teacher}", "problems=arithmetic", f"problems.count={NUM_PROBLEMS}", f"out={out}", f"seed={seed}"]
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


def check(folder: Path, seed: int) -> list[str]:
    """Trains teacher and student, prints their rates, and returns what is missing if the student gains too little."""
    teacher = train_start(folder, seed)
    print(sample_right_answers(teacher, folder / "kept.jsonl", seed), end="", flush=True)
    student = train_student(teacher, folder / "kept.jsonl", folder, seed)
    rates = [measure_pass_rates(run) for run in (teacher, student)]
    gain = rates[1].pass_at_1 - rates[0].pass_at_1
    print(f"seed {seed}: teacher {rates[0]}", f"seed {seed}: student {rates[1]}", sep="\n")
    return [] if gain >= LEAST_GAIN else [f"the gain must be at least {LEAST_GAIN}, is {gain:+.3f}"]


if __name__ == "__main__":
    sys.exit(check_seeds("tests.post.rejection", __doc__, check))
