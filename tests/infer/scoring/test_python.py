"""Tests of the scorer that calls a user's function: no misbehaviour becomes a score or stops a run."""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer.scoring.reward import AnswerGroup, Reward, RewardConfig
from infer.scoring.score import Problem, Score, ScoringError, TextAnswer
from infer.scoring.scorers import PythonConfig, PythonScorer
from tests.infer.scoring.groups import TextGroup

SOURCE = """
import os, sys, time

print("text that is no message")

def score(prompt, answer, expected):
    print("more text")
    if answer == "hang":
        time.sleep(600)
    if answer == "die":
        os._exit(3)
    if answer == "crash":
        os.kill(os.getpid(), 11)
    if answer == "exit":
        raise SystemExit(4)
    if answer == "closed":
        os.closerange(0, 64)
        time.sleep(600)
    if answer == "read":
        return float(len(sys.stdin.read()))
    if answer == "raise":
        raise KeyError("missing")
    if answer == "deep":
        return score(prompt, answer, expected)
    if answer == "environment":
        return float(os.environ["REWARD_TEST"])
    return eval(answer)
"""

# The answer, which the function evaluates or obeys, the value, the outcome and a part of the detail.
CALLS = [
    ("2.5", 2.5, "rated", ""),
    ("len(prompt) + len(expected)", 5.0, "rated", ""),
    ("True", 1.0, "rated", ""),
    ("{'score': 1, 'outcome': 'correct', 'detail': 'so'}", 1.0, "correct", "so"),
    ("{'score': -1}", -1.0, "rated", ""),
    ("read", 0.0, "rated", ""),
    ("environment", 7.0, "rated", ""),
    ("None", 0.0, "error", "must return a number, returned None"),
    ("'1'", 0.0, "error", "returned a value of type str"),
    ("[1]", 0.0, "error", "returned a value of type list"),
    ("float('nan')", 0.0, "error", "must return a finite number, returned nan"),
    ("float('inf')", 0.0, "error", "must return a finite number, returned inf"),
    ("10 ** 400", 0.0, "error", "OverflowError"),
    ("{'score': float('nan')}", 0.0, "error", "returned nan"),
    ("{'scor': 1}", 0.0, "error", "must return a number or a dict with score, outcome, detail, has 'scor'"),
    ("{}", 0.0, "error", "has no 'score'"),
    ("{'score': 1, 'outcome': 'unknown'}", 0.0, "error", "outcome must be one of correct, wrong, missing, rated"),
    ("raise", 0.0, "error", "line 22: KeyError: 'missing'"),
    ("deep", 0.0, "error", "RecursionError"),
    ("exit", 0.0, "error", "SystemExit: 4"),
    ("die", 0.0, "error", "worker 1 ended with code 3"),
    ("crash", 0.0, "error", "worker 1 was killed by SIGSEGV"),
    ("hang", 0.0, "unknown", "worker 1 did not reply within 0.5 s"),
    ("closed", 0.0, "error", "worker 1 closed its output"),
]


def config_of(path: Path, **changes: object) -> PythonConfig:
    values = {"kind": "python", "weight": 1.0, "function": "score", "seconds": 0.5, "num_workers": 1, **changes}
    return PythonConfig(path=str(path), **values)  # type: ignore[arg-type]


def write(folder: Path, source: str) -> Path:
    path = folder / "my_reward.py"
    path.write_text(source)
    return path


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonScorer]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REWARD_TEST", "7")
        made = PythonScorer(config_of(write(tmp_path_factory.mktemp("reward"), SOURCE)))
    yield made
    made.close()


def call(scorer: PythonScorer, text: str) -> Score:
    return scorer.score(TextAnswer(text=text, num_tokens=1), Problem(prompt="abc", answer="de"))


@pytest.mark.slow
@pytest.mark.parametrize(("text", "value", "outcome", "detail"), CALLS)
def test_python_function_gives_a_score_or_an_error(
    scorer: PythonScorer, text: str, value: float, outcome: str, detail: str
) -> None:
    found = call(scorer, text)
    assert (found.value, found.outcome) == (value, outcome)
    assert detail in found.detail
    if outcome in ("error", "unknown"):
        assert "my_reward.py: score: " in found.detail
        assert "\n" not in found.detail
    assert call(scorer, "3").value == 3.0  # the next answer is scored


FILES = [
    ("def score(prompt, answer, expected:\n    pass", "my_reward.py cannot be imported: SyntaxError"),
    ("import no_such_module", "my_reward.py cannot be imported: line 1: ModuleNotFoundError"),
    ("raise SystemExit(1)", "my_reward.py cannot be imported: line 1: SystemExit: 1"),
    ("def scor(prompt, answer, expected): ...", "my_reward.py has no function score; nearest valid: scor"),
    ("score = 1", "my_reward.py has no function score"),
    ("def score(answer): ...", "my_reward.py score must take prompt, answer and expected"),
    ("import os\nos._exit(1)", "my_reward.py ended with code 1"),
]


@pytest.mark.parametrize(("source", "message"), FILES)
def test_python_file_that_cannot_score_is_refused_in_one_line(tmp_path: Path, source: str, message: str) -> None:
    with pytest.raises(ScoringError, match=message) as caught:
        PythonScorer(config_of(write(tmp_path, source)))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("reward.parts, kind python: ")


def test_python_file_that_is_missing_is_refused_with_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path, SOURCE)
    with pytest.raises(ScoringError, match=r"path must be a Python file, .*; nearest valid: my_reward\.py"):
        PythonScorer(config_of(tmp_path / "my_rewards.py"))


def test_python_file_that_changes_during_a_run_gives_errors(tmp_path: Path) -> None:
    path = write(tmp_path, SOURCE)
    scorer = PythonScorer(config_of(path))
    path.write_text(SOURCE + "\n")
    assert call(scorer, "1").value == 1.0  # the worker has the old function
    call(scorer, "die")
    found = call(scorer, "1")
    scorer.close()
    assert (found.outcome, "changed during the run" in found.detail) == ("error", True)


def test_reward_loses_the_groups_of_failed_workers_and_ends_if_all_fail(tmp_path: Path) -> None:
    part = config_of(write(tmp_path, SOURCE), num_workers=2)
    config = RewardConfig(parts=(part,), num_threads=4)

    def group(*texts: str) -> AnswerGroup:
        answers = tuple(TextAnswer(text=text, num_tokens=1) for text in texts)
        return TextGroup(problem=Problem(prompt="", answer=""), answers=answers)

    with Reward(config) as reward:
        found = reward.score_groups([group("1", "2"), group("1", "die"), group("3"), group("hang", "4"), group("5")])
        assert [each.dropped for each in found] == [None, "error", None, "unknown", None]
        assert [sheet.total for each in found if each.dropped is None for sheet in each.sheets] == [1, 2, 3, 5]
        assert "ended with code 3" in found[1].sheets[1].fault
        began = time.monotonic()
        with pytest.raises(ScoringError, match=r"kind python \(.*my_reward.py: score\): its workers failed 10 times"):
            reward.score_groups([group(*["die"] * 100)])
        assert time.monotonic() - began < 20
