"""Tests of the scorer of programs: honest programs get their verdict, hostile ones no pass and no effect outside."""

import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from data.problems import StdinTest
from score import programs, supervision
from score.programs import CodeConfig, CodeScorer
from score.sandbox import GuestLimits, GuestProgram
from score.score import Problem, Score, ScoringError, TextAnswer
from score.supervision import wait_for_guests
from tests.score.hostile_programs import ATTACKS, CONTROLS, FORGERIES, QUICK, RIGHT, TESTS
from tests.score.program_table import OWN_PROCESS, TABLE, TRICKS
from tests.score.test_isolation import open_to_all, processes_of

pytestmark = pytest.mark.slow
WALL_SECONDS = 20.0
# Not used by any other run of these tests at the same time, so that a process that is left can be found.
UID = 61184 + os.getpid() % 4096


def build(**changes: Any) -> CodeScorer:
    values = {"cpu_seconds": 0.5, "wall_seconds": WALL_SECONDS, "memory_mib": 512, "num_sandboxes": 2, **changes}
    return CodeScorer(CodeConfig(kind="code", weight=1.0, **values))


@pytest.fixture(scope="module")
def scorer() -> Iterator[CodeScorer]:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed (apt-get install bubblewrap)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(programs, "_unused_uid", lambda: UID)
        try:
            made = build()
        except ScoringError as error:
            pytest.skip(f"this machine has no sandbox: {error}")
        yield made
        patch.undo()


def run(scorer: CodeScorer, program: str, tests: str | tuple[StdinTest, ...]) -> Score:
    return scorer.score(TextAnswer(text=f"```python\n{program}\n```", num_tokens=1), Problem(prompt="", tests=tests))


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """Provides what attacks aim at, and checks afterwards that nothing has changed."""
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "SECRET")
    open_to_all(tmp_path)
    canary = tmp_path / "canary"
    canary.write_text("intact")
    canary.chmod(0o666)
    temporary = set(os.listdir("/tmp"))
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        yield {"canary": str(canary), "port": server.getsockname()[1]}
        with pytest.raises(BlockingIOError):
            server.accept()
    assert canary.read_text() == "intact"
    assert os.listdir(tmp_path) == ["canary"]
    assert not {"big", "link", "env", "p"} & (set(os.listdir("/tmp")) - temporary)
    assert not processes_of(UID)


def aimed(attack: str, outside: dict[str, object]) -> str:
    for key, value in outside.items():
        attack = attack.replace(f"{{{key}!r}}", repr(value)).replace(f"{{{key}}}", str(value))
    return attack


HONEST = {
    "values": ("def f(x): return x * x", TESTS, "correct"),
    "an error": ("def f(x):\n    raise ValueError('no')", "try:\n    f(1)\nexcept ValueError:\n    pass\n", "correct"),
    "a wrong value": ("def f(x): return x", TESTS, "wrong"),
    "a missing function": ("def g(x): return x", TESTS, "wrong"),
    "bad syntax": ("def f(x: return", TESTS, "wrong"),
    "kinds of values": (
        "def f(x): return x",
        "for v in (None, 1.5, 'é\\ud800', b'a', (1, (2,)), {1: {2}}, frozenset('a'), 2j, 10**30, [[]], {}):\n"
        "    assert f(v) == v and type(f(v)) is type(v)\n",
        "correct",
    ),
    "a class": (
        "class Stack:\n    def __init__(self): self.items = []\n    def push(self, x): self.items.append(x)\n"
        "    def pop(self): return self.items.pop()\n",
        "s = Stack()\ns.push(1)\ns.push(x=2)\nassert s.items == [1, 2]\nassert (s.pop(), s.pop()) == (2, 1)\n"
        "try:\n    s.pop()\n    assert False\nexcept IndexError:\n    pass\n",
        "correct",
    ),
    "helpers of the tests": (
        "def f(x): return x * x",
        "import math\ndef check(g):\n    assert all(math.isclose(g(x), x**2) for x in range(5))\ncheck(f)",
        "correct",
    ),
    "a printing program": ("print('hello')\ndef f(x):\n    print(x)\n    return x * x", TESTS, "correct"),
    "a main block": ("def f(x): return x * x\nif __name__ == '__main__': raise SystemExit(1)", TESTS, "correct"),
    "a dataclass": (
        "from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\ndef f(x): return P(x * x)",
        "assert f(3).x == 9",
        "correct",
    ),
    "tests that are not Python": ("def f(x): return x * x", "assert (", "error"),
    "tests that exit": ("def f(x): return x * x", "import os\nassert f(2) == 4\nos._exit(0)", "error"),
    "tests that take too long": ("def f(x): return x * x", "while True: pass", "error"),
    "input and output": ("print(int(input()) * 2)", (StdinTest(stdin="4\n", stdout="8"),), "correct"),
    "wrong output": (
        "print(8)",
        (StdinTest(stdin="4\n", stdout="8\n"), StdinTest(stdin="5\n", stdout="10\n")),
        "wrong",
    ),
    "a right output and an error": ("print(8)\nraise SystemExit(1)", (StdinTest(stdin="", stdout="8\n"),), "wrong"),
    "no output": ("import os\nos._exit(0)", (StdinTest(stdin="", stdout="8\n"),), "wrong"),
    "a loop of a script": ("while True: pass", (StdinTest(stdin="", stdout="8\n"),), "timeout"),
}


