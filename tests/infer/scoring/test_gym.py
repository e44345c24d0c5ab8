"""Tests of problems of reasoning-gym and their verifier, with a small library in its place."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from data.corpus import DataError
from data.prepare import check_config, prepare
from data.problems.gym import GymSource
from data.problems.source import split_problems
from infer.scoring import scorers
from infer.scoring.score import Problem, ScoringError, TextAnswer, problem_of
from infer.scoring.scorers import GymScorer, GymScorerConfig
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of

LIBRARY = """
from types import SimpleNamespace

class Sums:
    def __init__(self, seed, size):
        self.seed, self.size = seed, size

    def __getitem__(self, index):
        number = (self.seed + index) % 50
        return {"question": f"{number} + {number} =", "answer": str(2 * number), "metadata": {}}

    def score_answer(self, answer, entry):
        return 1.0 if answer == entry["answer"] else 0.25 if answer and answer.isdigit() else 0.0

DATASETS = {"sums": Sums}

def create_dataset(name, **config):
    return DATASETS[name](**config)
"""


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Writes a library next to a copy of the verifier, and provides their folder."""
    folder = tmp_path / "library"
    (folder / "reasoning_gym").mkdir(parents=True)
    (folder / "reasoning_gym" / "factory.py").write_text(LIBRARY)
    (folder / "reasoning_gym" / "__init__.py").write_text("from .factory import create_dataset\n")
    (folder / "gym_verifier.py").write_text(scorers.VERIFIER.read_text())
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setattr(scorers, "VERIFIER", folder / "gym_verifier.py")
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("reasoning_gym", "reasoning_gym.factory"):
        sys.modules.pop(name, None)


def source_of(**changes: object) -> GymSource:
    values = {"dataset": "sums", "count": 60, "generator_seed": 3, "template": "v3", **changes}
    return GymSource(kind="reasoning_gym", **values)  # type: ignore[arg-type]


def scorer_config() -> GymScorerConfig:
    return GymScorerConfig(kind="reasoning_gym", weight=1.0, boxed=False, seconds=5.0, num_workers=1)


def test_gym_problems_are_different_and_their_verifier_finds_them(library: Path, tmp_path: Path) -> None:
    config = config_of(source_of(), tmp_path, chat_tokenizer())
    check_config(config)
    train, held_out = split_problems(config)
    records = [*train, *held_out]
    assert len({record.prompt for record in records}) == len(records) == 50
    assert prepare(config, 64).counts["train"].kept == len(train)
    scorer = GymScorer(scorer_config())
    try:
        found = {
            text: scorer.score(TextAnswer(text=text, num_tokens=1), problem_of(records[7]))
            for text in (f"<think>?</think> {records[7].answer}\n", "99999", "none", "<think>cut")
        }
        assert [(each.value, each.outcome) for each in found.values()] == [
            (1.0, "correct"),
            (0.25, "wrong"),
            (0.0, "wrong"),
            (0.0, "missing"),
        ]
        assert scorer.score(TextAnswer(text="1", num_tokens=1), Problem(prompt="1", answer="1")).outcome == "skipped"
        other = Problem(prompt="another", origin=records[7].origin)
        assert "generates another question" in scorer.score(TextAnswer(text="1", num_tokens=1), other).detail
    finally:
        scorer.close()


def test_gym_data_set_that_is_unknown_and_a_missing_tokenizer_are_refused(library: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data\.dataset: must be one of the 1 data sets .* nearest valid: sums"):
        check_config(config_of(source_of(dataset="sumz"), tmp_path, chat_tokenizer()))
    with pytest.raises(DataError, match=r"data\.tokenizer: must be given with data=reasoning_gym"):
        check_config(config_of(source_of(), tmp_path))


def test_gym_library_that_is_missing_or_broken_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    (library / "reasoning_gym" / "__init__.py").write_text("import drawsvg_missing\n")
    with pytest.raises(
        DataError, match=r"cannot be imported: No module named 'drawsvg_missing'; .* pip install '\.\[reasoning\]'"
    ) as data:
        split_problems(config_of(source_of(), tmp_path))
    with pytest.raises(ScoringError, match=r"kind reasoning_gym: .*No module named 'drawsvg_missing'") as scoring:
        GymScorer(scorer_config())
    assert "\n" not in f"{data.value}{scoring.value}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScoringError, match=r"pip install '\.\[reasoning\]'"):
        GymScorer(scorer_config())
