"""Tests of the tasks `maths` and `reasoning`: what counts as the answer, generated problems, and bad input."""

import importlib.util
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from data.arithmetic.problems import is_held_out
from data.corpus import DataError
from data.tokenizer import Tokenizer
from infer.evaluate.config import EvaluationError
from infer.evaluate.protocol import TaskContext
from infer.evaluate.tasks.maths import MathsTask, MathsTaskConfig
from infer.evaluate.tasks.reasoning import ReasoningTaskConfig, build_reasoning_task
from tests.data.chat.conversations import chat_tokenizer
from tests.infer.evaluate.stand_ins import SayingModel, evaluate
from tests.infer.scoring.test_gym import library

__all__ = ["library"]
CONFIG = MathsTaskConfig(
    chat_template=None,
    max_new_tokens=40,
    samples=1,
    temperature=0.0,
    pass_at=(),
    limit=None,
    path=None,
    generator="sums",
    num_problems=4,
    num_digits=2,
    prompt=None,
    num_shots=0,
    boxed=False,
    seconds=20.0,
    num_workers=1,
    memory_gib=2.0,
)
HAS_JUDGE = importlib.util.find_spec("math_verify") is not None
needs_judge = pytest.mark.skipif(not HAS_JUDGE, reason="math-verify is not installed (pip install '.[score]')")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return chat_tokenizer()


def context_of(tokenizer: Tokenizer, seed: int = 0) -> TaskContext:
    return TaskContext(tokenizer=tokenizer, max_tokens=512, seed=seed)


def outcomes(config: MathsTaskConfig, tokenizer: Tokenizer, said: Callable[[MathsTask], list[str]]) -> list[str]:
    task = MathsTask(config, context_of(tokenizer))
    records, result = evaluate("maths", config, task, SayingModel(tokenizer, said(task)), tokenizer, 512)
    task.close()
    json.dumps(result.values())
    assert result.num_samples == len(records)
    return [record["outcomes"][0] for record in records]


