"""The schedule of docs/extend.md, a file outside the checkout, passes every suite of registered schedules."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITES = {
    "registered and gpipe": ["tests/dualpipe/test_registered.py", "tests/train/test_equality.py"],
    "gpipe and few": ["tests/train/test_nominal.py"],
}


@pytest.fixture(scope="module")
def gpipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that the page shows."""
    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    blocks = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "def gpipe" in block]
    path = tmp_path_factory.mktemp("plugin") / "gpipe.py"
    path.write_text(blocks[0], "utf-8")
    return path


def run_suite(plugin: Path, words: str, files: list[str]) -> str:
    options = ["-q", "-p", "no:cacheprovider", "-p", "no:randomly", "--plugins", str(plugin), "-k", words]
    command = [sys.executable, "-m", "pytest", *options, *files]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", SUITES)
def test_schedule_of_a_plugin_passes_the_suites_of_registered_schedules(gpipe: Path, words: str) -> None:
    output = run_suite(gpipe, words, SUITES[words])
    assert re.search(r"^[0-9]+ passed", output, re.MULTILINE), output
    assert "failed" not in output, output


def test_schedule_of_a_plugin_that_is_wrong_fails_the_suites(gpipe: Path, tmp_path: Path) -> None:
    """Backwards before forwards, and a peak that is said not to grow."""
    text = gpipe.read_text("utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace("(Op.FORWARD, Op.BACKWARD)", "(Op.BACKWARD, Op.FORWARD)"), "utf-8")
    output = run_suite(wrong, "valid and gpipe", ["tests/dualpipe/test_registered.py"])
    assert "which it needs" in output, output
    wrong.write_text(text.replace("grows=True", "grows=False"), "utf-8")
    output = run_suite(wrong, "few and gpipe", ["tests/train/test_nominal.py"])
    assert "failed" in output, output
