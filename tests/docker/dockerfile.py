"""Reads Dockerfiles and checks this project's rules for them; hadolint checks the others."""

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction with its continued lines joined: `RUN`, `apt-get update && ...`."""

    name: str
    value: str


def instructions(text: str) -> tuple[Instruction, ...]:
    """Returns all instructions in order."""
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
