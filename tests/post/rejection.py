"""Compares a student of kept samples with its teacher: `python -m tests.post.rejection`.

The teacher is the recipe arithmetic_sft, trained on demonstrations of which half are wrong. It answers 1,000 problems
once each. A fresh student learns from the right answers alone, about 600 of them, and must beat the teacher.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.post.pass_rates import measure_pass_rates
from tests.post.sft import train_recipe
from train.checkpoint.locate import locate
from train.checkpoint.manifest import TOKENIZER_NAME

NUM_PROBLEMS, STUDENT_STEPS = 1000, 140
LEAST_GAIN = 0.08
"""Least pass@1 of the student above that of the teacher."""


def sample_right_answers(teacher: Path, out: Path, seed: int) -> str:
    """Runs `launch.sample` on generated problems. Returns its summary.

    Raises:
        RuntimeError: the command failed; the message has the end of its output.
    """
    values = [f"ckpt={teacher}", "problems=arithmetic", f"problems.count={NUM_PROBLEMS}", f"out={out}", f"seed={seed}"]
    values += [f"problems.generator_seed={seed + 1}", "num_samples=1", "chat=v3", "max_new_tokens=12", "temperature=1"]
    command = [sys.executable, "-m", "launch.sample", *values, "batch_size=200"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}: {(done.stdout + done.stderr)[-2000:]}")
    return done.stdout


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


def main(seeds: Sequence[int]) -> int:
    """Trains teacher and student for each seed, prints their rates, and returns 1 if a student gains too little."""
    failures = 0
    for seed in seeds:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            teacher = train_recipe("arithmetic_sft", folder, f"seed={seed}", f"data.generator_seed={seed}")
            print(sample_right_answers(teacher, folder / "kept.jsonl", seed), end="", flush=True)
            student = train_student(teacher, folder / "kept.jsonl", folder, seed)
            rates = [measure_pass_rates(run) for run in (teacher, student)]
        gain = rates[1].pass_at_1 - rates[0].pass_at_1
        failures += gain < LEAST_GAIN
        print(f"seed {seed}: teacher {rates[0]}", f"seed {seed}: student {rates[1]}", sep="\n")
        print(f"seed {seed}: gain {gain:+.3f}, at least {LEAST_GAIN}  {time.perf_counter() - began:.0f} s", flush=True)
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.post.rejection", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    sys.exit(main(parser.parse_args().seeds))
