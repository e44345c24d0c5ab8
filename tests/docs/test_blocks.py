"""Runs the code blocks of the documentation, in a folder with a small trained run and the files that pages name."""

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch.convert import main as convert
from tests.docs.pages import PAGES, ROOT, Block, blocks, runners_of
from tests.launch.checkpoints import write_run

pytestmark = pytest.mark.long
PROGRAMS = ("bash", "console", "python")
RUNNABLE = [
    page for page in PAGES if not runners_of(page) and any(block.language in PROGRAMS for block in blocks(page))
]
# Python of this page is run twice by a real kernel (tests/launch/test_notebook.py), with its commands.
TRAINS = re.compile(r"python -m launch\.(train|submit)\b")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that pages name: a run, its export, text and prompts."""
    folder = tmp_path_factory.mktemp("files")
    write_run(folder / "outputs/quickstart/TIME")
    with contextlib.redirect_stdout(io.StringIO()):
        convert(["from=checkpoint", f"path={folder / 'outputs/quickstart/TIME'}", f"to={folder / 'quickstart_hf'}"])
    (folder / "prompts.jsonl").write_text('{"prompt": "def f(x):"}\n{"prompt": "import os"}\n', "utf-8")
    for name in ("corpus", "src"):
        (folder / name).mkdir()
        (folder / name / "a.txt").write_text("A line of text for a corpus.\n" * 200, "utf-8")
    pair = '{"prompt": "Sort 312.", "chosen": "123", "rejected": "132"}\n'
    (folder / "pairs.jsonl").write_text(pair * 50, "utf-8")
    (folder / "notes.txt").write_text("Some notes of a reader.\n" * 200, "utf-8")
    (folder / "chats.jsonl").write_text('{"prompt": "Sort 312.", "answer": "123"}\n' * 50, "utf-8")
    (folder / "corpus.jsonl").write_text('{"content": "a document"}\n' * 50, "utf-8")
    return folder


@pytest.mark.parametrize("page", RUNNABLE, ids=[page.relative_to(ROOT).as_posix() for page in RUNNABLE])
def test_page_blocks_run_as_printed(page: Path, files: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    shutil.copytree(files, folder)
    shell = make_shell()
    names: list[str] = []
    for block in blocks(page):
        if block.mode == "not run":
            continue
        match block.language:
            case "bash":
                for command in block.commands():
                    run(block, _checked(command) if block.mode == "checked" else command, folder, shell)
            case "console":
                for command, expected in sessions(block):
                    compare(block, run(block, command, folder, shell, codes=(0, 2)), expected)
            case "python":
                names.append(block.text)
                run(block, "python program.py", _with_program(folder, names), shell)


def make_shell() -> dict[str, str]:
    """Returns an environment in which `python` is this one, and the packages of the checkout are found."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def run(block: Block, command: str, folder: Path, shell: dict[str, str], codes: tuple[int, ...] = (0,)) -> str:
    """Runs one command and returns what it prints. A `make` target is only looked up, by tests/docs/test_pages.py."""
    if command.startswith("make "):
        return ""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=shell, capture_output=True, text=True, timeout=300, check=False
    )
    shown = done.stdout + done.stderr
    assert done.returncode in codes, f"{block}: {command}\nexit code {done.returncode}\n{shown[-3000:]}"
    return shown


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
    if not TRAINS.search(command) or "--help" in command or "config_only" in command:
        return command
    words, hash_sign, comment = command.partition("   #")
    return f"{words} config_only=true{hash_sign}{comment}"


def _with_program(folder: Path, blocks_before: list[str]) -> Path:
    (folder / "program.py").write_text("\n".join(blocks_before), "utf-8")
    return folder
