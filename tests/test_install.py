"""Installing: what Makefile and pyproject.toml install, the lock file, and sizes and names on docs/install.md."""

import re
import shutil
import subprocess
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


def test_torch_of_the_makefile_is_that_of_pyproject() -> None:
    command = re.search(r"\$\$\((grep .*?)\)", (ROOT / "Makefile").read_text("utf-8"))
    assert command is not None
    printed = subprocess.run(["bash", "-c", command[1]], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert printed.strip() in TOML["dependencies"]


def test_every_extra_is_named_as_its_package_provides_it() -> None:
    for extra, requirement in requirements():
        for name in requirement.extras:
            assert name == canonicalize_name(name), f"{extra}: {requirement}"


def test_extras_that_pages_and_messages_name_exist() -> None:
    sources = [path for folder in ("infer", "data", "train", "launch", "conf") for path in (ROOT / folder).rglob("*.*")]
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
