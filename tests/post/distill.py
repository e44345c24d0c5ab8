"""Trains arithmetic_sft, distils it, and compares both: `python -m tests.post.distill`."""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.post.pass_rates import RecipeRates, measure_pass_rates
from tests.post.sft import train_recipe

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


def main(seeds: Sequence[int], answers: str) -> int:
    """Trains teacher and student for each seed, prints their rates, and returns 1 if a bound is broken.

    Args:
        seeds: of the runs.
        answers: `data` or `student`.
    """
    failures, further = 0, STUDENT_OVERRIDES if answers == "student" else ()
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            given = (f"seed={seed}", f"data.generator_seed={seed}")
            run = train_recipe("arithmetic_sft", Path(folder), *given)
            began = time.perf_counter()
            teacher = measure_pass_rates(run)
            student = measure_pass_rates(
                train_recipe("arithmetic_distill", Path(folder), *given, f"task.teacher={run}", *further)
            )
        found = problems_of_distillation(teacher, student)
        failures += bool(found)
        seconds = time.perf_counter() - began
        print(
            f"seed {seed}: teacher {teacher}\n        student {student}  {seconds:.0f} s  {'; '.join(found)}",
            flush=True,
        )
    return int(failures > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tests.post.distill", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--answers", choices=["data", "student"], default="data")
    arguments = parser.parse_args()
    sys.exit(main(arguments.seeds, arguments.answers))
