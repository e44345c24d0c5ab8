"""Installing: what Makefile and pyproject.toml install, the lock file, and sizes and names on docs/install.md."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docs.pages import PAGES
from tests.install_sizes import EXTRAS, PROJECT, ROOT, locked, table

TOML = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRA = re.compile(r"pip install (?:-e )?'?\.\[([\w-]+)\]")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def requirements() -> Iterator[tuple[str, Requirement]]:
    """Yields the requirements of pyproject.toml, each with its extra."""
    for extra, lines in {"": TOML["dependencies"], **TOML["optional-dependencies"]}.items():
        yield from ((extra, Requirement(line)) for line in lines)


def make(folder: Path, *arguments: str) -> str:
    """Returns the commands that `make` would run in a fresh checkout."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    command = ["make", "-n", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.slow
def test_make_of_a_run_installs_no_extra_and_of_tests_the_one_they_need(tmp_path: Path) -> None:
    printed = make(tmp_path, "train", "post", "life")
    assert "-e .\n" in printed
    assert not EXTRA.search(printed)
    for target in ("test", "test-fast", "test-long", "bench", "docker-pins"):
        printed = make(tmp_path, target)
        assert 0 < printed.index("-e .\n") < printed.index("-e '.[dev]'"), target


def test_make_takes_torch_for_cpus_without_a_driver_and_from_a_given_index(tmp_path: Path) -> None:
    driver = tmp_path / "python"
    for code, is_cpu in ((1, True), (0, False)):
        driver.write_text(f"#!/bin/sh\nexit {code}\n")
        driver.chmod(0o755)
        assert (f'--index-url "{CPU_INDEX}"' in make(tmp_path, "train", f"PYTHON={driver}")) == is_cpu
    assert f'test -z "{CPU_INDEX}"' not in make(tmp_path, "train", "TORCH_INDEX=")
    assert '--index-url "https://index"' in make(tmp_path, "train", "TORCH_INDEX=https://index")


def command_of(path: Path, version: tuple[int, ...], missing: str) -> None:
    """Writes a stand-in of Python at a path, with another version and without a module."""
    set_up = f"import sys; sys.version_info = {version!r}; sys.modules[{missing!r}] = None"
    path.write_text(
        f'#!/bin/sh\nshift $(($# - 2))\nexec {sys.executable} -c "{set_up}; exec(sys.argv[2])" "$@"\n', "utf-8"
    )
    path.chmod(0o755)


