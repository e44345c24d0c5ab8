"""User functions, reasoning-gym, pools of calls, and pass rates by hand."""

import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from data.corpus import DataError
from data.prepare import check_config, prepare
from data.problems import GymSource, split_problems
from score import scorers
from score.pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerTimeoutError, score_in_threads
from score.ratings import PassRates, compute_pass_rates
from score.reward import AnswerGroup, Reward, RewardConfig, ScoreSheet
from score.score import Outcome, Problem, Score, ScoringError, TextAnswer, failure, problem_of
from score.scorers import GymScorer, GymScorerConfig, PythonConfig, PythonScorer
from tests.data.chat.conversations import chat_tokenizer
from tests.data.chat.test_sources import config_of as gym_config_of
from tests.score.groups import TextGroup

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


def config_of(path: Path, **changes: Any) -> PythonConfig:
    values = {"kind": "python", "weight": 1.0, "function": "score", "seconds": 0.5, "num_workers": 1, **changes}
    return PythonConfig(path=str(path), **values)


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


@pytest.mark.slow
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


def source_of(**changes: Any) -> GymSource:
    values = {"dataset": "sums", "count": 60, "generator_seed": 3, "template": "v3", **changes}
    return GymSource(kind="reasoning_gym", **values)


def scorer_config() -> GymScorerConfig:
    return GymScorerConfig(kind="reasoning_gym", weight=1.0, boxed=False, seconds=5.0, num_workers=1)


def test_gym_problems_are_different_and_their_verifier_finds_them(library: Path, tmp_path: Path) -> None:
    config = gym_config_of(source_of(), tmp_path, chat_tokenizer())
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
    with pytest.raises(
        DataError, match=r"data\.dataset: must be one of the 1 data sets .*, is 'sumz'; nearest valid: sums"
    ):
        check_config(gym_config_of(source_of(dataset="sumz"), tmp_path, chat_tokenizer()))
    with pytest.raises(DataError, match=r"data\.tokenizer: must be given with data=reasoning_gym"):
        check_config(gym_config_of(source_of(), tmp_path))


def test_gym_library_that_is_missing_or_broken_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, library: Path
) -> None:
    (library / "reasoning_gym" / "__init__.py").write_text("import drawsvg_missing\n")
    with pytest.raises(
        DataError, match=r"cannot be imported: No module named 'drawsvg_missing'; .* pip install '\.\[reasoning\]'"
    ) as data:
        split_problems(gym_config_of(source_of(), tmp_path))
    with pytest.raises(ScoringError, match=r"kind reasoning_gym: .*No module named 'drawsvg_missing'") as scoring:
        GymScorer(scorer_config())
    assert "\n" not in f"{data.value}{scoring.value}"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ScoringError, match=r"pip install '\.\[reasoning\]'"):
        GymScorer(scorer_config())


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """Yields an event that hanging calls wait for, so that their threads end after the test."""
    event = threading.Event()
    yield event
    event.set()


def test_threads_return_results_in_the_order_of_the_calls() -> None:
    calls = [lambda n=n: time.sleep(0.001 * (5 - n % 5)) or n for n in range(20)]
    assert score_in_threads("test", calls, 4, 10.0) == list(range(20))
    assert score_in_threads("test", [], 4, None) == []


def test_threads_abandon_calls_that_hang_and_keep_the_others(hang: threading.Event) -> None:
    def fail() -> int:
        raise ValueError("broken")

    first, one, broken, second, two = score_in_threads(
        "test", [hang.wait, lambda: 1, fail, hang.wait, lambda: 2], 2, 0.2
    )
    assert (one, two) == (1, 2)
    assert broken == failure("error", "test: ValueError: broken")
    assert {score.outcome for score in (first, second)} == {"unknown"}  # type: ignore[attr-defined]


