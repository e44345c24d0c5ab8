"""Reads the run that `launch.plan` plans, and rates from a group or an earlier plan."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import reduce
from operator import getitem
from pathlib import Path
from textwrap import shorten
from typing import Any, Literal

import yaml

from base.decode import decode, encode
from base.ranges import PositiveInt
from base.refusal import ConfigError, broken, nearest, nearest_key
from infer.deployment import DeploymentConfig
from launch.config.compose import compose, dotted_keys, key_of, options, own_keys
from launch.config.folder import CONFIG_NAME, read_folder
from launch.config.rules import check_rules
from launch.config.run import check_data, check_text, read_config, read_run, write_config
from planner.job_plan import PlannerConfig
from planner.scaling import Rates
from train.config import Acceptance, TrainConfig
from train.predict.timing import EfficiencyConfig, with_chunks
from train.report.plan_comparison import run_rates

_WHAT_IF = "what_if"
_RATES = "rates"
_EFFICIENCY = "efficiency"
PLANNER = (_RATES, _EFFICIENCY)
"""Groups of a plan that a run does not have."""
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
    format: Literal["text", "json", "html"]
    out: str


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanRequest:
    """A run's configuration, the rates, what is planned, and `notes` on keys that a plan changes."""

    config: TrainConfig
    planner: PlannerConfig
    options: PlanOptions
    overrides: tuple[str, ...]
    values: Mapping[str, Any]
    notes: tuple[str, ...] = ()


def read_request(overrides: Sequence[str]) -> PlanRequest:
    """Composes, decodes and checks a plan's configuration. Reads no data.

    Raises:
        ConfigError, CutError, ScheduleError: an invalid configuration of the run, or of the plan.
    """
    overrides = [_with_quotes(text) for text in overrides]
    values = compose_plan(overrides)
    output_keys = [key for key in own_keys("plan") if key != _EFFICIENCY]
    plan_options = decode(PlanOptions, {key: values[key] for key in output_keys})
    _check_modes(plan_options)
    planned = {key: value for key, value in values.items() if key not in output_keys}
    run = {key: value for key, value in planned.items() if key not in PLANNER}
    notes = list(make_validation_whole(run))
    if plan_options.search or plan_options.smallest:
        notes += _adapt_to_search(run, overrides)
    if plan_options.smallest and run["task"].get("steps", 1) is None:  # they change no memory
        run["task"] = {**run["task"], "steps": 1000}
    if plan_options.run is None:
        config = run_config(run)
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
    others = ("search", "smallest", "what_if", "advice", "run", "dry_run")
    if own.deployment is not None and (key := next((key for key in others if getattr(own, key)), None)):
        raise broken(key, "must not be set with deployment", getattr(own, key), "deployment=null")
    if own.deployment is not None and own.format == "html":
        raise broken("format", "must be text or json with deployment", own.format, "text")
    if own.search and own.smallest:
        raise broken("smallest", "must be false with search=true", "true", "search=false")
    if own.ranks is not None and not own.search:
        raise broken("ranks", "must be null without search; parallelism has a run's ranks", own.ranks, "search=true")
    if own.search or own.smallest:
        mode = "search" if own.search else "smallest"
        rule = f"must not be set with {mode}=true, which plans many runs"
        for key in ("what_if", "advice", "dry_run"):
            if value := getattr(own, key):
                raise broken(key, rule, value, f"{mode}=false")
        if own.format == "html":
            raise broken("format", f"must be text or json with {mode}=true", own.format, "text")
    for key in ("search", "smallest", "what_if", "advice"):
        if own.run is not None and getattr(own, key):
            raise broken("run", f"must be null with {key}", repr(own.run), f"rates={own.run} in place of run=")


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


def _with_quotes(override: str) -> str:
    """Quotes the changes of `what_if=[KEY*2,KEY=VALUE]`, whose quotes a shell has removed."""
    key, _, value = override.partition("=")
    if key != _WHAT_IF or not value or any(quote in value for quote in "'\""):
        return override
    listed = value[1:-1] if value.startswith("[") and value.endswith("]") else value
    items = (item.strip() for item in _split(listed, is_item=False))
    return f"{_WHAT_IF}=[{','.join(repr(item) for item in items if item)}]"


def compose_plan(overrides: Sequence[str]) -> dict[str, Any]:
    """Composes a plan's values, with rates and factor of the file that `rates=` names, if it names one."""
    chosen = [text.partition("=")[2].strip("'\"") for text in overrides if key_of(text) == _RATES]
    path = chosen[-1] if chosen and chosen[-1] not in options(_RATES) else None
    options_only = overrides if path is None else [text for text in overrides if key_of(text) != _RATES]
    values = compose("plan", options_only, UNREAD)
    if values["run"] is not None and not _sets(overrides, _RATES):
        path = str(_require_run(Path(str(values["run"]))))
    if path is None:
        return values
    read = _read_rates(Path(path))
    return {**values, **{key: read[key] for key in PLANNER if key == _RATES or not _sets(overrides, key)}}


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


