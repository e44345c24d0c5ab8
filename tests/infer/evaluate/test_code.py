"""Tests of the task `code`: reference solutions pass, mutants fail, and pass@k is its closed form."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.evaluate.config import EvaluationError
from infer.evaluate.protocol import TaskContext
from infer.evaluate.tasks.code import OWN_PROBLEMS, CodeTaskConfig, build_code_task, build_judge, read_code_problems
from infer.scoring.code import find
from infer.scoring.pass_rates import pass_at_k
from infer.scoring.score import Answer
from tests.infer.evaluate.mutants import MUTANTS
from tests.infer.evaluate.stand_ins import SayingModel, evaluate

CONFIG = CodeTaskConfig(
    chat_template=None,
    max_new_tokens=600,
    samples=1,
    temperature=0.0,
    pass_at=(),
    limit=None,
    path=None,
    isolation="bubblewrap",
    cpu_seconds=5.0,
    wall_seconds=60.0,
    memory_mib=512,
    num_sandboxes=2,
)
PROBLEMS = read_code_problems("code.path", str(OWN_PROBLEMS))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train([problem.prompt + (problem.solution or "") for problem in PROBLEMS], 600)


def context_of(tokenizer: Tokenizer) -> TaskContext:
    return TaskContext(tokenizer=tokenizer, max_tokens=2048, seed=0)


@pytest.fixture
def sandbox() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")


@pytest.mark.slow
def test_code_solutions_pass_and_mutants_fail(sandbox: None) -> None:
    """20 solutions of the project's own problems pass, and 40 mutants of them fail by a verdict of their tests."""
    programs = {(problem.key, "solution"): (problem, problem.solution) for problem in PROBLEMS}
    for problem in PROBLEMS:
        for number, (old, new) in enumerate(MUTANTS[problem.key]):
            assert problem.solution.count(old) == 1
            programs[problem.key, number] = (problem, problem.solution.replace(old, new))
    judge = build_judge(CONFIG)
    with ThreadPoolExecutor(2) as threads:
        scores = list(
            threads.map(
                lambda each: judge.score_all([Answer(text=each[1], num_tokens=1)], each[0])[0], programs.values()
            )
        )
    judge.close()
    outcomes = {name: score.outcome for name, score in zip(programs, scores, strict=True)}
    assert len(outcomes) == 60
    wrong = {name: outcome for name, outcome in outcomes.items() if (outcome == "correct") != (name[1] == "solution")}
    assert not wrong
    assert set(outcomes.values()) == {"correct", "wrong"}


@pytest.mark.slow
def test_code_runs_what_the_model_writes_up_to_the_next_definition(sandbox: None, tokenizer: Tokenizer) -> None:
    solved, other = PROBLEMS[0], PROBLEMS[2]
    # A completion ends before what follows the function; here that would undo it.
    said = [f"{solved.solution}\ndef {solved.key}(text):\n    return 0\n", "    return 'X'\n"]
    config = replace(CONFIG, limit=2)
    task = build_code_task(config, context_of(tokenizer))
    records, result = evaluate("code", config, task, SayingModel(tokenizer, said), tokenizer, 2048)
    task.close()
    assert [record["outcomes"] for record in records] == [["correct"], ["wrong"]], records
    assert records[0]["answers"][0].rstrip() == solved.solution.rstrip()
    assert result.estimates["accuracy"].value == 0.5
    assert result.details.values["isolation"] == "bubblewrap"
    assert result.details.values["outcomes"] == {"correct": 1, "wrong": 1}
    assert other.key == PROBLEMS[2].key
    json.dumps(result.values())


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(chosen) for chosen in combinations(answers, k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198), abs=1e-15)


@pytest.mark.slow
def test_code_pass_at_k_is_computed_from_several_programs(sandbox: None, tokenizer: Tokenizer) -> None:
    right, wrong = PROBLEMS[0].solution, "    return None\n"
    config = replace(CONFIG, limit=1, samples=4, temperature=0.8, pass_at=(1, 2, 4))
    task = build_code_task(config, context_of(tokenizer))
    _, result = evaluate("code", config, task, SayingModel(tokenizer, [wrong, right, wrong, wrong]), tokenizer, 2048)
    task.close()
    assert {name: each.value for name, each in result.estimates.items()} == {
        "accuracy": 0.25,
        "pass_at_1": 0.25,
        "pass_at_2": 0.5,
        "pass_at_4": 1.0,
    }


def test_code_is_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    def missing() -> None:
        raise find._MissingError("not here")

    monkeypatch.setattr(find, "_build_bubblewrap", missing)
    with pytest.raises(EvaluationError, match=r"^code\.isolation: .*isolation=accept_risk"):
        build_code_task(CONFIG, context_of(tokenizer))


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ('{"id": "a", "prompt": "def f():"}', "line 1: tests: must be given"),
        ('{"id": "a", "prompt": "def f():", "tests": "assert ("}', "line 1: tests: must be Python"),
        ('{"id": "a", "prompt": "def f():", "tests": "# nothing"}', "line 1: tests: must have a statement"),
        ('{"id": "a", "prompt": " ", "tests": "assert f()"}', "line 1: prompt: must have text"),
        ('{"prompt": "def f():", "tests": "assert f()"}', "line 1: id: must be given"),
    ],
)
def test_code_problems_that_are_not_valid_are_named(tmp_path: Path, line: str, rule: str) -> None:
    path = tmp_path / "problems.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=rule):
        read_code_problems("code.path", str(path))


@pytest.mark.parametrize(
    ("changes", "rule"),
    [
        ({"samples": 2}, r"code\.temperature: must be above 0 if code\.samples=2, is 0"),
        ({"pass_at": (2,)}, r"code\.pass_at: must be at most code\.samples=1, is 2"),
        ({"samples": 2, "temperature": 1.0, "pass_at": (2, 2)}, r"code\.pass_at: must have each value once"),
        ({"max_new_tokens": 2048}, r"code\.max_new_tokens: must be below model\.max_position_tokens=2048"),
        ({"chat_template": "r1"}, r"code\.chat_template: r1 places the token"),
    ],
)
def test_code_settings_that_exclude_each_other_are_named(
    monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer, changes: dict, rule: str
) -> None:
    with pytest.raises((EvaluationError, DataError), match=rule):
        build_code_task(replace(CONFIG, **changes), context_of(tokenizer))
