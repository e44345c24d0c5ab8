"""Lists the packages of the images in the versions of this environment: `python -m tests.docker.pins`.

Prints `docker/requirements.txt` (written by `make docker-pins`): all direct and indirect dependencies of pyproject.toml
in their installed versions. Triton and NVIDIA's packages are left out, because torch for CUDA requires the versions
that it was built with, and torch for CPUs needs none.
"""

import tomllib
from collections.abc import Iterable
from importlib.metadata import distribution
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests import ROOT

PINS = ROOT / "docker" / "requirements.txt"
HEADER = "# Written by `make docker-pins` from the tested environment: change pyproject.toml, not this file."


def dependencies() -> tuple[Requirement, ...]:
    """Returns the requirements in pyproject.toml without extras."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return tuple(map(Requirement, project["dependencies"]))


def is_left_out(name: str) -> bool:
    """Returns whether torch itself pins the version of this package."""
    return name == "triton" or name.startswith(("nvidia-", "cuda-"))


def installed(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Returns the versions of these packages and all their dependencies, without local parts such as `+cpu`."""
    found: dict[str, str] = {}
    waiting = [(requirement, "") for requirement in requirements]
    seen: set[Any] = set()
    while waiting:
        requirement, extra = waiting.pop()
        name = canonicalize_name(requirement.name)
        wanted = requirement.marker is None or requirement.marker.evaluate({"extra": extra})
        if is_left_out(name) or not wanted:
            continue
        package = distribution(name)
        found[name] = Version(package.version).public
        for inner in {"", *requirement.extras} - {known for other, known in seen if other == name}:
            seen.add((name, inner))
            waiting += [(Requirement(text), inner) for text in package.requires or ()]
    return found


def pins_text() -> str:
    lines = [f"{name}=={version}" for name, version in sorted(installed(dependencies()).items())]
    return "\n".join([HEADER, *lines, ""])


if __name__ == "__main__":
    print(pins_text(), end="")
