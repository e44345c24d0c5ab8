"""Reads sets of benchmarks, and runs them with lm-evaluation-harness, an optional package.

A set is a YAML file with the lines of a table. Each line names the tasks of the package that stand for it, or the
reason why none does. A line that cannot run here is skipped with the reason before any weights are read.
Source: EleutherAI/lm-evaluation-harness 0.4.13, `lm_eval/tasks/manager.py` and `lm_eval/evaluator.py`.
"""

import importlib.util
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.request import urlopen

import yaml

from base.decode import decode, encode
from base.figures import aligned
from base.ranges import NonNegativeInt
from base.refusal import ConfigError, nearest
from evaluation.protocol import EvaluationError, Record

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from evaluation.harness import HarnessModel

SETS = Path(__file__).with_name("sets")
_ALLOWS_CODE = "HF_ALLOW_CODE_EVAL"  # variable of Hugging Face's metrics; without "1" they run no programs
_HUB_SECONDS = 10


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkLine:
    """A line of a table: tasks that stand for it, or the reason why none does.

    Attributes:
        line: its name, unique in the set.
        tasks: tasks or groups of the package. The value is the mean over them.
        metric: name and filter, as the package's results have them (`acc,none`).
        prompt: how the tasks ask, for the reader.
        published: the published value.
        percent: whether the metric is a share, which is written in percent.
        runs_code: whether the tasks run generated programs.
        changes: keys of the tasks' configurations with other values.
    """

    line: str
    tasks: tuple[str, ...] = ()
    shots: NonNegativeInt | None = None
    metric: str | None = None
    prompt: str = ""
    published: float | None = None
    percent: bool = True
    runs_code: bool = False
    changes: Mapping[str, Any] | None = None
    reason: str = ""

    def request(self, manager: "TaskManager") -> dict[str, Any]:
        """Returns a group of the tasks with the shots and changes, as the package reads it."""
        changed = {"num_fewshot": self.shots, **(self.changes or {})}
        groups = set(manager.all_groups)
        return {
            "group": f"set::{self.line}",
            "task": [{"group" if name in groups else "task": name, **changed} for name in self.tasks],
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkSet:
    """The lines of a table.

    Attributes:
        source: where the table is.
        chat_template: name of a chat template, or auto for that of the weights; None for plain text.
        include: folder of further tasks of the package, from the folder of the file.
    """

    source: str
    chat_template: str | None = None
    include: str | None = None
    lines: tuple[BenchmarkLine, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class BenchmarkRun:
    """How a set runs: the maximum number of questions of a task, or None, and whether programs may run."""

    benchmarks: BenchmarkSet
    limit: int | None
    allows_code: bool


def read_set(name: str) -> BenchmarkSet:
    """Returns a set by its name or the path of its file, and rejects one that breaks a rule."""
    files = {path.stem: path for path in sorted(SETS.glob("*.yaml"))}
    path = files.get(name) or Path(name).expanduser()
    if not path.is_file():
        rule = f"must be {', '.join(files)} or a YAML file"
        raise ConfigError(f"set: {rule}, is {name!r}; {nearest(name, files)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        problem = " ".join(str(error).split())
        raise ConfigError(f"set: must be YAML, {path} is not: {problem}; nearest valid: as {SETS}") from error
    benchmarks = decode(BenchmarkSet, values, "set")
    names = [line.line for line in benchmarks.lines]
    for number, line in enumerate(benchmarks.lines):
        place = f"set.lines[{number}]"
        if line.line in names[:number]:
            raise ConfigError.broken(f"{place}.line", "must be unique", repr(line.line), "another name")
        if bool(line.tasks) == bool(line.reason):
            raise ConfigError.broken(place, "must have either tasks or a reason", repr(line.line), "one of them")
        if line.tasks and (line.shots is None or line.metric is None):
            raise ConfigError.broken(place, "must have shots and metric with tasks", repr(line.line), "both")
    include = None if benchmarks.include is None else str(path.parent / benchmarks.include)
    if include is not None and not Path(include).is_dir():
        raise ConfigError.broken("set.include", f"must be a folder in {path.parent}", repr(benchmarks.include), "null")
    return replace(benchmarks, include=include)


def require_harness() -> None:
    """Raises `ConfigError` if lm-evaluation-harness is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError("lm_eval: must be installed, is not; run pip install '.[lm-eval]'")


def open_manager(benchmarks: BenchmarkSet) -> "TaskManager":
    """Returns the package's index of tasks, and rejects names that it does not have."""
    if "HF_HUB_OFFLINE" not in os.environ and not _reaches_hub():
        # The package's libraries retry for 20 seconds per data set, and read the variable once, when imported.
        os.environ["HF_HUB_OFFLINE"] = "1"
    manager = _open_manager(benchmarks.include)
    valid = {*manager.all_subtasks, *manager.all_groups}
    for number, line in enumerate(benchmarks.lines):
        for name in line.tasks:
            if name not in valid:
                tagged = sorted(manager.task_index[name].tags) if name in manager.all_tags else []
                advice = f"nearest valid: {', '.join(tagged)}" if tagged else nearest(name, valid)
                rule = "must be tasks or groups of lm-evaluation-harness"
                raise ConfigError(f"set.lines[{number}].tasks: {rule}, has {name!r}; {advice}")
    return manager


@cache  # it reads 15,000 files
def _open_manager(include: str | None) -> "TaskManager":
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include)


def _reaches_hub() -> bool:
    try:
        with urlopen(os.environ.get("HF_ENDPOINT", "https://huggingface.co"), timeout=_HUB_SECONDS):
            return True
    except HTTPError:
        return True  # it answers
    except OSError:
        return False


def skipped_lines(run: BenchmarkRun, manager: "TaskManager") -> dict[str, str]:
    """Returns the reasons of the lines that cannot run. It reads or downloads the data of all others."""
    reasons = {line.line: _reason(line, run, manager) for line in run.benchmarks.lines}
    return {name: reason for name, reason in reasons.items() if reason}


def _reason(line: BenchmarkLine, run: BenchmarkRun, manager: "TaskManager") -> str:
    if line.reason:
        return line.reason
    if line.runs_code and not run.allows_code:
        return "runs generated programs without a sandbox, which only allow_unsafe_code=true allows"
    if line.runs_code and os.environ.get(_ALLOWS_CODE) != "1":
        return f"runs generated programs, which the environment variable {_ALLOWS_CODE}=1 must allow, too"
    try:
        tasks = manager.load([line.request(manager)])["tasks"]
    except Exception as error:  # by code of the task: no data set, no network, a missing package
        return f"cannot be opened: {_one_line(error)}"
    if not line.runs_code and any(getattr(task, "UNSAFE_CODE", False) for task in tasks.values()):
        return "runs generated programs, so that the line must have runs_code: true"
    return ""


def run_lines(
    run: BenchmarkRun, model: "HarnessModel", done: Collection[str | int], write: Callable[[Record], None]
) -> None:
    """Runs all lines that are not done, and writes a record of each, with `value` or an error in `failed`."""
    manager = open_manager(run.benchmarks)
    for line in run.benchmarks.lines:
        if line.line not in done:
            try:
                result = _run_line(line, run, model, manager)
            except RuntimeError:
                raise  # by torch or a lost rank: no other line can run
            except Exception as error:  # by code of the task, which is no reason to stop the others
                result = {"failed": f"failed: {_one_line(error)}"}
            write({"id": line.line, **result})


def _run_line(line: BenchmarkLine, run: BenchmarkRun, model: "HarnessModel", manager: "TaskManager") -> Record:
    import lm_eval

    has_chat = run.benchmarks.chat_template is not None
    outcome = lm_eval.simple_evaluate(
        model=model,
        tasks=[line.request(manager)],
        task_manager=manager,
        limit=run.limit,
        bootstrap_iters=0,
        log_samples=False,
        apply_chat_template=has_chat,
        fewshot_as_multiturn=has_chat,
        confirm_run_unsafe_code=run.allows_code and line.runs_code,
    )
    values = []
    for name in line.tasks:
        results = outcome["results"][name]
        if line.metric not in results:
            valid = [key for key, value in results.items() if "," in key and isinstance(value, int | float)]
            raise EvaluationError(f"metric: must be a result of {name}, is {line.metric!r}; valid: {', '.join(valid)}")
        values.append(results[line.metric])
    return {
        "value": fmean(values) * (100 if line.percent else 1),
        "num_samples": sum(sizes["effective"] for sizes in outcome["n-samples"].values()),
        "versions": {name: outcome["versions"].get(name) for name in line.tasks},
    }


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def set_table(run: BenchmarkRun, records: Mapping[str, Record], reasons: Mapping[str, str]) -> list[dict[str, Any]]:
    """Returns a row per line of the set, as plain values: its keys, and its value or the reason."""
    rows = []
    for line in run.benchmarks.lines:
        record = records.get(line.line, {})
        reason = record.get("failed") or reasons.get(line.line)
        measured = {key: record.get(key) for key in ("value", "num_samples", "versions")}
        rows.append({**encode(line), **measured, "reason": reason})
    return rows


def table_text(rows: list[dict[str, Any]]) -> str:
    """Returns the table of a set as text."""
    header = ("line", "tasks", "shots", "metric", "value", "published", "reason")
    cells = [header]
    for row in rows:
        first, *others = row["tasks"] or [""]
        name = f"{first} and {len(others)} others" if others else first
        value = "" if row["value"] is None else f"{row['value']:.2f}"
        published = "" if row["published"] is None else f"{row['published']:g}"
        shots = "" if row["shots"] is None else str(row["shots"])
        cells.append((row["line"], name, shots, row["metric"] or "", value, published, row["reason"] or ""))
    return "\n".join(aligned(cells, text=(0, 1, 3, 6)))
