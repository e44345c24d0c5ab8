"""Reads the run that `launch.plan` plans, and rates from a group or an earlier plan."""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any, Literal

from base.decode import decode, encode
from base.ranges import PositiveInt
from base.refusal import ConfigError, UnknownKeyError, broken, nearest
from infer.deployment import DeploymentConfig
from launch.config.compose import (
    compose,
    default_groups,
    dotted_keys,
    key_of,
    options,
    own_keys,
    with_overrides,
)
from launch.config.folder import CONFIG_NAME, read_folder
from launch.config.rules import check_rules
from launch.config.run import check_data, check_text, read_config, read_run, write_config
from planner.balance import GivenLoads
from planner.job_plan import PlannerConfig
from planner.scaling import Rates
from train.checkpoint.sources import LIKE_POLICY
from train.config import Acceptance, TrainConfig
from train.predict.timing import EfficiencyConfig, with_chunks
from train.report.plan_comparison import run_rates

EXAMPLE = "cluster.inter_node_bytes_per_second=100e9"
"""An override of a what-if."""
_RATES = "rates"
_EFFICIENCY = "efficiency"
PLANNER = (_RATES, _EFFICIENCY)
"""Groups of a plan that a run does not have."""
_MOST_BYTES = 2**26
_UNREAD = "unread"
UNREAD: Mapping[str, Any] = {
    "data.paths": [_UNREAD],
    "data.sources": [{"name": _UNREAD, "paths": [_UNREAD], "weight": 1, "domain": None}],
    "data.tokenizer": _UNREAD,
    "reward.parts.*.ckpt": LIKE_POLICY,
}
"""Values without which a run cannot start, and which a plan can do without."""

_CHANGEABLE = ("cluster", "cost", "plan")
"""Sections of a run's configuration that describe devices and prices, which a comparison may change."""
_PLAN_FORMATS = ("html", "megatron")
"""Formats that only the plan of one run has."""
_PLANNED = (
    *("model", "parallelism", "schedule", "batch", "precision", "dispatch", "recompute", "costs"),
    *("memory_cap", "attention", "optim"),
)
"""Sections that a plan depends on, which must be those of the run."""


