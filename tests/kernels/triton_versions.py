"""Compiles the kernels under the oldest and the newest supported Triton: `python -m tests.kernels.triton_versions`.

An environment is a folder with one Triton, put before the installed one on the path; torch and all else are those of
the running interpreter, whose own Triton needs no folder. Folders are made by pip on the first run and used again
later. `make triton-table` checks the recorded tables, with `ARGS=--all` those of every supported version, and
`ARGS=--write` records all.
"""

import argparse
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path

from tests import ROOT

ENVIRONMENTS = ROOT / ".cache" / "triton"
VERSIONS = {
    "3.6.0": "pinned by torch 2.10, the oldest supported one, and by torch 2.11",
    "3.7.0": "pinned by torch 2.12.0",
    "3.7.1": "pinned by torch 2.12.1, and by torch 2.13, the newest supported one",
    "3.8.0": "pinned by no supported torch",
    "3.9.0": "the newest Triton, which torch for CPUs takes",
}
"""Every Triton version that pyproject.toml allows, oldest first, and the torch version that uses it."""


def environment(version: str, folder: Path = ENVIRONMENTS) -> Path | None:
    """Returns the folder with a Triton version, which is downloaded if it is missing; None for the installed one."""
    if version == metadata.version("triton"):
        return None
    target = folder / version
    if not target.exists():
        partial = folder / f"{version}.partial.{os.getpid()}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        try:
            subprocess.run([*command, "--target", str(partial), f"triton=={version}"], check=True)
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return target


def compile_under(folder: Path | None, arguments: list[str]) -> int:
    """Runs `tests.kernels.compiled_table` under the Triton in a folder and returns its exit code."""
    path = os.pathsep.join(str(part) for part in (folder, os.environ.get("PYTHONPATH")) if part)
    command = [sys.executable, "-m", "tests.kernels.compiled_table", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}).returncode


def main() -> int:
    """Compiles under the chosen versions; the exit code is 1 if any table is not as recorded or breaks a rule."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernels.triton_versions", description=__doc__)
    parser.add_argument("--write", action="store_true", help="record the tables in place of checking them")
    parser.add_argument("--all", action="store_true", help="every supported version; --write does so too")
    parser.add_argument("--versions", nargs="+", choices=VERSIONS, default=[], metavar="VERSION")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="that compile at a time")
    arguments = parser.parse_args()
    given = ["--write" if arguments.write else "--check", "--processes", str(arguments.processes)]
    ends = [next(iter(VERSIONS)), next(reversed(VERSIONS))]
    versions = arguments.versions or (list(VERSIONS) if arguments.all or arguments.write else ends)
    # The installed version compiles while others are downloaded.
    versions.sort(key=lambda version: version != metadata.version("triton"))
    with ThreadPoolExecutor(1) as pool:
        folders = [pool.submit(environment, version) for version in versions]
        return max(compile_under(folder.result(), given) for folder in folders)


if __name__ == "__main__":
    sys.exit(main())