@pytest.mark.parametrize("name", HONEST)
def test_code_honest_programs_get_their_verdict(scorer: CodeScorer, name: str) -> None:
    program, tests, expected = HONEST[name]
    score = run(scorer, program, tests)  # type: ignore[arg-type]
    assert (score.outcome, score.value) == (expected, float(expected == "correct")), score.detail


def attempt_all(attacks: dict[str, str], *, expected: bool) -> str:
    """Returns a program that fails with the name of the first attack whose success is not the expected one."""
    return (
        f"for name, attack in {attacks!r}.items():\n    names = {{'succeeded': False}}\n"
        "    try: exec(attack, names)\n    except BaseException: pass\n"
        f"    if names['succeeded'] != {expected}: raise RuntimeError(name)\n"
    )


def test_code_quick_attacks_do_not_reach_the_machine(scorer: CodeScorer, outside: dict[str, object]) -> None:
    attacks = {name: aimed(ATTACKS[name], outside) for name in QUICK}
    score = run(scorer, f"{attempt_all(attacks, expected=False)}{RIGHT}", TESTS)
    assert score.outcome == "correct", score


@pytest.mark.parametrize("name", [name for name in ATTACKS if name not in QUICK])
def test_code_attacks_do_not_reach_the_machine(scorer: CodeScorer, outside: dict[str, object], name: str) -> None:
    attack = aimed(ATTACKS[name], outside)
    begin = time.monotonic()
    score = run(scorer, f"succeeded = False\n{attack}\nif succeeded:\n    def f(x): return x * x", TESTS)
    assert score.outcome in ("wrong", "timeout"), score
    assert time.monotonic() - begin < WALL_SECONDS + 1


# A traced process stops at the first signal, so that nothing follows this attack.
@pytest.mark.parametrize("names", [CONTROLS, ("ptrace",)])
def test_code_attacks_succeed_without_a_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_TRAINER", "SECRET")
    canary = tmp_path / "canary"
    canary.write_text("intact")
    with socket.create_server(("127.0.0.1", 0)) as server:
        target: dict[str, object] = {"canary": str(canary), "port": server.getsockname()[1]}
        program = attempt_all({name: aimed(ATTACKS[name], target) for name in names}, expected=True)
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", FORGERIES)
def test_code_no_verdict_can_be_forged(scorer: CodeScorer, outside: dict[str, object], name: str) -> None:
    begin = time.monotonic()
    score = run(scorer, FORGERIES[name].replace("{{", "{").replace("}}", "}"), TESTS)
    assert score.value == 0
    assert score.outcome in ("wrong", "timeout", "missing"), score
    assert time.monotonic() - begin < WALL_SECONDS + 1


@pytest.mark.exhaustive
def test_code_right_and_wrong_programs_of_many_kinds_get_their_verdict(scorer: CodeScorer) -> None:
    assert len(TABLE) >= 60
    with ThreadPoolExecutor(2) as threads:
        right = list(threads.map(lambda case: run(scorer, case[0], case[2]), TABLE.values()))
        wrong = list(threads.map(lambda case: run(scorer, case[1], case[2]), TABLE.values()))
    assert not {name: score for name, score in zip(TABLE, right, strict=True) if score.outcome != "correct"}
    assert not {name: score for name, score in zip(TABLE, wrong, strict=True) if score.outcome != "wrong"}


