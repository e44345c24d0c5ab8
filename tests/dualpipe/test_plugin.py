"""The schedule of docs/extend.md, a file outside the checkout, passes all tests of schedules."""

import re
from pathlib import Path

import pytest

from dualpipe.ir import from_json
from tests import ROOT
from tests.commands import run_command

SUITES = ["tests/dualpipe/test_registered.py", "tests/train/test_equality.py", "tests/train/start/test_plan.py"]


@pytest.fixture(scope="module")
def gpipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Writes the file of the page and its YAML file."""
    page = (ROOT / "docs" / "extend.md").read_text("utf-8")
    path = tmp_path_factory.mktemp("plugin") / "gpipe.py"
    values = path.parent / "conf" / "schedule" / "gpipe.yaml"
    values.parent.mkdir(parents=True)
    for file, language, words in ((path, "python", "def gpipe"), (values, "yaml", "kind: gpipe")):
        (block,) = (block for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if words in block)
        file.write_text(block, "utf-8")
    return path


def run_suite(plugin: Path, words: str, files: list[str]) -> str:
    options = ["-q", "-m", "not exhaustive", "-p", "no:cacheprovider", "--plugins", str(plugin), "-k", words]
    done = run_command(["python", "-m", "pytest", *options, *files], timeout=300)
    return done.stdout + done.stderr


@pytest.mark.long
def test_schedule_of_a_plugin_passes_the_suites_of_registered_schedules(gpipe: Path) -> None:
    output = run_suite(gpipe, "gpipe and (registered or few)", SUITES)
    assert re.search(r"^[0-9]+ passed", output, re.MULTILINE), output
    assert "failed" not in output, output


@pytest.mark.long
def test_schedule_of_a_plugin_that_is_wrong_fails_the_suites(gpipe: Path, tmp_path: Path) -> None:
    """Uses backwards before forwards, and a peak that is declared not to grow."""
    text = gpipe.read_text("utf-8")
    wrong = tmp_path / "wrong.py"
    wrong.write_text(text.replace("(Op.FORWARD, Op.BACKWARD)", "(Op.BACKWARD, Op.FORWARD)"), "utf-8")
    output = run_suite(wrong, "valid and gpipe", ["tests/dualpipe/test_registered.py"])
    assert "which it needs" in output, output
    wrong.write_text(text.replace("grows=True", "grows=False"), "utf-8")
    output = run_suite(wrong, "few and gpipe", ["tests/train/start/test_plan.py"])
    assert "failed" in output, output


def printed(*arguments: str) -> str:
    done = run_command(["python", "-m", *arguments])
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_schedule_of_a_plugin_is_drawn_by_the_command(gpipe: Path) -> None:
    drawn = printed("launch.schedule", f"plugins=[{gpipe}]", "schedule=gpipe", "num_ranks=3", "num_micro_batches=4")
    assert "gpipe, 3 ranks, 4 micro-batches" in drawn
    assert "(P-1)(F+B) = 6" in drawn
    by_kind = (f"plugins=[{gpipe}]", "schedule.kind=gpipe", "num_ranks=3", "num_micro_batches=4", "format=json")
    assert from_json(printed("launch.schedule", *by_kind)).kind == "gpipe"
