"""Output that breaks is lost, reported once, and neither raises nor changes the exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, sys, warnings, logging
from train.records.terminal import guard_terminal, report_breaks
guard_terminal()
said = []
report_breaks(said.append)
from rich.console import Console
from rich.progress import track
for number in range(2000):
    print("line", number, "x" * 50)
Console(file=sys.stdout).print("rich", soft_wrap=True)
print("to stderr", file=sys.stderr, flush=True)
warnings.warn("a warning")
logging.getLogger("x").error("logged")
os.write(1, b"below python")
sys.stdout.flush()
report_breaks(said.append)
open(sys.argv[1], "w").write("|".join(dict.fromkeys(said)))
print("at the end")
"""


@pytest.mark.parametrize("redirection", ["| head -1", ">/dev/full", ">&- 2>&-", "2>/dev/full", ">/dev/full 2>&1"])
def test_broken_output_does_not_end_a_run(tmp_path: Path, redirection: str) -> None:
    script = f'set -o pipefail; "$0" -c "$1" "$2" {redirection}'
    command = ["bash", "-c", script, sys.executable, PROGRAM, str(tmp_path / "said")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    said = (tmp_path / "said").read_text()
    assert said.count("|") == (">/dev/full 2>&1" in redirection)
    if redirection == "| head -1":
        assert said == "stdout cannot be written (Broken pipe); the run continues without it"
    if redirection == ">&- 2>&-":
        assert said == ""  # it was closed on purpose


def test_character_that_a_terminal_cannot_show_is_replaced() -> None:
    code = "from train.records.terminal import guard_terminal; guard_terminal(); print('\\u00e9\\u4e2d')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env={"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout) == (0, "??\n"), done.stderr
