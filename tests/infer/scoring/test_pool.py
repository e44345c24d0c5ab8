"""Tests that calls in threads and requests to workers return, and that those which hang or fail stop no others."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from infer.scoring.pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerTimeoutError, score_in_threads
from infer.scoring.score import ScoringError, failure


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
    assert {score.outcome for score in (first, second)} == {"unknown"}


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
        time.sleep(600)
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
    assert pool.num_restarts == 6
    pid = pool.request({"do": "echo"})["pid"]
    pool.close()
    assert not Path(f"/proc/{pid}").exists()
    broken = tmp_path / "broken.py"
    broken.write_text("raise SystemExit(4)")
    with pytest.raises(WorkerDiedError, match="worker 1 ended with code 4"):
        WorkerPool(WorkerProgram(broken), size=1, seconds=1.0, name="test").request({})
