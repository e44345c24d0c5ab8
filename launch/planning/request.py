"""Reads the run that `launch.plan` plans, and rates from a group or an earlier plan."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from kernels.ranges import PositiveInt
from launch.config.compose import compose, dotted_keys, key_of, options, own_keys
from launch.config.rules import check_rules
from launch.config.run_config import check_data, check_text, read_config, read_run, write_config
from launch.planning.changes import split_changes
from launch.ranks.run_folder import CONFIG_NAME, read_folder
from train.config import Acceptance, TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError, broken, nearest
from train.planner.job_plan import PlannerConfig
from train.planner.scaling import Rates
from train.report.plan_comparison import run_rates
from train.schedule.timing import EfficiencyConfig, with_chunks

_WHAT_IF = "what_if"
_RATES = "rates"
_EFFICIENCY = "efficiency"
_PLANNER = (_RATES, _EFFICIENCY)
_MOST_BYTES = 2**26
_UNREAD = "unread"
UNREAD: Mapping[str, Any] = {"data.paths": [_UNREAD], "data.tokenizer": _UNREAD}
"""Values without which a run cannot start, and which a plan can do without."""

_CHANGEABLE = ("cluster", "cost", "plan")
"""Sections of a run's configuration that describe devices and prices, which a comparison may change."""
_PLANNED = (
    *("model", "parallelism", "schedule", "batch", "precision", "dispatch", "recompute", "costs"),
    *("memory_cap", "attention", "optim"),
)
"""Sections that a plan depends on, which must be those of the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What is planned and printed. See `conf/plan.yaml`."""

    search: bool
    ranks: PositiveInt | None
    what_if: tuple[str, ...]
    advice: bool
    run: str | None
    dry_run: bool
    format: Literal["text", "json", "html"]
    out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """A run's configuration, the rates, and what is planned."""

    config: TrainConfig
    planner: PlannerConfig
    options: PlanOptions
    overrides: tuple[str, ...]
    values: Mapping[str, Any]


def read_request(overrides: Sequence[str]) -> PlanRequest:
    """Composes, decodes and checks a plan's configuration. Reads no data.

    Raises:
        ConfigError, CutError, ScheduleError: an invalid configuration of the run, or of the plan.
    """
    overrides = [_with_quotes(text) for text in overrides]
    values = plan_values(overrides)
    own = [key for key in own_keys("plan") if key != _EFFICIENCY]
    plan_options = decode(PlanOptions, {key: values[key] for key in own})
    run = {key: value for key, value in values.items() if key not in (*own, *_PLANNER)}
    if plan_options.run is None:
        config = run_config(run)
        _check_known_files(config, _unread(run))
    else:
        config = _compared_config(plan_options, run, overrides)
    return PlanRequest(
        config=config,
        planner=planner_config(values),
        options=plan_options,
        overrides=tuple(overrides),
        values={key: value for key, value in values.items() if key not in own},
    )


def _with_quotes(override: str) -> str:
    """Quotes the changes of `what_if=[KEY*2,KEY=VALUE]`, whose quotes a shell has removed."""
    key, _, value = override.partition("=")
    if key != _WHAT_IF or not value or any(quote in value for quote in "'\""):
        return override
    items = split_changes(value[1:-1] if value.startswith("[") and value.endswith("]") else value)
    return f"{_WHAT_IF}=[{','.join(repr(item) for item in items if item)}]"


def _compared_config(own: PlanOptions, values: Mapping[str, Any], overrides: Sequence[str]) -> TrainConfig:
    assert own.run is not None
    for key, value in (("search", own.search), ("what_if", own.what_if), ("advice", own.advice)):
        if value:
            raise broken("run", f"must be null with {key}", repr(own.run), f"rates={own.run} in place of run=")
    config = with_chunks(_measured_config(_require_run(Path(own.run)), values, overrides))
    check_rules(config)
    return config


def plan_values(overrides: Sequence[str]) -> dict[str, Any]:
    """Composes a plan's values, with rates and factor of the file that `rates=` names, if it names one."""
    chosen = [text.partition("=")[2].strip("'\"") for text in overrides if key_of(text) == _RATES]
    path = chosen[-1] if chosen and chosen[-1] not in options(_RATES) else None
    options_only = overrides if path is None else [text for text in overrides if key_of(text) != _RATES]
    values = compose("plan", options_only, UNREAD)
    if values["run"] is not None and not _sets(overrides, _RATES):
        path = str(_require_run(Path(str(values["run"]))))
    if path is None:
        return values
    if Path(path).is_dir():  # a run has no declared factor
        read: Mapping[str, Any] = {_RATES: encode(run_rates(Path(path))), _EFFICIENCY: {"unexplained": 1.0}}
    else:
        read = _read_plan(Path(path))
    kept = [key for key in _PLANNER if key == _RATES or not _sets(overrides, key)]
    return {**values, **{key: read[key] for key in kept}}