_SEARCHED = ("parallelism", "schedule", "dispatch")
"""Sections of a run that a search chooses; overrides of them define the layout that it compares first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """What is planned and printed. See `conf/plan.yaml`."""

    search: bool
    smallest: bool
    ranks: PositiveInt | None
    what_if: tuple[str, ...]
    advice: bool
    run: str | None
    deployment: DeploymentConfig | None
    dry_run: bool
    report_costs: bool
    published: str | None
    loads: GivenLoads | None
    format: Literal["text", "json", "html", "megatron"]
    out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """A run's configuration, the rates, what is planned, and `notes` on keys that a plan changes.

    `change` is the what-if that made this run of another one.
    """

    config: TrainConfig
    planner: PlannerConfig
    options: PlanOptions
    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    change: str = ""


def read_request(overrides: Sequence[str]) -> PlanRequest:
    """Composes, decodes and checks a plan's configuration. Reads no data.

    Raises:
        ConfigError, CutError, ScheduleError: an invalid configuration of the run, or of the plan.
    """
    values = compose_plan(overrides)
    output_keys = _output_keys()
    plan_options = decode(PlanOptions, {key: values[key] for key in output_keys})
    _check_modes(plan_options)
    if plan_options.report_costs:
        _check_report_costs(values["name"], plan_options.format, overrides)
    if plan_options.published is not None:
        _check_alone(
            "published", plan_options.published, plan_options.format, overrides, ("published", "format", "out")
        )
    planned = {key: value for key, value in values.items() if key not in output_keys}
    run = {key: value for key, value in planned.items() if key not in PLANNER}
    notes = list(make_validation_whole(run))
    if any(part.get("ckpt") == LIKE_POLICY for part in (run.get("reward") or {}).get("parts") or ()):
        notes.append("reward.parts: a reward model without a ckpt is planned with the sizes of the policy")
    if plan_options.search or plan_options.smallest:
        notes += _adapt_to_search(run, overrides)
    if plan_options.smallest and run["task"].get("steps", 1) is None:  # they change no memory
        run["task"] = {**run["task"], "steps": 1000}
    if plan_options.run is None:
        config = run_config(run)
        if only := config.planned_only:
            keys = ", ".join(f"{key}={value}" for key, (value, _) in only.items())
            notes.append(f"planned, not run: {keys}; launch.train refuses them")
        _check_known_files(config, _unread(run))
    else:
        config = with_chunks(_measured_config(_require_run(Path(plan_options.run)), run, overrides))
        check_rules(config)
    return PlanRequest(
        config=config,
        planner=planner_config(values),
        options=plan_options,
        overrides=tuple(overrides),
        values=planned,
        notes=tuple(notes),
    )


def _check_modes(own: PlanOptions) -> None:
    """Rejects options that would have no effect next to others."""
    others = ("search", "smallest", "what_if", "advice", "run", "dry_run", "loads")
    if own.deployment is not None and (key := next((key for key in others if getattr(own, key)), None)):
        raise broken(key, "must not be set with deployment", encode(getattr(own, key)), "deployment=null")
    if own.deployment is not None and own.format in _PLAN_FORMATS:
        raise broken("format", "must be text or json with deployment", own.format, "text")
    if own.search and own.smallest:
        raise broken("smallest", "must be false with search=true", "true", "search=false")
    if own.ranks is not None and not own.search:
        raise broken("ranks", "must be null without search; parallelism has a run's ranks", own.ranks, "search=true")
    if own.search or own.smallest:
        mode = "search" if own.search else "smallest"
        rule = f"must not be set with {mode}=true, which plans many runs"
        for key in ("what_if", "advice", "dry_run", "loads"):
            if value := getattr(own, key):
                raise broken(key, rule, encode(value), f"{mode}=false")
        if own.format in _PLAN_FORMATS:
            raise broken("format", f"must be text or json with {mode}=true", own.format, "text")
    for key in ("search", "smallest", "what_if", "advice"):
        if own.run is not None and getattr(own, key):
            raise broken("run", f"must be null with {key}", repr(own.run), f"rates={own.run} in place of run=")


def _check_report_costs(name: str, form: str, overrides: Sequence[str]) -> None:
    """Rejects keys next to `report_costs`, which plans the recipes as they are."""
    _check_alone("report_costs", "true", form, overrides, ("experiment", "report_costs", "format", "out"))
    if name != "v3_671b":
        rule = "goes with experiment=v3_671b, because it plans the recipes as they are"
        raise broken("report_costs", rule, f"experiment={name}", "experiment=v3_671b report_costs=true")


def _check_alone(mode: str, value: str, form: str, overrides: Sequence[str], keys: Sequence[str]) -> None:
    """Rejects keys and formats that would have no effect next to a mode that plans other runs."""
    if form in _PLAN_FORMATS:
        raise broken("format", f"must be text or json with {mode}={value}", form, "text")
    if wrong := next((text for text in overrides if key_of(text) not in keys), None):
        rule = f"goes with no keys but {', '.join(keys)}, because it plans other runs as they are"
        raise broken(mode, rule, wrong, f"{mode}={value}")


def make_validation_whole(run: dict[str, Any]) -> Iterator[str]:
    """Makes a run's validation whole batches, which changes no figure, and yields a line if so."""
    validation = run["validation"]
    sizes = (validation.get("sequences"), run["batch"].get("global_sequences"))
    if all(type(size) is int and size > 0 for size in sizes) and sizes[0] % sizes[1]:
        whole = -(-sizes[0] // sizes[1]) * sizes[1]
        run["validation"] = {**validation, "sequences": whole}
        yield f"validation.sequences: {whole} in place of {sizes[0]}, because validation runs whole batches"


def _adapt_to_search(run: Mapping[str, Any], overrides: Sequence[str]) -> Iterator[str]:
    """Yields a line for each key that a search reads otherwise than given."""
    if run["rollout"] is not None:
        yield "rollouts: a search compares training steps alone; plan a layout to see how long it samples"
    keys = [key_of(text).replace("/", ".") for text in overrides]
    if free := [key for key in keys if key == "batch.micro_sequences" or key.partition(".")[0] in _SEARCHED]:
        yield f"all values are compared, the given ones first: {', '.join(dict.fromkeys(free))}"


def _output_keys() -> list[str]:
    """Returns the keys that say what is planned and printed, and are not part of the run."""
    return [key for key in own_keys("plan") if key != _EFFICIENCY]


def changed_run(request: PlanRequest, item: str) -> PlanRequest:
    """Returns a run with the overrides of a what-if after its own.

    Raises:
        ConfigError, CutError, ScheduleError: the what-if is not a list of overrides, or the run breaks a rule.
    """
    try:
        overrides = shlex.split(item)
    except ValueError:  # an open quote
        overrides = []
    if not overrides:
        raise ConfigError(f"must be overrides as on the command line, is {item!r}; nearest valid: {EXAMPLE}")
    for key in map(key_of, overrides):
        if key.partition(".")[0] in _output_keys():
            raise ConfigError(f"{key}: is not part of the run; nearest valid: {EXAMPLE}")
    groups = {key_of(text) for text in overrides} & default_groups("plan").keys()
    run = [text for text in request.overrides if key_of(text) not in groups]
    try:
        changed = read_request([*run, *overrides])
    except UnknownKeyError:  # a key that only the replaced option has
        prefixes = tuple(f"{group.replace('/', '.')}." for group in groups)
        run = [text for text in run if not key_of(text).startswith(prefixes)]
        changed = read_request([*run, *overrides])
    return replace(changed, change=item)


def compose_plan(overrides: Sequence[str]) -> dict[str, Any]:
    """Composes a plan's values, with rates and factor of the file that `rates=` names, if it names one."""
    chosen = [text.partition("=")[2].strip("'\"") for text in overrides if key_of(text) == _RATES]
    path = chosen[-1] if chosen and chosen[-1] not in options(_RATES) else None
    of_rates = [text for text in overrides if path is not None and _sets([text], _RATES)]
    values = compose("plan", [text for text in overrides if text not in of_rates], UNREAD)
    if values["run"] is not None and not _sets(overrides, _RATES):
        path = str(_require_run(Path(str(values["run"]))))
    if path is None:
        return values
    read = _read_rates(Path(path))
    values |= {key: read[key] for key in PLANNER if key == _RATES or not _sets(overrides, key)}
    return values | with_overrides({_RATES: values[_RATES]}, [text for text in of_rates if key_of(text) != _RATES])


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
        accepting = replace(config, accept=(*config.accept, *unknown))
        check_text(accepting, check_data(accepting))


def _read_rates(path: Path) -> Mapping[str, Any]:
    """Reads rates and factor from a run's folder, which has no declared factor, or from an earlier plan."""
    if path.is_dir():
        has_rollouts = (path / "rollouts").is_dir() and (path / CONFIG_NAME).is_file()
        rates = run_rates(path, read_folder(path) if has_rollouts else None)
        return {_RATES: encode(rates), _EFFICIENCY: {"unexplained": 1.0}}
    if not path.is_file():
        rule = f"must be one of {', '.join(options(_RATES))}, a run's folder or a plan in JSON, is {str(path)!r}"
        raise ConfigError(f"rates: {rule}; {nearest(str(path), options(_RATES))}")
    if path.stat().st_size > _MOST_BYTES:
        raise ConfigError(f"rates: {str(path)!r} must have at most {_MOST_BYTES} bytes, has {path.stat().st_size}")
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"rates: {str(path)!r} must be a plan in JSON, is not: {error}") from error
    if not isinstance(read, dict) or not {*PLANNER} <= read.keys():
        raise ConfigError(f"rates: {str(path)!r} must be a plan in JSON, with keys rates and efficiency, is not")
    return read


