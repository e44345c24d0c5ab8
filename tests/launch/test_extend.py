"""The examples of docs/extend.md work as they are printed, in a folder outside the checkout."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8")
FILES = re.findall(r"`([\w/]+\.(?:py|yaml))`[^`]*\n\n```(?:python|yaml)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
COMMANDS = re.findall(r"^python -m .*$", TEXT, re.MULTILINE)
LAUNCHES = [command for command in COMMANDS if " launch." in command]
# The suites are run by tests/dualpipe/test_plugin.py and tests/comm/test_registry.py.


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("my_folder")
    for name, content in FILES:
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_text(content, encoding="utf-8")
    return made


def run(command: str, cwd: Path) -> str:
    words = [sys.executable, *shlex.split(command)[1:]]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, cwd=cwd, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def test_extend_has_an_example_of_each_kind() -> None:
    names = {name for name, _ in FILES}
    assert names >= {"sawtooth.py", "gpipe.py", "counting.py"}
    assert all(any(f"plugins=[{name}]" in command for command in LAUNCHES) for name in names if name.endswith(".py"))


@pytest.mark.long
@pytest.mark.parametrize("command", LAUNCHES)
def test_extend_command_works_as_printed(command: str, folder: Path) -> None:
    shown = run(command, folder)
    if "sawtooth" in command:
        runs = sorted((folder / "outputs/run").glob("*/metrics.jsonl"))
        rates = [float(rate) for rate in re.findall(r'"lr": ([\d.e-]+)', runs[0].read_text(encoding="utf-8"))]
        # Two steps of warm-up, then three teeth over four steps.
        assert rates == pytest.approx([0.0015, 0.003, 0.003, 0.000975, 0.00165, 0.002325])
    if "launch.schedule" in command:
        assert "gpipe" in shown
    if "counting" in command:
        assert re.search(r"\d+ dispatches", shown)
