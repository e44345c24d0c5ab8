"""Two wrong variants of each problem's reference solution: a replaced part, which must occur once."""

import importlib.util
import json
import shutil
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from data.arithmetic import is_held_out
from data.corpus import DataError
from data.quality.contamination import CODE_PROBLEMS
from data.tokenizer import Tokenizer
from evaluation.protocol import EvaluationError
from score import programs
from score.programs import CodeConfig, CodeScorer
from score.ratings import pass_at_k
from tests.covering import exhaustive
from tests.data.chat.conversations import chat_tokenizer
from tests.evaluation.stand_ins import SayingModel, evaluate, open_task
from tests.score.test_python import library

MUTANTS = {
    "run_lengths": (("runs[-1][0] == character", "character in dict(runs)"), ("runs[-1][1] + 1", "runs[-1][1]")),
    "merge_intervals": (("low <= merged", "low < merged"), ("max(merged[-1][1], high)", "high")),
    "roman": (("number >= value", "number > value"), ('(40, "XL")', '(40, "XXXX")')),
    "balanced": (
        ("return not open_brackets", "return True"),
        ("open_brackets.pop() != closing[character]", "not open_brackets.pop()"),
    ),
    "two_sum": (
        (
            "        if total - number in places:",
            "        places.setdefault(number, at)\n        if total - number in places:",
        ),
        ("(places[total - number], at)", "(at, places[total - number])"),
    ),
    "binary_search": (
        ("numbers[middle] < number", "numbers[middle] <= number"),
        ("numbers[low] == number else -1", "numbers[low] >= number else -1"),
    ),
    "transpose": (
        ("width = max((len(row) for row in rows), default=0)", "width = len(rows[0]) if rows else 0"),
        ("for at in range(width)]", "for at in range(width - 1)]"),
    ),
    "anagram_groups": (
        ('"".join(sorted(word))', "frozenset(word)"),
        ("return list(groups.values())", "return sorted(groups.values())"),
    ),
    "prime_factors": (
        ("divisor * divisor <= number", "divisor * divisor < number"),
        ("    if number > 1:\n        factors.append(number)\n", ""),
    ),
    "rotate": (("    steps %= len(items)\n", ""), ("steps %= len(items)", "steps = -steps % len(items)")),
    "edit_distance": (("above + (a != b)", "above + 2 * (a != b)"), ("row[j - 1] + 1, ", "")),
    "spiral": (("zip(*rows)][::-1]", "zip(*rows)]"), ("rows.pop(0)", "rows.pop()")),
    "longest_unique": (("max(start, last[character] + 1)", "last[character] + 1"), ("at - start + 1", "at - start")),
    "to_base": (
        ('"0123456789abcdef"[digit] + digits', 'digits + "0123456789abcdef"[digit]'),
        ('"-" + digits if number < 0 else digits', "digits"),
    ),
    "topological_order": (("min(ready)", "max(ready)"), ("            return None\n", "            return order\n")),
    "word_counts": (("(-item[1], item[0])", "-item[1]"), ('text.lower() + " "', "text.lower()")),
    "change": (("min(options) + 1", "max(options) + 1"), ("coin <= total", "coin < total")),
    "flatten": (("flat += flatten(value)", "flat += value"), ("flat.append(value)", "flat += str(value)")),
    "evaluate": (('tokens[0] in "+-":', 'tokens[0] in "+":'), ("else value - product()", "else value - total()")),
    "Queue": ((">= self.size", "> self.size"), ("self.items.pop(0)", "self.items.pop()")),
}

__all__ = ["library"]
PROGRAMS = {line["id"]: line for line in map(json.loads, CODE_PROBLEMS.read_text().splitlines())}

