"""How the command ends that is refused, interrupted or not read to the end, as a user runs it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.checkpoints import write_run

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


def test_generate_command_ends_with_2_in_one_line(run: Path) -> None:
    command = [sys.executable, "-m", "launch.generate", f"ckpt={run}", "prompt=a", "top_p=0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: top_p: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.slow
def test_generate_reader_that_leaves_early_ends_it_quietly(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f\n" * 400)
    choices = f"ckpt={run} prompts={tmp_path / 'p.txt'} max_new_tokens=40"
    command = f"{sys.executable} -m launch.generate {choices} | head -c 10"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout == "== 1 of 40"
    assert done.stderr == ""


@pytest.mark.slow
def test_generate_interrupted_ends_with_130_and_keeps_what_is_complete(run: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("def f\n" * 4000)
    out = tmp_path / "new" / "out.jsonl"
    choices = [f"ckpt={run}", f"prompts={tmp_path / 'p.txt'}", "max_new_tokens=40", f"out={out}", "batch_size=2"]
    command = [sys.executable, "-m", "launch.generate", *choices]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONUNBUFFERED": "1"}
    ) as process:
        partial, deadline = out.with_name("out.jsonl.partial"), time.monotonic() + 60
        while not (partial.exists() and partial.stat().st_size):
            assert time.monotonic() < deadline
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        begin = time.monotonic()
        written, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert time.monotonic() - begin < 20
    assert (written, errors.decode()) == (b"", f"out: not complete; what there was is in {partial}\n")
    assert [path.name for path in out.parent.iterdir()] == [partial.name]
    lines = partial.read_text(encoding="utf-8").splitlines()
    assert 1 <= len(lines) < 4000
    assert {json.loads(line)["prompt"] for line in lines} == {"def f"}