@pytest.mark.parametrize("name", ["generator", "own errors", "sort in place"])
def test_code_some_programs_of_the_table_get_their_verdict(scorer: CodeScorer, name: str) -> None:
    right, wrong, tests = TABLE[name]
    assert run(scorer, right, tests).outcome == "correct"
    assert run(scorer, wrong, tests).outcome == "wrong"


@pytest.mark.parametrize("name", TRICKS)
def test_code_no_operator_forges_a_verdict(scorer: CodeScorer, name: str) -> None:
    assert run(scorer, *TRICKS[name]).outcome in ("wrong", "timeout")


def test_code_an_operator_of_an_unexpected_class_is_no_verdict(scorer: CodeScorer) -> None:
    program = "class N:\n    def __getattr__(s, name): return lambda *a: True\ndef f(x): return N()"
    assert run(scorer, program, "assert f(2).startswith('ab')").outcome == "error"


@pytest.mark.parametrize("name", OWN_PROCESS)
def test_code_what_only_one_process_can_show_is_an_error_and_not_wrong(scorer: CodeScorer, name: str) -> None:
    program, tests = OWN_PROCESS[name]
    score = run(scorer, program, tests)
    assert score.outcome == "error", score
    assert score.detail.startswith("passes in one process with its tests only: "), score
    assert run(scorer, program.replace("2", "3", 1), tests).outcome == "wrong"


def test_code_sets_print_in_one_order(scorer: CodeScorer) -> None:
    program = "class A: pass\nprint({*'abcdefgh', None, A, print}, {str(n) for n in range(9)})"
    outcomes = set()
    for _ in range(6):
        outcomes.add(run(scorer, program, (StdinTest(stdin="", stdout="-"),)).detail)
    assert len(outcomes) == 1, outcomes


def test_code_processor_time_of_every_child_counts(scorer: CodeScorer) -> None:
    burn = "    end = time.process_time() + {}\n    while time.process_time() < end: pass\n    os._exit(0)\n"
    of_a_thread = (
        f"import os, threading, time\ndef work():\n  if os.fork() == 0:\n{burn.format(60)}  time.sleep(60)\n"
        "threading.Thread(target=work).start()\ntime.sleep(60)"
    )
    # At most a few at a time: a busy machine runs them slowly, and more than 8 processes are refused.
    without_wait = (
        "import os, signal, time\nsignal.signal(signal.SIGCHLD, signal.SIG_IGN)\nfor _ in range(400):\n"
        f"  try: is_child = os.fork() == 0\n  except OSError: is_child = False\n  if is_child:\n{burn.format(0.2)}"
        "  time.sleep(0.25)"
    )
    for program in (of_a_thread, without_wait):
        score = run(scorer, program, TESTS)
        assert (score.outcome, score.detail) == ("timeout", "more than 0.5 s of processor time")


def test_code_guests_are_the_first_to_end_without_memory(scorer: CodeScorer) -> None:
    limits = GuestLimits(cpu_seconds=5, memory_bytes=2**29)
    files = {"program.py": "import time\ntime.sleep(1)"}
    guest = scorer._sandbox.start(GuestProgram(name="script", limits=limits, files=files))
    announced = b""
    while b"," not in announced:
        announced += os.read(guest.info, 4096)
    pid = int(bytes(byte for byte in announced.partition(b"child-pid")[2].partition(b",")[0] if 48 <= byte <= 57))
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "1000\n"
    assert Path("/proc/self/oom_score_adj").read_text() != "1000\n"
    wait_for_guests([guest], [5], 20)


@dataclass
class StandIn:
    """A guest with given times."""

    delays: list[float]
    speed: float
    cpu_seconds: float = 0.0
    is_running: bool = True

    def measure(self) -> float:
        self.cpu_seconds += self.speed
        return self.delays.pop()


