"""The wheel of the schedules runs in an empty environment, as its README says."""

import re
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from dualpipe.__main__ import main
from dualpipe.wheel import build


@pytest.mark.slow
@pytest.mark.long
def test_wheel_runs_its_readme_in_an_empty_environment(tmp_path: Path) -> None:
    wheel = build.build_wheel(tmp_path / "dist")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=True)
    python = str(environment / "bin" / "python")
    install = [python, "-m", "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", str(wheel)]
    subprocess.run(install, check=True, cwd=tmp_path)
    readme = (Path(build.__file__).parent / "README.md").read_text("utf-8")
    blocks = re.findall(r"(?<!-->\n)```(\w+)\n(.*?)```", readme, re.DOTALL)
    assert [language for language, _ in blocks] == ["bash", "python"]
    folder = tmp_path / "empty"
    folder.mkdir()
    commands = [line for line in blocks[0][1].splitlines() if line.startswith("python")]
    assert len(commands) == 3
    for command in commands:
        subprocess.run([python, *command.split()[1:]], check=True, cwd=folder, timeout=60)
    ran = subprocess.run(
        [python, "-c", blocks[1][1]], check=True, cwd=folder, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout.startswith("BuiltSchedule(dualpipe_interleaved")
    assert {path.name for path in folder.iterdir()} == {"dualpipe.svg", "zb_v.csv", "schedule.svg"}
    modules = [python, "-c", f"import sys, {build.PACKAGE}; print('torch' in sys.modules, 'numpy' in sys.modules)"]
    assert subprocess.run(modules, check=True, cwd=folder, capture_output=True, text=True).stdout == "False False\n"


def test_command_of_the_wheel_shows_writes_and_refuses(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["dualpipe-schedules"])
    size = ["--ranks", "2", "--micro-batches", "6"]
    assert main([*size, "--exchange", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("schedule ")
    assert main(["1f1b", *size, "--out", str(tmp_path / "order.json")]) == 0
    assert '"kind": "1f1b"' in (tmp_path / "order.json").read_text().replace('":"', '": "')
    for arguments, words in (
        (["dualpip", *size], "did you mean dualpipe"),
        (["dualpipe", *size, "--forward", "-1"], "forward"),
        (["dualpipe", "--ranks", "2", "--micro-batches", "6", "--out", str(tmp_path / "order.csv")], "one direction"),
        (["1f1b", *size, "--out", str(tmp_path / "order.png")], "form: must be one of"),
        (["1f1b", *size, "--out", str(tmp_path / "missing" / "order.json")], "No such file"),
    ):
        assert main(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert error.count("\n") == 1
        assert words in error, error
