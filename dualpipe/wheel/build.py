"""Builds the wheel of the schedules: `python -m dualpipe.wheel.build [FOLDER]`.

The package has another import name than this folder, since `dualpipe` is taken on the package index and by DeepSeek's
code. It holds this package and the modules of `base` that it imports, with imports rewritten.
"""

import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from pathlib import Path

NAME = "dualpipe-schedules"
PACKAGE = NAME.replace("-", "_")
_ROOT = Path(__file__).parents[2]
_WHEEL = Path(__file__).parent
_IMPORT = re.compile(r"^(\s*(?:from|import) )(base|dualpipe)(?=[. ])", re.MULTILINE)
_SETTINGS = """\
[build-system]
requires = ["setuptools>=68"]
build-backend = "setuptools.build_meta"

[project]
name = "{name}"
version = "{version}"
description = "Pipeline schedules such as DualPipe: built, proven, timed, drawn, and run over torch's pipeline stages"
readme = "README.md"
requires-python = "{python}"
license = {{ text = "{license}" }}

[project.optional-dependencies]
torch = ["torch>=2.12,<2.14"]

[project.scripts]
{name} = "{package}.__main__:main"

[tool.setuptools]
packages.find.include = ["{package}*"]
package-data.{package} = ["**/*.css", "**/*.html", "**/*.js", "**/*.json"]
"""


def build_wheel(folder: Path) -> Path:
    """Writes the wheel into a folder, and returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="wheel-") as name:
        stage = Path(name)
        _write_sources(stage)
        command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
        subprocess.run([*command, "--wheel-dir", str(folder.absolute()), str(stage)], check=True)
    return max(folder.glob(f"{PACKAGE}-*.whl"), key=lambda path: path.stat().st_mtime)


def _write_sources(stage: Path) -> None:
    """Writes the package with rewritten imports, and its settings."""
    package = stage / PACKAGE
    ignored = shutil.ignore_patterns("__pycache__", "wheel")
    shutil.copytree(_ROOT / "dualpipe", package, ignore=ignored)
    used = {
        match for path in package.rglob("*.py") for match in re.findall(r"from base\.(\w+)", path.read_text("utf-8"))
    }
    (package / "base").mkdir()
    (package / "base" / "__init__.py").write_text('"""Choices by name, ranges, tables and files."""\n', "utf-8")
    for module in used:
        shutil.copy(_ROOT / "base" / f"{module}.py", package / "base")
    for path in package.rglob("*.py"):
        path.write_text(_rewritten(path.read_text("utf-8")), "utf-8")
    shutil.copy(_WHEEL / "README.md", stage)
    shutil.copy(_ROOT / "LICENSE", stage)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    settings = {
        "version": project["version"],
        "python": project["requires-python"],
        "license": project["license"]["text"],
    }
    (stage / "pyproject.toml").write_text(_SETTINGS.format(name=NAME, package=PACKAGE, **settings), "utf-8")


def _rewritten(source: str) -> str:
    """Returns a source under the package's name. `comm` is shared with Jupyter in this checkout only."""
    source = "".join(line for line in source.splitlines(keepends=True) if "share_comm" not in line)
    source = _IMPORT.sub(lambda match: match[1] + (f"{PACKAGE}.base" if match[2] == "base" else PACKAGE), source)
    return source.replace('"dualpipe.', f'"{PACKAGE}.')


def main(arguments: Sequence[str]) -> int:
    """Builds the wheel into the first argument, by default `dist`."""
    print(build_wheel(Path(arguments[0] if arguments else "dist")))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
