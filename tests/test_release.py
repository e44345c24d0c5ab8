"""What the hosted repository and a release need: workflows, forms, and one version everywhere."""

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests import ROOT

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))


def _read(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(path.read_text("utf-8"))
    return values


def _commands(workflow: Path) -> list[list[str]]:
    """Returns the words of each line that a workflow runs, once for each value of its matrix."""
    lines = []
    for job in _read(workflow)["jobs"].values():
        runs = [line for step in job["steps"] for line in step.get("run", "").splitlines()]
        targets = job.get("strategy", {}).get("matrix", {}).get("target", [""])
        lines += [line.replace("${{ matrix.target }}", target) for line in runs for target in targets]
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_runs_targets_and_files_that_exist_with_pinned_actions(workflow: Path) -> None:
    commands = _commands(workflow)
    assert commands
    for program, *rest in commands:
        if program == "make":
            assert set(rest) <= TARGETS, f"make {rest}: has no such target"
        else:
            assert (ROOT / program).is_file(), f"{program}: no such file"
    used = [step["uses"] for job in _read(workflow)["jobs"].values() for step in job["steps"] if "uses" in step]
    assert not [action for action in used if not re.fullmatch(r"[\w-]+/[\w-]+@(v\d+|[0-9a-f]{40})", action)]


def test_workflows_run_what_ci_runs() -> None:
    of_ci = set(re.findall(r"^make ([a-z-]+)$", (ROOT / ".ci" / "run").read_text("utf-8"), re.MULTILINE))
    of_workflows = {command[1] for workflow in WORKFLOWS for command in _commands(workflow) if command[0] == "make"}
    assert of_ci <= of_workflows


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_issue_form_has_the_fields_that_github_requires(form: Path) -> None:
    values = _read(form)
    assert {"name", "description", "body"} <= values.keys()
    asked = [field for field in values["body"] if field["type"] != "markdown"]
    assert {field["type"] for field in asked} <= {"textarea", "input", "dropdown", "checkboxes"}
    assert len({field["id"] for field in asked}) == len(asked) > 0
    assert all(field["attributes"]["label"] for field in asked)


def test_one_version_and_date_stand_in_every_file_of_the_release() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    citation = _read(ROOT / "CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    heading = re.search(r"^## (\S+) \((\S+)\)$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert heading is not None, "CHANGELOG.md: has no heading `## VERSION (DATE)`"
    assert heading[1] == project["version"] == citation["version"]
    assert heading[2] == str(citation["date-released"])
