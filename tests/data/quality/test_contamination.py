"""Tests of decontamination: evaluation text is found in any form, and common phrases are not."""

import json
import re
from pathlib import Path

import pytest

from data.corpus import DataError
from data.quality.contamination import CODE_PROBLEMS, Contamination
from data.quality.filters import CONTAMINATED, Inspector
from tests.data.quality.test_duplicates import Writer

QUESTIONS = [
    "A farmer has seventeen sheep, and all but nine of them run away before noon. How many are left in the field?",
    "Which of the planets that orbit the Sun has the most moons, and who discovered the largest of these?",
    "If it takes five machines five minutes to make five widgets, how long do a hundred machines take for a hundred?",
    "State the theorem that relates the angles of a triangle to its sides.",  # 13 words
    "Who wrote the novel about the white whale?",  # 8 words: the whole question
]


def file_of(folder: Path, questions: list[str]) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps({"id": n, "turns": [{"content": q}]}) + "\n" for n, q in enumerate(questions)))
    return str(path)


def dropped(contamination: Contamination | None, documents: list[str]) -> list[bool]:
    reasons = Inspector(None, contamination, with_sketches=False).inspect(documents).reasons
    assert set(reasons) <= {None, CONTAMINATED}
    return [reason is not None for reason in reasons]


def test_questions_are_found_in_other_text_case_and_punctuation(tmp_path: Path) -> None:
    writer = Writer(3)
    contamination = Contamination.load([file_of(tmp_path, QUESTIONS)])
    hidden = [re.sub(r"[,.?]? ", lambda match: writer.rng.choice([" ", "\n", " -- "]), q).upper() for q in QUESTIONS]
    assert dropped(contamination, [f"{writer.words(200)} “{q}” {writer.words(90)}" for q in hidden]) == [True] * 5


def test_common_phrases_are_not_contamination(tmp_path: Path) -> None:
    writer = Writer(4)
    contamination = Contamination.load([file_of(tmp_path, QUESTIONS)])
    phrases = [" ".join(question.split()[:12]) for question in QUESTIONS[:4]] + [" ".join(QUESTIONS[4].split()[:7])]
    assert not any(dropped(contamination, [f"{writer.words(50)} {phrase} {writer.words(50)}" for phrase in phrases]))
    # Neither the end of one document and the beginning of the next, nor runs of numbers.
    first, last = QUESTIONS[0].split(" run ")
    numbers = Contamination([[["1 2 3 4 5 6 7 8 9 10 11 12 13 14", "x = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]"]]])
    assert not any(dropped(contamination, [first, f"run {last}"]))
    assert not any(dropped(numbers, [" ".join(map(str, range(20))), "0 " * 50]))
    assert numbers.num_searched == 0


def test_a_template_of_many_questions_is_not_searched_for() -> None:
    writer = Writer(5)
    template = "Answer the following question with a letter and end your answer with the word done on a line"
    questions = [writer.words(20) for _ in range(40)]
    contamination = Contamination([[[f"{template}: {question}"] for question in questions]])
    assert dropped(contamination, [template, *questions]) == [False] + [True] * 40


def test_shipped_tasks_are_searched_for_by_default() -> None:
    contamination = Contamination.load(None)
    assert contamination is not None
    prompts = [json.loads(line)["prompt"] for line in CODE_PROBLEMS.read_text().splitlines()]
    assert (contamination.num_lines, contamination.num_searched) == (len(prompts), len(prompts))
    assert Contamination.load([]) is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist; must name a .jsonl file"),
        ("plain\n", "questions.jsonl:1: a line must be JSON, got plain: "),
    ],
)
def test_files_that_cannot_be_searched_for_are_refused(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "questions.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        Contamination.load([str(path)])
