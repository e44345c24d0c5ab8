"""Trains arithmetic_sft, distils it, and compares both: `python -m tests.post.distill`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from tests.post.pass_rates import RecipeRates, measure_pass_rates
from tests.post.recipes import check_seeds, train_recipe, train_start

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


def check(folder: Path, seed: int, answers: Sequence[str] = ()) -> list[str]:
    """Trains teacher and student, prints their rates, and returns what the student lacks."""
    run = train_start(folder, seed)
    values = (f"seed={seed}", f"data.generator_seed={seed}", f"task.teacher={run}", *answers)
    teacher = measure_pass_rates(run)
    student = measure_pass_rates(train_recipe("arithmetic_distill", folder, *values))
    print(f"seed {seed}: teacher {teacher}\n        student {student}", flush=True)
    return problems_of_distillation(teacher, student)


def check_both(folder: Path, seed: int) -> list[str]:
    """Checks a student of the data's answers, and one of its own."""
    parts = (folder / name for name in ("data", "student"))
    return [*check(next(parts), seed), *check(next(parts), seed, STUDENT_OVERRIDES)]


if __name__ == "__main__":
    sys.exit(check_seeds("tests.post.distill", __doc__, check_both))
