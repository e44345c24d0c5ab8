"""Runs the code blocks of each page of the documentation in order, in an empty folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.covering import exhaustive
from tests.docs.pages import PAGES, ROOT, Block, blocks, runners_of

pytestmark = pytest.mark.long
PROGRAMS = ("bash", "console", "python")
RUNNABLE = [
    page for page in PAGES if not runners_of(page) and any(block.language in PROGRAMS for block in blocks(page))
]
TRAINS = re.compile(r"-m launch\.(train|submit)\b")
STARTS_NOTHING = re.compile(r"--help|config_only|dry_run")
DEPENDS = re.compile(r"(resume|init_from|paths|teacher|path|plugins|manifest|folder)=|TIME")
"""What a command has that reads files of the page's folder."""
REPEATED = re.compile(
    r"'data\.paths=\[notes\.txt\]' data\.validation|name=longer|quickstart schedule=|task\.steps=240|quickstart_yarn|"
    r"evaluation\.every_steps|init_from=outputs/quickstart/TIME model=of_checkpoint|task=dpo|task\.answers=student"
)
"""Trainings of which another page runs a like one: `make test-long` only composes and checks them."""
LEFT_OUT = re.compile(
    # What reads the results of those, and searches that tests/launch and tests/dualpipe run.
    r"outputs/(scores|reward|second)|search=true|what_if|advice=true|schedule=auto"
)
"""Commands that only `make test-exhaustive` runs."""
SHELL = re.compile(r"[|&;<>$~*`]")
"""What only a shell understands, or might, if it is not quoted."""
TIME = re.compile(r"outputs/(\w+)/TIME")
"""A run's folder as pages write it; the reader inserts the time."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds what trainings that read no files have written, by command, for pages with the same one."""
    return tmp_path_factory.mktemp("trained")


@pytest.mark.parametrize("is_whole", [False, *exhaustive(True)], ids=["", "whole"])
@pytest.mark.parametrize("page", RUNNABLE, ids=[page.relative_to(ROOT).as_posix() for page in RUNNABLE])
def test_page_blocks_run_as_printed(page: Path, is_whole: bool, trained: Path, tmp_path: Path) -> None:
    shell = make_shell()
    program = ""
    to_run = [block for block in blocks(page) if block.mode != "not run" and block.language in PROGRAMS]
    for block, following in zip_longest(to_run, to_run[1:]):
        match block.language:
            case "bash" if block.mode == "shortened":
                for command in block.commands():
                    if is_whole or not (REPEATED.search(command) or LEFT_OUT.search(command)):
                        run_shortened(block, command, tmp_path, shell, trained)
                    elif not LEFT_OUT.search(command):
                        run(block, _checked(command), tmp_path, shell)
            case "bash":
                for command in block.commands():
                    if is_whole or not LEFT_OUT.search(command):
                        run(block, _checked(command) if block.mode == "checked" else command, tmp_path, shell)
            case "console":
                for command, expected in sessions(block):
                    if is_whole or not LEFT_OUT.search(command):
                        compare(block, run(block, command, tmp_path, shell, codes=(0, 2)), expected)
            case "python":
                program += with_times(block.text, tmp_path) + "\n"
                # Blocks that follow each other run once, as one program.
                if following is None or following.language != "python":
                    (tmp_path / "program.py").write_text(program, "utf-8")
                    run(block, "python program.py", tmp_path, shell)


def make_shell() -> dict[str, str]:
    """Returns an environment in which `python` is this one, and the packages of the checkout are found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(block: Block, command: str, folder: Path, shell: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    """Runs one command and returns what it prints, in a fork if it needs no shell and builds no ranks for a plan.

    A `make` target is only looked up, by tests/docs/test_pages.py.
    """
    if command.startswith("make "):
        return ""
    line = with_times(command, folder)
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"] and not SHELL.search(line) and "dry_run=true" not in words:
        done = run_command(words, cwd=folder, env=shell, timeout=600)
    else:
        done = subprocess.run(["bash", "-c", line], cwd=folder, env=shell, capture_output=True, text=True, timeout=600)
    shown = done.stdout + done.stderr
    assert done.returncode in codes, f"{block}: {line}\nexit code {done.returncode}\n{shown[-3000:]}"
    return shown


def run_shortened(block: Block, command: str, folder: Path, shell: dict[str, str], trained: Path) -> None:
    """Runs a command; a training does two steps, or two more if it resumes. Equal ones that read no files run once.

    A training under torchrun has two ranks, because the imports of each take seconds.
    """
    if command.startswith("make train"):
        command = "python -m launch.train experiment=quickstart"
    if "--nproc-per-node 8" in command:
        command = _with_override(command.replace("-node 8", "-node 2"), "parallelism=two_ranks")
    if not TRAINS.search(command) or STARTS_NOTHING.search(command):
        run(block, command, folder, shell)
        return
    if DEPENDS.search(command):
        run(block, _with_override(command, f"task.steps={4 if 'resume=' in command else 2}"), folder, shell)
        return
    first = trained / re.sub(r"\W+", "_", command)
    if not first.exists():
        first.mkdir()
        run(block, _with_override(command, "task.steps=2"), first, shell)
    shutil.copytree(first, folder, dirs_exist_ok=True)


def with_times(text: str, folder: Path) -> str:
    """Returns a text with the newest run in place of each `outputs/NAME/TIME`."""

    def newest(match: re.Match[str]) -> str:
        runs = sorted((folder / "outputs" / match[1]).iterdir())
        return runs[-1].relative_to(folder).as_posix()

    return TIME.sub(newest, text)


def sessions(block: Block) -> list[tuple[str, str]]:
    """Returns the `$` commands of a console block, each with the lines below it."""
    parts = re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]
    return [
        (command.split("   #")[0].strip(), expected)
        for command, _, expected in (part.partition("\n") for part in parts)
    ]


def compare(block: Block, shown: str, expected: str) -> None:
    """Requires the expected lines in order, without a gap except at `...`."""
    position = 0
    for part in re.split(r"^ ?\.\.\.\n", expected, flags=re.MULTILINE):
        place = shown.find(part.rstrip("\n"), position)
        assert place >= 0, f"{block}: is not printed:\n{part}\nbut\n{shown[-4000:]}"
        position = place + len(part.rstrip("\n"))


def _checked(command: str) -> str:
    """Adds `config_only=true` to a command that trains: it is composed and checked, and starts nothing."""
    if not TRAINS.search(command) or STARTS_NOTHING.search(command):
        return command
    return _with_override(command, "config_only=true")


def _with_override(command: str, override: str) -> str:
    words, hash_sign, comment = command.partition("   #")
    return f"{words} {override}{hash_sign}{comment}"