@pytest.mark.parametrize(
    ("version", "missing", "line"),
    [
        ((3, 14, 0), "none", "error: PYTHON: must be Python 3.11 to 3.13, {} is 3.14; nearest valid: make PYTHON="
         "python3.12 post"),
        ((3, 8, 18), "none", "error: PYTHON: must be Python 3.11 to 3.13, {} is 3.8; nearest valid: make PYTHON="
         "python3.12 post"),
        ((3, 12, 1), "ensurepip", "error: PYTHON: must have venv and ensurepip, {} has not; nearest valid: sudo apt "
         "install python3.12-venv"),
    ],
    ids=["newer", "older", "debian"],
)  # fmt: skip
def test_make_says_in_one_line_that_python_makes_no_environment(
    version: tuple[int, ...], missing: str, line: str, tmp_path: Path
) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    python = tmp_path / "python3.12"
    command_of(python, version, missing)
    command = ["make", "post", f"PYTHON={python}", "TORCH_INDEX="]
    # Another make may have started this test, and would add its level to what is printed.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    said, of_make = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert said == line.format(python)
    assert of_make.startswith("make: *** ")
    assert not (tmp_path / ".venv").exists()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Creates a folder with what a command reads before it needs an environment."""
    for name in ("launch", "comm", "base"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


MAKE = "make .venv/installed && source .venv/bin/activate"


def test_command_says_in_one_line_that_a_package_is_missing(checkout: Path) -> None:
    def lines(*python: str) -> list[str]:
        command = [*python, "-m", "launch.train"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60, env={})
        assert (done.returncode, done.stdout) == (2, "")
        return done.stderr.splitlines()

    (said,) = lines(sys.executable, "-S")
    missing = re.fullmatch(rf"error: (\w+): must be installed, {sys.executable} does not have it; (.*)", said)
    assert missing is not None, said
    assert missing[1] in {"hydra", "yaml", "omegaconf", "numpy"}
    assert missing[2] == f"nearest valid: {MAKE}"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", ".venv"], cwd=checkout, timeout=60, check=True)
    (checkout / ".venv" / "installed").touch()
    assert lines(sys.executable, "-S") == [said.replace(MAKE, "source .venv/bin/activate")]
    (inside,) = lines(str(checkout / ".venv" / "bin" / "python"))
    assert inside.endswith(f"nearest valid: rm -f .venv/installed && {MAKE}")


def test_missing_modules_of_the_project_and_other_errors_keep_their_traceback(checkout: Path) -> None:
    for code in ("import comm.missing", "1 / 0"):
        (checkout / "launch" / "broken.py").write_text(f"{code}\n", "utf-8")
        command = [sys.executable, "-m", "launch.broken"]
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback"), done.stderr


@pytest.mark.parametrize("version", [(3, 8, 18), (3, 10, 0), (3, 14, 0)], ids=str)
def test_command_says_in_one_line_that_python_is_outside_the_range(version: tuple[int, ...], checkout: Path) -> None:
    """The version is replaced before the package is imported, as a Python without its own packages would have it."""
    code = f"import sys; sys.version_info = {version!r}; sys.argv = ['-m']; import launch"
    done = subprocess.run([sys.executable, "-S", "-c", code], cwd=checkout, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (2, "")
    name = f"{version[0]}.{version[1]}"
    assert done.stderr == f"error: Python: must be 3.11 to 3.13, is {name}; nearest valid: {MAKE}\n"


def test_package_of_commands_reads_as_python_3_8_up_to_its_check_of_the_version() -> None:
    source = (ROOT / "launch" / "__init__.py").read_text("utf-8")
    ast.parse(source, feature_version=(3, 8))
    before, check, _ = source.partition("if _IS_COMMAND and not (3, 11) <= sys.version_info[:2] <= (3, 13):")
    assert check
    imported = [node for node in ast.walk(ast.parse(before)) if isinstance(node, ast.Import | ast.ImportFrom)]
    names = {name.name if isinstance(node, ast.Import) else node.module for node in imported for name in node.names}
    assert names <= {"os", "signal", "sys", "threading", "time", "collections.abc", "contextlib", "types", "typing"}
    assert " | " not in before
    assert not re.search(r"\b(list|dict|tuple|type)\[", before)


def test_torch_of_the_makefile_is_that_of_pyproject() -> None:
    command = re.search(r"\$\$\((grep .*?)\)", (ROOT / "Makefile").read_text("utf-8"))
    assert command is not None
    printed = subprocess.run(["bash", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in TOML["dependencies"]


def test_make_says_the_size_of_its_download_and_shows_its_progress(tmp_path: Path) -> None:
    """As on the page of the installation, which test_sizes_on_the_page_are_those_of_the_lock checks."""
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    cpu, cuda = (
        float(size.replace(",", "")) for size in re.findall(r"^\| running .*? \| ([\d,.]+) \|", page, re.MULTILINE)
    )
    unpacked = re.search(r"an environment for CPUs has ([\d.]+) GB", page)
    assert unpacked is not None
    for index, words in (
        (CPU_INDEX, f'echo "downloads {cpu:.0f} MB ({float(unpacked[1]):.1f} GB on disk) into .venv"'),
        ("", f'echo "downloads {cuda / 1000:.1f} GB with CUDA into .venv"'),
    ):
        printed = make(tmp_path, "train", f"TORCH_INDEX={index}")
        assert words in printed
        assert 0 < printed.index(words) < printed.index("-e .\n")
        assert "quiet" not in printed


def test_every_extra_is_named_as_its_package_provides_it() -> None:
    for extra, requirement in requirements():
        for name in requirement.extras:
            assert name == canonicalize_name(name), f"{extra}: {requirement}"


def test_extras_that_pages_and_messages_name_exist() -> None:
    sources = [
        path
        for folder in ("infer", "score", "evaluation", "data", "train", "launch", "conf")
        for path in (ROOT / folder).rglob("*.*")
    ]
    texts = [path.read_text("utf-8") for path in (*PAGES, *sources) if path.suffix in (".md", ".py", ".yaml")]
    named = {name for text in texts for name in EXTRA.findall(text)}
    assert {"score", "reasoning", "lm-eval"} <= named <= set(TOML["optional-dependencies"])
    assert set(EXTRAS) == set(TOML["optional-dependencies"])


def test_lock_names_the_package_index_alone_and_has_every_requirement() -> None:
    text = (ROOT / "uv.lock").read_text("utf-8")
    assert set(re.findall(r"\w+://([^/\"]+)", text)) == {"pypi.org", "files.pythonhosted.org"}
    assert not re.search(r'"/|file:|"\.\./', text)
    versions: dict[str, list[str]] = {}
    for package in locked():
        versions.setdefault(package["name"], []).append(package["version"])
    for _, requirement in requirements():
        found = versions[canonicalize_name(requirement.name)]
        assert any(requirement.specifier.contains(version) for version in found), requirement
    (project,) = [package for package in locked() if package["name"] == PROJECT]
    recorded = {(entry["name"], entry.get("specifier", "")) for entry in project["metadata"]["requires-dist"]}
    assert {name for name, _ in recorded} == {canonicalize_name(found.name) for _, found in requirements()}


@pytest.mark.slow
def test_sizes_on_the_page_are_those_of_the_lock() -> None:
    page = (ROOT / "docs" / "install.md").read_text("utf-8")
    rows = re.findall(r"\| ([\d,.]+) \| (\d+) \|", page)
    sizes = [(float(size.replace(",", "")), int(number)) for size, number in rows]
    assert sizes == [(pytest.approx(size, abs=0.06), number) for size, number in table().values()]