needs_judge = pytest.mark.skipif(
    importlib.util.find_spec("math_verify") is None, reason="math-verify is not installed (pip install '.[score]')"
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


@pytest.fixture
def sandbox() -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")


def write_lines(path: Path, lines: Sequence[dict]) -> str:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def outcomes(name: str, tokenizer: Tokenizer, said: Sequence[str], **keys: Any) -> list[str]:
    """Returns the outcome of each answer that a model says."""
    opened = open_task(name, tokenizer, **keys)
    records, _ = evaluate(opened, SayingModel(tokenizer, said), tokenizer)
    return [record["outcomes"][0] for record in records]


@needs_judge
@pytest.mark.slow
@pytest.mark.parametrize(
    ("boxed", "said", "expected"),
    [
        (
            False,
            [" 0.5", "\\frac{1}{2}", "1", "", "0.5\n1", "so \\boxed{0.5}"],
            ["correct", "correct", "wrong", "missing", "correct", "correct"],
        ),
        (
            True,
            ["\\boxed{0.5}", "first\n\\boxed{1/2}", "\\boxed{1}", "", "0.5", "\\boxed{1}, no, \\boxed{.5}"],
            ["correct", "correct", "wrong", "missing", "missing", "correct"],
        ),
    ],
)
def test_maths_the_first_line_or_the_last_box_is_the_answer(
    tmp_path: Path, tokenizer: Tokenizer, boxed: bool, said: list[str], expected: list[str]
) -> None:
    lines = [{"id": number, "question": "half of 1?", "answer": "1/2"} for number in range(6)]
    path = write_lines(tmp_path / "questions.jsonl", lines)
    assert outcomes("maths", tokenizer, said, path=path, boxed=boxed) == expected


@needs_judge
@pytest.mark.slow
def test_maths_generated_sums_are_right(tokenizer: Tokenizer) -> None:
    opened = open_task("maths", tokenizer, num_problems=4)
    questions = [sample.source.problem.prompt for sample in opened.task.samples()]
    sums = [question.removeprefix("What is ").removesuffix("?") for question in questions]
    said = [f" {int(eval(each)) + (number == 3)}\nQuestion:" for number, each in enumerate(sums)]
    records, _ = evaluate(opened, SayingModel(tokenizer, said), tokenizer)
    assert [record["outcomes"] for record in records] == [["correct"]] * 3 + [["wrong"]]


def test_maths_digits_are_compared_as_text(tokenizer: Tokenizer) -> None:
    opened = open_task("maths", tokenizer, generator="sort", num_digits=8, prompt="{question}", num_problems=4)
    samples = opened.task.samples()
    problems = [sample.source.problem for sample in samples]
    assert all(is_held_out(problem.prompt) for problem in problems)
    assert [sample.requests[0].prompt for sample in samples] == [problem.prompt for problem in problems]  # type: ignore[union-attr]
    said = [problems[0].answer, problems[1].answer.lstrip("0") + "9", f"\n {problems[2].answer}", ""]
    records, _ = evaluate(opened, SayingModel(tokenizer, said), tokenizer)
    # An answer ends with the first line, which is empty in the third.
    assert [record["outcomes"] for record in records] == [["correct"], ["wrong"], ["missing"], ["missing"]]


@needs_judge
def test_maths_examples_precede_each_question(tmp_path: Path, tokenizer: Tokenizer) -> None:
    lines = [{"id": n, "question": f"{n}+1?", "answer": n + 1} for n in range(4)]
    path = write_lines(tmp_path / "questions.jsonl", lines)
    task = open_task("maths", tokenizer, path=path, num_shots=2).task
    shots = "Question: 0+1?\nAnswer: 1\n\nQuestion: 1+1?\nAnswer: 2\n\n"
    assert [sample.requests[0].prompt for sample in task.samples()] == [  # type: ignore[union-attr]
        f"{shots}Question: {number}+1?\nAnswer:" for number in (2, 3)
    ]
    task.close()
    chat = open_task("maths", tokenizer, path=path, chat_template="v3").task
    (request,) = chat.samples()[0].requests
    assert tokenizer.decode(request.prompt).endswith("<｜User｜>0+1?<｜Assistant｜>")  # type: ignore[arg-type, union-attr]
    assert request.stop == ()  # type: ignore[union-attr]
    chat.close()


@pytest.mark.slow
def test_reasoning_is_verified_by_the_library(library: Path, tokenizer: Tokenizer) -> None:
    """The library here is a small one with the same interface."""
    opened = open_task("reasoning", tokenizer, seed=7, dataset="sums", num_problems=4)
    assert [sample.requests[0].prompt for sample in opened.task.samples()] == [  # type: ignore[union-attr]
        f"Question: {number} + {number} =\nAnswer:" for number in (7, 8, 9, 10)
    ]
    records, result = evaluate(opened, SayingModel(tokenizer, [" 14", "16\nQuestion: 1", "3", ""]), tokenizer)
    assert [record["outcomes"][0] for record in records] == ["correct", "correct", "wrong", "missing"], records
    assert result.estimates["accuracy"].value == 0.5


def test_reasoning_names_the_data_set(library: Path, tokenizer: Tokenizer) -> None:
    for dataset, rule in ((None, "a value is needed, is None"), ("sum", "'sum'; nearest valid: sums")):
        with pytest.raises(EvaluationError, match=rf"reasoning\.dataset: .*{rule}"):
            open_task("reasoning", tokenizer, dataset=dataset)


@pytest.mark.slow
@pytest.mark.parametrize(("every", "num_mutants"), [(4, 1), *exhaustive((1, 2))])
def test_code_solutions_pass_and_mutants_fail(sandbox: None, every: int, num_mutants: int) -> None:
    """20 solutions of the project's own problems pass, and mutants fail by a verdict of their tests."""
    mutants = {}
    for key, line in list(PROGRAMS.items())[::every]:
        for old, new in MUTANTS[key][:num_mutants]:
            assert line["solution"].count(old) == 1
            mutants[key, old] = line["prompt"] + line["solution"].replace(old, new)
    limits = {"cpu_seconds": 5.0, "wall_seconds": 60.0, "memory_mib": 512, "num_sandboxes": 2}
    scorer = CodeScorer(CodeConfig(kind="code", weight=1.0, **limits))  # type: ignore[arg-type]
    # The solutions have different names, so that one program can have them all.
    solutions, tests = (
        "\n\n".join("".join(line[key] for key in keys) for line in PROGRAMS.values())
        for keys in (("prompt", "solution"), ("tests",))
    )
    score = scorer.score_program(solutions, tests)
    assert score.outcome == "correct", score
    for name, program in mutants.items():
        assert scorer.score_program(program, PROGRAMS[name[0]]["tests"]).outcome == "wrong", name


@pytest.mark.slow
def test_code_runs_what_the_model_writes_up_to_the_next_definition(sandbox: None, tokenizer: Tokenizer) -> None:
    key, line = next(iter(PROGRAMS.items()))
    # A completion ends before what follows the function; here that would undo it.
    said = [f"{line['solution']}\ndef {key}(text):\n    return 0\n", "    return 'X'\n"]
    keys = {"limit": 2, "max_new_tokens": 600, "wall_seconds": 60}
    opened = open_task("code", tokenizer, max_tokens=2048, **keys)
    records, result = evaluate(opened, SayingModel(tokenizer, said), tokenizer, 2048)
    assert [record["outcomes"] for record in records] == [["correct"], ["wrong"]], records
    assert records[0]["answers"][0].rstrip() == line["solution"].rstrip()
    assert result.estimates["accuracy"].value == 0.5
    assert result.details.values["isolation"] == "bubblewrap"
    assert result.details.values["outcomes"] == {"correct": 1, "wrong": 1}


@pytest.mark.slow
def test_code_pass_at_k_is_computed_from_several_programs(sandbox: None, tokenizer: Tokenizer) -> None:
    right, wrong = next(iter(PROGRAMS.values()))["solution"], "    return None\n"
    keys = {"limit": 1, "samples": 4, "temperature": 0.8, "pass_at": [1, 2, 4], "wall_seconds": 60}
    opened = open_task("code", tokenizer, max_tokens=2048, max_new_tokens=600, **keys)  # type: ignore[arg-type]
    _, result = evaluate(opened, SayingModel(tokenizer, [wrong, right, wrong, wrong]), tokenizer, 2048)
    values = {name: metric.value for name, metric in result.estimates.items()}
    assert values == {"accuracy": 0.25, "pass_at_1": 0.25, "pass_at_2": 0.5, "pass_at_4": 1.0}


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            answers = [True] * c + [False] * (n - c)
            for k in range(1, n + 1):
                subsets = [any(chosen) for chosen in combinations(answers, k)]
                assert pass_at_k(n, c, k) == pytest.approx(sum(subsets) / len(subsets), abs=1e-15)
    assert pass_at_k(200, 3, 100) == pytest.approx(1 - (100 * 99 * 98) / (200 * 199 * 198), abs=1e-15)


def test_code_is_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch, tokenizer: Tokenizer) -> None:
    def missing() -> None:
        raise programs._MissingError("not here")

    monkeypatch.setattr(programs, "_build_bubblewrap", missing)
    with pytest.raises(EvaluationError, match=r"^code\.isolation: .*isolation=accept_risk"):
        open_task("code", tokenizer)