@needs_judge
@pytest.mark.slow
def test_maths_the_first_line_or_the_last_box_is_the_answer(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "questions.jsonl"
    lines = [{"id": number, "question": "half of 1?", "answer": "1/2"} for number in range(6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    said = [" 0.5", "\\frac{1}{2}", "1", "", "0.5\n1", "so \\boxed{0.5}"]
    config = replace(CONFIG, path=str(path))
    assert outcomes(config, tokenizer, lambda task: said) == ["correct"] * 2 + ["wrong", "missing"] + ["correct"] * 2
    boxed = ["\\boxed{0.5}", "first\n\\boxed{1/2}", "\\boxed{1}", "", "0.5", "\\boxed{1}, no, \\boxed{.5}"]
    found = outcomes(replace(config, boxed=True), tokenizer, lambda task: boxed)
    assert found == ["correct", "correct", "wrong", "missing", "missing", "correct"]


@needs_judge
@pytest.mark.slow
def test_maths_generated_sums_are_right(tokenizer: Tokenizer) -> None:
    def said(task: MathsTask) -> list[str]:
        questions = [sample.source.source.question for sample in task.samples()]
        sums = [question.removeprefix("What is ").removesuffix("?") for question in questions]
        return [f" {int(eval(each)) + (number == 3)}\nQuestion:" for number, each in enumerate(sums)]

    assert outcomes(CONFIG, tokenizer, said) == ["correct"] * 3 + ["wrong"]


def test_maths_digits_are_compared_as_text(tokenizer: Tokenizer) -> None:
    config = replace(CONFIG, generator="sort", num_digits=8, prompt="{question}")

    def said(task: MathsTask) -> list[str]:
        sources = [sample.source.source for sample in task.samples()]
        assert all(is_held_out(source.question) for source in sources)
        assert [sample.requests[0].prompt for sample in task.samples()] == [source.question for source in sources]
        return [sources[0].answer, sources[1].answer.lstrip("0") + "9", f"\n {sources[2].answer}", ""]

    # An answer ends with the first line, which is empty in the third.
    assert outcomes(config, tokenizer, said) == ["correct", "wrong", "missing", "missing"]


def test_maths_examples_precede_each_question(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": n, "question": f"{n}+1?", "answer": n + 1}) + "\n" for n in range(4)))
    if not HAS_JUDGE:
        pytest.skip("math-verify is not installed (pip install '.[score]')")
    task = MathsTask(replace(CONFIG, path=str(path), num_shots=2), context_of(tokenizer))
    shots = "Question: 0+1?\nAnswer: 1\n\nQuestion: 1+1?\nAnswer: 2\n\n"
    assert [sample.requests[0].prompt for sample in task.samples()] == [
        f"{shots}Question: {number}+1?\nAnswer:" for number in (2, 3)
    ]
    task.close()
    chat = MathsTask(replace(CONFIG, path=str(path), chat_template="v3"), context_of(tokenizer))
    (request,) = chat.samples()[0].requests
    assert tokenizer.decode(request.prompt).endswith("<｜User｜>0+1?<｜Assistant｜>")
    assert request.stop == ()
    chat.close()


@pytest.mark.parametrize(
    ("line", "changes", "rule"),
    [
        ({"id": 1, "question": "1?"}, {}, "line 1: answer: must be given"),
        ({"id": 1, "question": " ", "answer": "1"}, {}, "line 1: question: must have text"),
        ({"id": 1, "question": "1?", "answer": True}, {}, "line 1: answer: must be a string"),
        ({"id": 1, "question": "1?", "answer": "1"}, {"prompt": "Q:"}, r"maths\.prompt: must have \{question\} in it"),
        ({"id": 1, "question": "1?", "answer": "1"}, {"num_shots": 1}, r"maths\.num_shots: must be below"),
        (
            {"id": 1, "question": "1?", "answer": "1"},
            {"num_shots": 1, "chat_template": "v3"},
            r"maths\.num_shots: must be 0 with maths\.chat_template=v3",
        ),
    ],
)
def test_maths_rejects_what_is_not_valid(
    tmp_path: Path, tokenizer: Tokenizer, line: dict, changes: dict, rule: str
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(line) + "\n")
    with pytest.raises((EvaluationError, DataError), match=rule):
        MathsTask(replace(CONFIG, path=str(path), **changes), context_of(tokenizer))


REASONING = ReasoningTaskConfig(
    chat_template=None,
    max_new_tokens=40,
    samples=1,
    temperature=0.0,
    pass_at=(),
    limit=None,
    dataset="sums",
    num_problems=4,
    boxed=False,
    seconds=20.0,
    num_workers=1,
)


@pytest.mark.slow
def test_reasoning_is_verified_by_the_library(library: Path, tokenizer: Tokenizer) -> None:
    """The library here is a small one with the same interface."""
    task = build_reasoning_task(REASONING, context_of(tokenizer, seed=7))
    assert [sample.requests[0].prompt for sample in task.samples()] == [
        f"Question: {number} + {number} =\nAnswer:" for number in (7, 8, 9, 10)
    ]
    model = SayingModel(tokenizer, [" 14", "16\nQuestion: 1", "3", ""])
    records, result = evaluate("reasoning", REASONING, task, model, tokenizer, 512)
    task.close()
    assert [record["outcomes"][0] for record in records] == ["correct", "correct", "wrong", "missing"], records
    assert result.estimates["accuracy"].value == 0.5


def test_reasoning_names_the_data_set(library: Path, tokenizer: Tokenizer) -> None:
    for dataset, rule in ((None, "a value is needed, is None"), ("sum", "'sum'; nearest valid: sums")):
        with pytest.raises(EvaluationError, match=rf"reasoning\.dataset: .*{rule}"):
            build_reasoning_task(replace(REASONING, dataset=dataset), context_of(tokenizer))