def test_threads_give_up_if_only_abandoned_calls_follow_each_other(hang: threading.Event) -> None:
    began = time.monotonic()
    with pytest.raises(ScoringError, match=r"kind test: must score an answer within 0\.05 s, does not for 4 answers"):
        score_in_threads("test", [hang.wait] * 100, 2, 0.05)
    assert time.monotonic() - began < 5


def test_threads_end_with_the_first_fatal_error() -> None:
    done: list[int] = []

    def fail() -> None:
        raise ScoringError("fatal")

    with pytest.raises(ScoringError, match="fatal"):
        score_in_threads("test", [fail, *(lambda: time.sleep(0.01) or done.append(1) for _ in range(500))], 1, None)
    assert len(done) < 500


PROGRAM = """
import json, os, sys, time
print("{}", flush=True)
for line in sys.stdin:
    message = json.loads(line)
    if message["do"] == "hang":
        if os.fork() == 0:
            time.sleep(600)
        while print(end=" ", flush=True) is None:  # no part of a reply delays the deadline
            time.sleep(0.1)
    if message["do"] == "die":
        os._exit(3)
    print(json.dumps({"pid": os.getpid(), "size": len(message.get("data", ""))}), flush=True)
"""


@pytest.mark.slow
def test_worker_pool_replaces_workers_that_hang_or_die(tmp_path: Path) -> None:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    pool = WorkerPool(WorkerProgram(path), size=2, seconds=1.0, name="test")
    results: list[object] = []

    def ask(message: dict[str, object]) -> None:
        try:
            results.append(pool.request(message)["size"])
        except (WorkerTimeoutError, WorkerDiedError) as error:
            results.append(type(error))

    messages = [{"do": "echo", "data": "x" * 300000}, {"do": "hang"}, {"do": "die"}] * 3
    threads = [threading.Thread(target=ask, args=(message,)) for message in messages]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(map(str, results)) == sorted(map(str, [300000, WorkerTimeoutError, WorkerDiedError] * 3))
    pid = pool.request({"do": "echo"})["pid"]
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(4)")
    with pytest.raises(WorkerDiedError, match="worker 1 ended with code 4"):
        WorkerPool(WorkerProgram(broken), size=1, seconds=1.0, name="test").request({})


def rates_of(*groups: list[tuple[str, Outcome]]) -> PassRates:
    """Returns the rates of groups of answers with their outcomes. A text that ends with `...` was cut."""
    answers = [
        [TextAnswer(text=text, num_tokens=len(text), is_finished=not text.endswith("...")) for text, _ in group]
        for group in groups
    ]
    sheets = [[ScoreSheet(total=0.0, outcome=outcome, parts={}) for _, outcome in group] for group in groups]
    return compute_pass_rates(answers, sheets)


def test_pass_rates_count_answers_problems_and_votes() -> None:
    found = rates_of(
        [("12", "correct"), ("21", "wrong"), (" 12\n", "correct"), ("1", "wrong")],
        [("3", "wrong"), ("4", "correct"), ("3", "wrong"), ("5", "unknown")],
        [("6...", "missing"), ("6...", "missing"), ("7", "correct"), ("8", "wrong")],
        [("9", "wrong"), ("9", "wrong"), ("", "missing"), ("9", "wrong")],
    )
    assert found == PassRates(
        num_samples=4, pass_at_1=4 / 15, pass_at_n=3 / 4, maj_at_n=2 / 4, mean_tokens=26 / 16, cut_share=2 / 16
    )


def test_votes_are_about_boxes_and_not_about_thoughts() -> None:
    found = rates_of(
        [
            (r"<think>a</think>so \boxed{2}", "correct"),
            (r"<think>b</think>thus \boxed{2}", "correct"),
            (r"\boxed{3}", "wrong"),
        ]
    )
    assert found.maj_at_n == 1.0
    nothing = rates_of([("a...", "missing"), ("a...", "missing")])
    assert (nothing.maj_at_n, nothing.cut_share) == (0.0, 1.0)
