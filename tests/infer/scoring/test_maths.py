r"""Tests of the scorer of mathematical answers against a table of pairs, and of the workers that compare them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from infer.scoring.maths import MathsConfig, MathsScorer
from infer.scoring.score import Answer, Problem
from infer.scoring.workers.worker_pool import WorkerDiedError, WorkerPool, WorkerProgram, WorkerTimeoutError

pytestmark = pytest.mark.slow

# Expected answer, content of the box, whether both are equal.
PAIRS = [
    # Fractions, decimals and roots.
    (r"\frac{1}{2}", "0.5", True),
    ("1/2", r"\frac12", True),
    (r"\dfrac{3}{4}", r"\tfrac{3}{4}", True),
    (r"\frac{1}{2}", r"\frac{2}{4}", True),
    (r"\frac{1}{2}", r"\frac{1}{3}", False),
    ("-1/2", r"-\frac{1}{2}", True),
    ("-1/2", r"\frac{-1}{2}", True),
    ("-1/2", r"\frac{1}{2}", False),
    ("2.5", "5/2", True),
    ("1/3", "0.333333", True),
    ("1/3", "0.33", False),
    ("0.1", "0.10", True),
    ("3", "3.0", True),
    ("3", "3.", True),
    ("1.5", r"1\frac{1}{2}", True),
    (r"\sqrt{8}", r"2\sqrt{2}", True),
    (r"\sqrt{2}", "1.414214", True),
    (r"\frac{1}{\sqrt{2}}", r"\frac{\sqrt{2}}{2}", True),
    (r"\sqrt{2}", r"\sqrt{3}", False),
    (r"\sqrt[3]{8}", "2", True),
    ("2^{10}", "1024", True),
    ("2^{10}", "1023", False),
    (r"5!", "120", True),
    (r"\binom{5}{2}", "10", True),
    (r"\log_2 8", "3", True),
    (r"\pi", "3.14159", False),
    (r"\pi/2", r"\frac{\pi}{2}", True),
    (r"\frac{\pi}{4}", r"\frac{\pi}{3}", False),
    (r"\sin(\pi/6)", "0.5", True),
    (r"e^{2}", r"\exp(2)", True),
    (r"|-3|", "3", True),
    # Small and large numbers.
    ("1e-6", "0.000001", True),
    ("10^{-6}", "0.000001", True),
    (r"1.5 \times 10^{3}", "1500", True),
    ("1.5e3", "1500", True),
    (r"3\cdot 10^{8}", "3e8", True),
    ("1e-6", "0.00001", False),
    ("1,000", "1000", True),
    ("1,234,567", "1234567", True),
    (r"1{,}000", "1000", True),
    (r"12\,000", "12000", True),
    ("1000", "100", False),
    ("10^{100}", "10^{99}", False),
    # Units, signs of money, degrees.
    (r"10\text{ cm}", "10", True),
    (r"10 \mathrm{~cm}", "10", True),
    ("10", r"10\text{ meters}", True),
    (r"10\text{ cm}", "11", False),
    (r"\$5", "5", True),
    (r"\$18.90", "18.9", True),
    (r"90^\circ", "90", True),
    (r"90^{\circ}", "45", False),
    # Percent: as a fraction, and as the number without its sign.
    (r"50\%", "0.5", True),
    ("50%", r"\frac{1}{2}", True),
    (r"50\%", "50", True),
    ("50", r"50\%", True),
    ("0.5", r"50\%", True),
    (r"50\%", r"50.0\%", True),
    (r"50\%", "5", False),
    (r"50\%", r"5\%", False),
    # Sets, tuples, intervals.
    (r"\{1,2,3\}", r"\{3,2,1\}", True),
    (r"\{1,2,3\}", r"\{1,2\}", False),
    (r"\{1,2\}", "1, 2", True),
    (r"\emptyset", r"\{\}", True),
    ("(1,2)", "(1, 2)", True),
    ("(1,2)", "(2,1)", False),
    (r"\left(1, 2\right)", "(1,2)", True),
    ("[0,1)", "[0, 1)", True),
    ("[0,1)", "[0,1]", False),
    (r"(-\infty, 3]", r"(-\infty,3]", True),
    (r"(-\infty, 3]", r"(-\infty,3)", False),
    (r"[0,1] \cup [2,3]", r"[2,3] \cup [0,1]", True),
    (r"[0,1] \cup [2,3]", "[0,3]", False),
    (r"\infty", r"\infty", True),
    (r"\infty", r"-\infty", False),
    # Equations and inequalities.
    ("3", "x=3", True),
    ("x=3", "3", True),
    ("x=3", "x=4", False),
    ("x<3", "3>x", True),
    ("x<3", r"x \le 3", False),
    ("y=2x+1", "y = 1 + 2x", True),
    ("y=2x+1", "y=2x-1", False),
    # Expressions.
    ("x^2+2x+1", "(x+1)^2", True),
    ("x^2+2x+1", "(x-1)^2", False),
    ("2x", "x+x", True),
    ("ab", "ba", True),
    (r"\frac{x^2-1}{x-1}", "x+1", True),
    ("2(x+1)", "2x+2", True),
    (r"3+4i", "4i+3", True),
    (r"3+4i", "3-4i", False),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}", True),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\3&5\end{pmatrix}", False),
    # Words and letters.
    ("A", "A", True),
    ("A", "B", False),
    (r"\text{(B)}", "B", True),
    (r"\text{even}", "even", True),
    (r"\text{even}", "odd", False),
    ("\\text{Tuesday}", r"\text{Tuesday}", True),
    # Answers that are none.
    ("3", "?", False),
    ("3", r"\text{no solution}", False),
    ("3", r"\frac{", False),
    ("0", "", False),
    ("3", "\u22123", False),
    ("-3", "\u22123", True),
    ("1 2 3", "6", False),
    ("1 2 3", "1  2 3", True),
    ("1 2 3", "1 3 2", False),
]
# The whole answer, the outcome if 7 is expected.
ANSWERS = [
    (r"\boxed{7}", "correct"),
    (r"First \boxed{3}, then \boxed{7}.", "correct"),
    (r"First \boxed{7}, then \boxed{3}.", "wrong"),
    (r"\boxed{7} is the answer to all.", "correct"),
    (r"\boxed{\boxed{7}}", "correct"),
    (r"\boxed{\boxed{3} + 4}", "wrong"),
    (r"\boxed{ 7 }", "correct"),
    (r"\boxed{7", "missing"),
    (r"\boxed{3} and \boxed{7", "wrong"),
    (r"\fbox{7}", "correct"),
    ("7", "missing"),
    ("", "missing"),
    (r"<think>\boxed{7}</think>", "missing"),
    (r"<think>\boxed{7}</think> \boxed{3}", "wrong"),
    (r"<think>\boxed{3}</think> \boxed{7}", "correct"),
    (r"\boxed{3}</think> \boxed{7}", "correct"),
    (r"<think>\boxed{7}", "missing"),
    (r"</think>\boxed{7}<think>", "missing"),
    (r"<think>a</think>\boxed{7}</think>\boxed{3}", "wrong"),
    (r"$\boxed{\frac{14}{2}}$", "correct"),
    (r"\boxed{" + "7" * 5000 + "}", "wrong"),
]
# Each takes minutes or all memory if it is computed.
BOMBS = [
    "9^{9^{9^{9}}}",
    r"(9^{9^{9}})!",
    r"\sum_{i=1}^{10000000} \frac{1}{i^{i}}",
]


@pytest.fixture(scope="module")
def scorer() -> Iterator[MathsScorer]:
    made = MathsScorer(MathsConfig(kind="maths", weight=1.0, seconds=20.0, num_workers=2, memory_gib=2.0))
    yield made
    made.close()


def box(text: str) -> Answer:
    return Answer(text=f"<think>hm</think>The answer is \\boxed{{{text}}}.", num_tokens=1)


def test_maths_pairs_are_judged_as_in_the_table(scorer: MathsScorer) -> None:
    assert len(PAIRS) >= 100
    with ThreadPoolExecutor(4) as threads:  # no thread is the main one
        scores = list(threads.map(lambda pair: scorer.score(box(pair[1]), Problem(prompt="", answer=pair[0])), PAIRS))
    wrong = [
        (expected, found, score)
        for (expected, found, is_equal), score in zip(PAIRS, scores, strict=True)
        if (score.value, score.outcome == "correct") != (float(is_equal), is_equal)
    ]
    assert not wrong, "\n".join(map(str, wrong))
    assert not [score for score in scores if score.outcome in ("error", "timeout")]


def test_maths_only_the_last_box_after_the_thoughts_counts(scorer: MathsScorer) -> None:
    found = {
        text: scorer.score(Answer(text=text, num_tokens=1), Problem(prompt="", answer="7")).outcome
        for text, _ in ANSWERS
    }
    assert found == dict(ANSWERS)


def test_maths_bombs_end_as_timeout_and_later_answers_are_judged() -> None:
    scorer = MathsScorer(MathsConfig(kind="maths", weight=1.0, seconds=2.0, num_workers=1, memory_gib=1.5))
    problem = Problem(prompt="", answer="7")
    assert scorer.score(box("7"), problem).outcome == "correct"
    for bomb in BOMBS:
        begin = time.monotonic()
        score = scorer.score(box(bomb), problem)
        assert (score.value, score.outcome) == (0, "timeout"), (bomb, score)
        assert time.monotonic() - begin < 5, bomb
        assert scorer.score(box("7.0"), problem).outcome == "correct", bomb
    scorer.close()


def test_maths_problem_without_an_answer_is_skipped_and_a_faulty_one_is_an_error(scorer: MathsScorer) -> None:
    assert scorer.score(box("7"), Problem(prompt="")).outcome == "skipped"
    assert scorer.score(box("7"), Problem(prompt="", answer="")).outcome == "error"


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