@pytest.mark.parametrize(
    ("delays", "speed", "slept", "delayed"),
    [
        ([0.0] * 10, 0.0, 10, 0),  # sleeps
        ([1.0] * 10, 0.0, 0, 10),  # waits for a processor
        ([0.75] * 10, 0.25, 0, 7.5),  # gets a quarter of one
        ([6.0] * 3 + [0.0] * 7, 0.3, 4.9, 2.1),  # its own threads wait for each other and then it sleeps
        ([7.0] * 10, 1.0, 0, 0),  # threads that wait for each other while one of them runs
    ],
)
def test_code_sleep_and_a_busy_machine_are_distinguished(
    monkeypatch: pytest.MonkeyPatch, delays: list[float], speed: float, slept: float, delayed: float
) -> None:
    now = iter(range(1, 20))
    monkeypatch.setattr(supervision.time, "monotonic", lambda: float(next(now)))  # type: ignore[attr-defined]
    activity, guest = supervision._Activity(0.0), StandIn(list(delays), speed)
    for _ in range(10):
        activity.measure([guest])  # type: ignore[list-item]
    assert (activity.slept, activity.delayed) == (pytest.approx(slept), pytest.approx(delayed))


def test_code_verdicts_are_the_same_for_one_and_for_many_at_once(scorer: CodeScorer) -> None:
    work = "def f(x):\n    for _ in range({}): pass\n    return x * x {}"
    programs = [work.format(count, end) for count in (10, 10**6) for end in ("", "+ 1")]
    expected = ["correct", "wrong", "correct", "wrong"]
    assert [run(scorer, program, TESTS).outcome for program in programs] == expected
    stop = threading.Event()
    busy = [threading.Thread(target=lambda: [sum(range(1000)) for _ in iter(stop.is_set, True)]) for _ in range(2)]
    for thread in busy:
        thread.start()
    try:
        with ThreadPoolExecutor(8) as threads:
            together = list(threads.map(lambda program: run(scorer, program, TESTS).outcome, programs * 2))
    finally:
        stop.set()
    assert together == expected * 2


@pytest.mark.parametrize("tests", [TESTS, (StdinTest(stdin="", stdout=""),)])
def test_code_of_a_sandbox_that_does_not_start_is_not_wrong(
    tests: str | tuple[StdinTest, ...], scorer: CodeScorer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = tmp_path / "starts"
    prefix = scorer._sandbox._prefix
    for failures, outcome in ((1, "correct"), (9, "unknown")):
        starts.write_text("")
        fails = f'echo 1 >>{starts}; [ $(wc -l <{starts}) -gt {failures} ] && exec "$@"; echo no namespace >&2; exit 1'
        monkeypatch.setattr(scorer._sandbox, "_prefix", ("sh", "-c", fails, "sh", *prefix))
        score = run(scorer, RIGHT, tests)
        assert score.outcome == outcome
    assert score.detail.endswith("the sandbox did not start: no namespace")


def test_code_is_refused_without_a_sandbox(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ScoringError, match=r"bubblewrap is not installed; .*apt-get install .*isolation=accept_risk"
    ) as caught:
        build()
    assert "\n" not in str(caught.value)
    fake = tmp_path / "bwrap"
    fake.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    fake.chmod(0o755)
    (tmp_path / "setpriv").write_text('#!/bin/sh\nwhile [ "$1" != bwrap ]; do shift; done\nexec "$@"\n')
    (tmp_path / "setpriv").chmod(0o755)
    with pytest.raises(ScoringError, match="No permissions to create new namespace; allow user namespaces"):
        build()
    fake.write_text("#!/bin/sh\necho '[\"/etc/passwd can be read\"]'\n")
    with pytest.raises(ScoringError, match="does not hold: /etc/passwd can be read"):
        build()


def test_code_needs_a_block_of_code(scorer: CodeScorer) -> None:
    problem = Problem(prompt="", tests=TESTS)
    for text in (RIGHT, f"<think>```python\n{RIGHT}```", f"```text\n{RIGHT}```", "```python\n```"):
        assert scorer.score(TextAnswer(text=text, num_tokens=1), problem).outcome == "missing"
    blocks = f"<think>a</think>```python\nbad\n```\nthen\n```py\n{RIGHT}```\n"
    assert scorer.score(TextAnswer(text=blocks, num_tokens=1), problem).outcome == "correct"
    assert scorer.score(TextAnswer(text=blocks, num_tokens=1), Problem(prompt="", answer="3")).outcome == "skipped"