def planner_config(values: Mapping[str, Any]) -> PlannerConfig:
    """Decodes the rates and the declared factor."""
    return PlannerConfig(
        rates=decode(Rates, values[_RATES], _RATES),  # type: ignore[arg-type]
        efficiency=decode(EfficiencyConfig, values[_EFFICIENCY], _EFFICIENCY),
    )


def _sets(overrides: Sequence[str], group: str) -> bool:
    return any(key_of(text).partition(".")[0] == group for text in overrides)


def run_config(values: Mapping[str, Any]) -> TrainConfig:
    """Decodes and checks a run's composed values. Reads data only to count the steps of `task.epochs`."""
    task = values.get("task")
    unread = _unread(values)
    if isinstance(task, Mapping) and task.get("steps") is None and (unread or task.get("epochs") is None):
        needs = f"{' and '.join(unread)} to count the steps of task.epochs" if task.get("epochs") else "a number"
        raise ConfigError(f"task.steps: launch.plan needs {needs}, is null; nearest valid: 1000")
    if "data.tokenizer" in unread:
        values = {**values, "data": {**values["data"], "tokenizer": None}}
    config = read_run(values, checks_weights=False)
    check_rules(config)
    return config


def _unread(values: Mapping[str, Any]) -> list[str]:
    """Returns the keys of `UNREAD` that a run's composed values do not have."""
    data = values.get("data")
    return [key for key, value in UNREAD.items() if isinstance(data, Mapping) and data.get(key[5:]) == value]


def _check_known_files(config: TrainConfig, unread: Sequence[str]) -> None:
    """Rejects text and a tokenizer that are given, are on this machine, and are far too small for the run."""
    paths = getattr(config.data.source, "paths", ())
    if paths and all(Path(path).expanduser().exists() for path in paths):
        unknown: tuple[Acceptance, ...] = ("small_tokenizer",) if "data.tokenizer" in unread else ()
        known = replace(config, accept=(*config.accept, *unknown))
        check_text(known, check_data(known))


def _read_plan(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise ConfigError(
            f"rates: must be one of {', '.join(options(_RATES))}, a run's folder or a plan in JSON, is {str(path)!r}; "
            f"{nearest(str(path), options(_RATES))}"
        )
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"rates: {str(path)!r} must have at most {_MOST_BYTES} bytes, has {path.stat().st_size}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"rates: {str(path)!r} must be a plan in JSON, is not: {error}") from error
    if not isinstance(read, dict) or not {"rates", "efficiency"} <= read.keys():
        raise ConfigError(f"rates: {str(path)!r} must be a plan in JSON, with keys rates and efficiency, is not")
    return read


def _measured_config(folder: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> TrainConfig:
    """Returns a run's configuration, with devices and prices from overrides; nothing else may change."""
    run = write_config(read_folder(folder))
    given = dict(dotted_keys(values))
    for key in map(key_of, overrides):
        section, _, leaf = key.partition(".")
        if section in _CHANGEABLE and leaf:
            *parents, last = key.split(".")
            reduce(getitem, parents, run)[last] = given[key]
        elif section in _CHANGEABLE:
            run[section] = values[section]
        elif key == "experiment":  # may set all of them
            _check_equal(_PLANNED, given, run)
        elif section in _PLANNED:
            _check_equal([key], given, run)
    return read_config(run)


def _require_run(folder: Path) -> Path:
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"run: must be the folder of a run, which holds {CONFIG_NAME}, is {str(folder)!r}")
    return folder


def _check_equal(keys: Sequence[str], given: Mapping[str, object], run: Mapping[str, Any]) -> None:
    """Rejects values at or below keys that differ from those of the run, and names the first."""
    known = dict(dotted_keys(run))
    for name, value in given.items():
        is_checked = any(name == key or name.startswith(f"{key}.") for key in keys)
        if not is_checked or isinstance(value, Mapping) or value is None or value == "auto":
            continue
        if value != known.get(name, value):
            rule = f"{name} must be that of the run"
            raise broken("run", rule, value, f"{name}={known[name]}, or rates= in place of run= to plan another run")