QUESTION = {"id": 1, "question": "1?", "answer": "1"}
PROGRAM = {"id": "a", "prompt": "def f():", "tests": "assert f()"}


@pytest.mark.parametrize(
    ("name", "line", "keys", "rule"),
    [
        ("maths", {"id": 1, "question": "1?"}, {}, "line 1: answer: must be given"),
        ("maths", {**QUESTION, "question": " "}, {}, "line 1: question: must have text"),
        ("maths", {**QUESTION, "answer": True}, {}, "line 1: answer: must be a string"),
        ("maths", QUESTION, {"prompt": "Q:"}, r"maths\.prompt: must have \{question\} in it"),
        ("maths", QUESTION, {"num_shots": 1}, r"maths\.num_shots: must be below"),
        (
            "maths",
            QUESTION,
            {"num_shots": 1, "chat_template": "v3"},
            r"maths\.num_shots: must be 0 with maths\.chat_template=v3",
        ),
        ("code", {"id": "a", "prompt": "def f():"}, {}, "line 1: tests: must be given"),
        ("code", {**PROGRAM, "tests": "assert ("}, {}, "line 1: tests: must be Python"),
        ("code", {**PROGRAM, "tests": "# nothing"}, {}, "line 1: tests: must have at least one statement"),
        ("code", {**PROGRAM, "prompt": " "}, {}, "line 1: prompt: must have text"),
        ("code", {**PROGRAM, "solution": 3}, {}, "line 1: solution: must be a string"),
        ("code", {"prompt": "def f():", "tests": "assert f()"}, {}, "line 1: id: must be given"),
        ("code", PROGRAM, {"samples": 2}, r"code\.temperature: must be above 0 if code\.samples=2, is 0"),
        ("code", PROGRAM, {"pass_at": [2]}, r"code\.pass_at: must be at most code\.samples=1, is 2"),
        (
            "code",
            PROGRAM,
            {"samples": 2, "temperature": 1.0, "pass_at": [2, 2]},
            r"code\.pass_at: must have each value once",
        ),
        (
            "code",
            PROGRAM,
            {"max_new_tokens": 512},
            r"code\.max_new_tokens: must be below model\.max_position_tokens=512",
        ),
    ],
)
def test_questions_that_are_not_valid_are_refused_by_name(
    tmp_path: Path, tokenizer: Tokenizer, name: str, line: dict, keys: dict, rule: str
) -> None:
    path = write_lines(tmp_path / "lines.jsonl", [line])
    with pytest.raises((EvaluationError, DataError), match=rule):
        open_task(name, tokenizer, path=path, **keys)


def test_questions_need_a_tokenizer_that_can_write_the_chat_template() -> None:
    plain = Tokenizer.train(["def f(x): return x"], 400)
    with pytest.raises((EvaluationError, DataError), match=r"code\.chat_template: r1 places the token"):
        open_task("code", plain, chat_template="r1")
