"""Decodes the parts of a workflow, and returns the commands that they run. Imports no torch."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from launch.config.compose import compose
from train.config.decode import decode, encode


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowPart:
    """A part of a workflow: one command.

    Attributes:
        name: of the part; its files in the workflow's folder have this name.
        command: name of the command.
        overrides: of the command.
        evaluate: whether the weights in the folder of this name are evaluated after the part.
    """

    name: str
    command: Literal["convert", "generate", "redraw", "sample", "score_teacher", "train"]
    overrides: tuple[str, ...]
    evaluate: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowEvaluation:
    """Problems that parts are compared by: a name, and overrides of `launch.sample`."""

    name: str
    overrides: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Workflow:
    """The parts of a workflow in order, and the evaluations that follow those with `evaluate`."""

    name: str
    evaluations: tuple[WorkflowEvaluation, ...]
    parts: tuple[WorkflowPart, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowCommandConfig:
    """Configuration of the command; see `conf/workflow.yaml`."""

    workflow: Workflow
    out_dir: str
    train: tuple[str, ...]
    sample: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class WorkflowCommand:
    """A command that a workflow runs.

    Attributes:
        name: of the command line, unique within the workflow.
        part: name of the part.
        evaluation: name of the evaluation of that part; None: the part itself.
        arguments: after `python -m`.
    """

    name: str
    part: str
    evaluation: str | None
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        """Returns the line for a shell."""
        return f"python -m {shlex.join(self.arguments)}"


def read_workflow(overrides: Sequence[str]) -> WorkflowCommandConfig:
    """Composes and decodes the configuration of the command."""
    values = compose("workflow", overrides)
    return decode(WorkflowCommandConfig, {**values, "workflow": _listed(values["workflow"])})


def _listed(workflow: Any) -> Any:
    """Returns the values of a workflow with lists of its decoded parts and evaluations."""
    if not isinstance(workflow, Mapping):
        return workflow
    found = dict(workflow)
    if isinstance(found.get("parts"), Mapping):
        found["parts"] = [
            decode(
                WorkflowPart, {"name": name, **part} if isinstance(part, Mapping) else part, f"workflow.parts.{name}"
            )
            for name, part in found["parts"].items()
        ]
    if isinstance(found.get("evaluations"), Mapping):
        found["evaluations"] = [
            decode(WorkflowEvaluation, {"name": name, "overrides": given}, f"workflow.evaluations.{name}")
            for name, given in found["evaluations"].items()
        ]
    return found


def plain_values(config: WorkflowCommandConfig) -> dict[str, Any]:
    """Returns the values of the command as its YAML files have them: what `read_workflow` composes."""
    values = encode(config)
    workflow = values["workflow"]
    parts = {part["name"]: {key: part[key] for key in part if key != "name"} for part in workflow["parts"]}
    evaluations = {each["name"]: each["overrides"] for each in workflow["evaluations"]}
    return {**values, "workflow": {**workflow, "evaluations": evaluations, "parts": parts}}


def workflow_commands(config: WorkflowCommandConfig) -> list[WorkflowCommand]:
    """Returns the commands of all parts and evaluations, in order."""
    found = []
    further = {"train": config.train, "sample": config.sample}
    for part in config.workflow.parts:
        arguments = (f"launch.{part.command}", *part.overrides, *further.get(part.command, ()))
        found.append(WorkflowCommand(name=part.name, part=part.name, evaluation=None, arguments=arguments))
        for each in config.workflow.evaluations if part.evaluate else ():
            given = (f"ckpt={config.out_dir}/{part.name}", f"out={evaluation_file(config, part.name, each.name)}")
            found.append(
                WorkflowCommand(
                    name=f"{part.name}/{each.name}",
                    part=part.name,
                    evaluation=each.name,
                    arguments=("launch.sample", *given, *each.overrides, *config.sample),
                )
            )
    return found


def evaluation_file(config: WorkflowCommandConfig, part: str, evaluation: str) -> str:
    """Returns the file of the right answers of an evaluation; all answers are in its journal."""
    return f"{config.out_dir}/evaluations/{part}_{evaluation}.jsonl"