_FORM = "must be NAME*FACTOR, NAME/FACTOR or NAME=VALUE, several joined with ' + '"
_MOST_SHOWN = 60
EXAMPLE = "cluster.inter_node_bytes_per_second*2"
_OPENING = "[{("
_CLOSING = "]})"
_QUOTES = "'\""


@dataclass(frozen=True, kw_only=True, slots=True)
class Change:
    """One change of a key."""

    key: str
    operator: str
    operand: str

    def __str__(self) -> str:
        return f"{self.key}{self.operator}{self.operand}"

    @property
    def factor(self) -> float:
        """The factor of a change that multiplies."""
        number = math.nan
        with suppress(ValueError):
            number = float(self.operand)
        factor = 1 / number if self.operator == "/" and number else number
        if not (math.isfinite(number) and number > 0 and math.isfinite(factor) and factor > 0):
            hint = 0.01 if number == 0 and self.operator == "*" else 2
            rule = "the factor must be a finite number above 0"
            raise broken(str(self), rule, repr(self.operand), f"{self.key}{self.operator}{hint}")
        return factor

    def new_value(self) -> object:
        """Returns the value of a change with `=`."""
        value: object = None
        with suppress(yaml.YAMLError, ValueError, RecursionError):
            value = yaml.safe_load(self.operand)
        if value is None and self.operand not in ("null", "~"):
            rule = "the value must be a number, text, true, false, null or a list"
            raise broken(str(self), rule, repr(self.operand), f"{self.key}=null")
        return value


def parse_changes(item: str) -> tuple[Change, ...]:
    """Returns the changes of a what-if, which `,` or ` + ` separates."""
    return tuple(_parse_change(text.strip()) for text in _split(item, is_item=True))


def _parse_change(text: str) -> Change:
    match = re.fullmatch(r"([^=]*?)\s*=\s*(.*)", text, re.DOTALL) or re.fullmatch(r"(.*?)\s*[*/]\s*([^*/]*)", text)
    if match is None or not match[1] or not re.fullmatch(r"[\w.*/\-]+", match[1]):
        key = re.match(r"[A-Za-z_][\w.]*", text)
        raise broken(text, _FORM, repr(text), f"{key[0]}*2" if key else EXAMPLE)
    return Change(key=match[1], operator=text[len(match[1]) :].strip()[0], operand=match[2])


def _split(item: str, *, is_item: bool) -> Iterator[str]:
    """Yields the parts between commas, and pluses of one item, that are outside of brackets and quotes."""
    depth = 0
    quote = ""
    start = 0
    for position, letter in enumerate(item):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in _QUOTES:
            quote = letter
        elif letter in _OPENING or letter in _CLOSING:
            depth += 1 if letter in _OPENING else -1
        elif depth == 0 and (letter == "," or (is_item and item[position - 1 : position + 2] == " + ")):
            yield item[start:position]
            start = position + 1
    yield item[start:]


def changed_values(values: Mapping[str, Any], typed: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Returns nested values with changes applied in order. Whole numbers of `typed` must stay whole."""
    result = deepcopy(dict(values))
    decoded = dict(dotted_keys(typed))
    for change in changes:
        for key in _matching_keys(change, result):
            *parents, last = key.split(".")
            group = reduce(getitem, parents, result)
            if change.operator == "=":
                group[last] = change.new_value()
            else:
                group[last] = _multiplied(change, key, group[last], decoded.get(key))
    return result


def _matching_keys(change: Change, values: Mapping[str, Any]) -> list[str]:
    leaves = dict(dotted_keys(values))
    if change.key in leaves:
        return [change.key]
    pattern = re.escape(change.key).replace(r"\*", "[^.]*")
    matches = [key for key, value in leaves.items() if re.fullmatch(pattern, key) and not isinstance(value, dict)]
    if not matches:
        raise ConfigError(f"{change.key}: unknown key; {nearest_key(change.key, list(leaves))}")
    return matches


def _multiplied(change: Change, key: str, value: object, typed: object) -> int | float:
    """Returns a number times the factor of a change, whole if the key holds whole numbers."""
    factor = change.factor
    if isinstance(value, dict):
        numbers = (name for name, leaf in dotted_keys(value, f"{key}.") if type(leaf) in (int, float))
        near = f"{next(numbers, 'cluster.peak_flops')}*2"
        raise ConfigError(f"{key}: is a group of keys; write the key of a number, such as {near}")
    if isinstance(value, bool) or not isinstance(value, int | float):
        text = "null" if value is None else shorten(repr(value), _MOST_SHOWN)
        raise ConfigError(f"{key}: must be a number to be multiplied, is {text}; nearest valid: {key}=VALUE")
    exact = value / float(change.operand) if change.operator == "/" else value * factor
    if type(value) is int and type(typed) is not float:
        rounded = round(exact) if math.isfinite(exact) else value
        if abs(exact - rounded) > 1e-9 * max(1.0, abs(rounded)):
            rule = f"must be a whole number, {change} gives {exact:g}"
            raise ConfigError(f"{key}: {rule}; nearest valid: {key}={max(rounded, 1)}")
        return rounded
    return exact
