"""Runs the code blocks of each page of the documentation in order, in an empty folder."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from itertools import zip_longest
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.covering import exhaustive
from tests.docs.pages import PAGES, ROOT, Block, blocks, make_stand_ins, runners_of

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
    r"name=longer|quickstart schedule=|task\.steps=240|quickstart_yarn|"
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
    run_page(page, tmp_path, trained, is_whole=is_whole)


def run_page(page: Path, folder: Path, trained: Path, *, is_whole: bool = False) -> None:
    """Runs the blocks of a page in a folder. `trained` holds the results of trainings by command."""
    shell = make_shell()
    program = ""
    make_stand_ins(folder)
    to_run = [
        block
        for block in blocks(page)
        if block.language in PROGRAMS
        and block.mode != "not composed"
        and (block.mode != "not run" or block.language == "bash")
    ]
    for block, following in zip_longest(to_run, to_run[1:]):
        match block.language:
            case "bash" if block.mode == "not run":
                for command in block.commands():
                    if is_whole or not LEFT_OUT.search(command):
                        compose(block, command, folder, shell)
            case "bash" if block.mode == "shortened":
                for command in block.commands():
                    if is_whole or not (REPEATED.search(command) or LEFT_OUT.search(command)):
                        run_shortened(block, command, folder, shell, trained)
                    elif not LEFT_OUT.search(command):
                        run(block, _checked(command), folder, shell)
            case "bash":
                for command in block.commands():
                    if is_whole or not LEFT_OUT.search(command):
                        run(block, _checked(command) if block.mode == "checked" else command, folder, shell)
            case "console":
                for command, expected in sessions(block):
                    if is_whole or not LEFT_OUT.search(command):
                        compare(block, run(block, command, folder, shell, codes=(0, 2)), expected)
            case "python":
                program += with_times(block.text, folder) + "\n"
                # Blocks that follow each other run once, as one program.
                if following is None or following.language != "python":
                    (folder / "program.py").write_text(program, "utf-8")
                    run(block, "python program.py", folder, shell)


def test_readme_pasted_top_to_bottom_works_where_nothing_is_set_up(tmp_path: Path) -> None:
    """The folder holds what a clone would, and the shell has only folders of the system on its path.

    The environment is new, with its packages linked from that of the tests; installing has its own tests. Trainings do
    two steps.
    """
    checkout = tmp_path / "checkout"
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, tracked.split("\0")):
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", checkout / ".venv"], check=True, timeout=120)
    (packages,) = (checkout / ".venv" / "lib").glob("python*/site-packages")
    link = f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n"
    (packages / "linked.pth").write_text(link, "utf-8")
    (checkout / ".venv" / "installed").touch()
    commands = [
        command
        for block in blocks(ROOT / "README.md")
        if block.language == "bash" and block.mode in ("run", "shortened")
        for command in block.commands()
    ]
    lines = [
        _with_override(line, "ARGS=task.steps=2")
        if line.startswith("make train")
        else _with_override(line, "task.steps=2")
        if TRAINS.search(line)
        else line
        for line in commands
    ]
    assert len(lines) > 3
    assert not any(TIME.search(line) for line in lines)
    shell = ["bash", "--noprofile", "--norc", "-e", "-x", "-c", "\n".join(lines)]
    environment = {"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(shell, cwd=checkout, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (checkout / "outputs" / "notes" / "report.html").exists()
    validated = (checkout / "outputs" / "notes" / "metrics.jsonl").read_text("utf-8")
    assert "validation_loss" in validated, "the example of one's own text trains without validation"


def make_shell() -> dict[str, str]:
    """Returns an environment in which `python` is this one, and the packages of the checkout are found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(block: Block, command: str, folder: Path, shell: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    """Runs one command and returns what it prints, in a fork if it needs no shell and builds no ranks for a plan.

    A `make` target is only looked up, by tests/docs/test_pages.py, and an environment is not activated again.
    """
    if command.startswith(("make ", "source ")):
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


def compose(block: Block, command: str, folder: Path, shell: dict[str, str]) -> None:
    """Composes and checks a command of a block that is not run, if it is one of this project, with any launcher."""
    _, is_launch, rest = command.partition("-m launch.")
    if is_launch:
        run(block, _with_override(f"python -m launch.{rest}", "config_only=true"), folder, shell)


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