def _measured_config(folder: Path, values: Mapping[str, Any], overrides: Sequence[str]) -> TrainConfig:
    """Returns a run's configuration, with devices and prices from overrides; nothing else may change."""
    run = write_config(read_folder(folder))
    requested = dict(dotted_keys(values))
    for key in map(key_of, overrides):
        section, _, leaf = key.partition(".")
        if section in _CHANGEABLE and leaf:
            *parents, last = key.split(".")
            reduce(getitem, parents, run)[last] = requested[key]
        elif section in _CHANGEABLE:
            run[section] = values[section]
        elif key == "experiment":  # may set all of them
            _check_equal(_PLANNED, requested, run)
        elif section in _PLANNED:
            _check_equal([key], requested, run)
    return read_config(run)


def _require_run(folder: Path) -> Path:
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(f"run: must be the folder of a run, which holds {CONFIG_NAME}, is {str(folder)!r}")
    return folder


def _check_equal(keys: Sequence[str], given: Mapping[str, object], run: Mapping[str, Any]) -> None:
    """Rejects values at or below keys that differ from those of the run, and names the first."""
    run_values = dict(dotted_keys(run))
    for name, value in given.items():
        is_checked = any(name == key or name.startswith(f"{key}.") for key in keys)
        if not is_checked or isinstance(value, Mapping) or value is None or value == "auto":
            continue
        if value != run_values.get(name, value):
            near = f"{name}={run_values[name]}, or rates= in place of run= to plan another run"
            raise broken("run", f"{name} must be that of the run", value, near)
