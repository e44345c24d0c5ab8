"""Tests the bound on a student that imitates its teacher; `tests.post.distill` measures it."""

from dataclasses import replace

from tests.post.distill import problems_of_distillation
from tests.post.pass_rates import RecipeRates


def test_bound_of_distillation_rejects_a_student_unlike_its_teacher() -> None:
    teacher = RecipeRates(pass_at_1=0.6, pass_at_8=0.97, maj_at_8=0.91, greedy=0.95)
    assert problems_of_distillation(teacher, replace(teacher, pass_at_1=0.66)) == []
    assert problems_of_distillation(teacher, replace(teacher, pass_at_1=0.5)) == [
        "pass@1 must differ by at most 0.08 from the teacher's, differs by 0.100"
    ]
