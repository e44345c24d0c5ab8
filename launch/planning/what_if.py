"""Plans a run with changes of its configuration.

All public functions raise ConfigError, CutError or ScheduleError for changes that do not apply.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from launch.config.compose import default_groups, dotted_keys, key_of, options, own_keys, read_option, user_errors
from launch.config.run_config import expand_model, write_config
from launch.planning.request import (
    EXAMPLE,
    Change,
    PlanRequest,
    changed_values,
    compose_plan,
    parse_changes,
    planner_config,
    run_config,
)
from train.config import TrainConfig, named_weights
from train.config.decode import encode
from train.config.errors import ConfigError, UnknownKeyError, nearest
from train.planner.advice import AdviceRow, WhatIf, Wish, compare, link_balance, plan_with_order, wishes
from train.planner.forms import advice_values
from train.planner.job_plan import JobPlan, PlannerConfig, plan_job, require_time

_PLANNER = ("rates", "efficiency")


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedRun:
    """A run with changes."""

    change: str
    config: TrainConfig
    planner: PlannerConfig


def read_what_ifs(request: PlanRequest) -> tuple[ChangedRun, ...]:
    """Returns the changed runs of a request's what-ifs."""
    return tuple(_checked_run(request, item) for item in request.options.what_if)


def plan_what_if(request: PlanRequest, base: JobPlan, run: ChangedRun, *, keeps_order: bool = False) -> WhatIf:
    """Plans a changed run, and compares it with the run.

    If the order and the cut of the run apply, they are planned too, and the better plan is returned; with
    `keeps_order`, they are the only ones.
    """
    try:
        ordered = plan_with_order(base, request.config, run.config, run.planner)
        plans = [] if ordered is None else [ordered]
        if ordered is None or not keeps_order:
            plans.append(plan_job(run.config, run.planner))
    except user_errors() as error:
        raise ConfigError(f"what_if: {run.change}: {error}") from error
    return compare(run.change, base, min(plans, key=_preference))


def advise_hardware(request: PlanRequest, base: JobPlan) -> dict[str, Any]:
    """Returns what better hardware would gain for a run that keeps its order and its cut if they apply."""
    require_time(base)
    rows: list[AdviceRow] = []
    unknown: list[Wish] = []
    for wish in wishes(request.config, request.planner.rates):
        if not wish.change:
            unknown.append(wish)
            continue
        try:
            run = changed_run(request, wish.change)
            rows.append(AdviceRow(wish=wish, what_if=plan_what_if(request, base, run, keeps_order=True)))
        except user_errors() as error:
            unknown.append(Wish(name=wish.name, needs=f"another run; {wish.change} is refused: {error}"))
    return advice_values(rows, unknown, link_balance(base.config, request.planner.rates))


def _preference(plan: JobPlan) -> tuple[bool, float]:
    return not plan.fits, plan.timed.time.step if plan.timed is not None else 0.0


def _checked_run(request: PlanRequest, item: str) -> ChangedRun:
    """Returns a changed run, and refuses an invalid change with one message for all causes."""
    try:
        return changed_run(request, item)
    except user_errors() as error:
        message = str(error)
        shown = message if message.startswith(item) and item else f"{item or repr(item)}: {message}"
        raise ConfigError(f"what_if: {shown}{_as_in_run(request, message)}") from error


def _as_in_run(request: PlanRequest, message: str) -> str:
    """Returns the value of the run as the end of a message that names no valid value, or nothing."""
    if re.search(r"nearest|valid|did you mean|write|least is|options:", message):
        return ""
    key = message.partition(":")[0]
    known = dict(dotted_keys({**request.values}))
    if key not in known or isinstance(known[key], dict | list):
        return ""
    value = "null" if known[key] is None else known[key]
    return f"; valid: {key}={value}, as in the run"


def changed_run(request: PlanRequest, item: str) -> ChangedRun:
    """Returns a run with changes, which passes the rules."""
    changes = parse_changes(item)
    for change in changes:
        if change.key in _output_keys():
            raise ConfigError(f"{change}: {change.key} is not part of the run; nearest valid: {EXAMPLE}")
    chosen = {place: group for place, change in enumerate(changes) if (group := _group_of(change)) is not None}
    values = _with_options(request, chosen.values()) if chosen else request.values
    others = [change for place, change in enumerate(changes) if place not in chosen]
    values = _with_model_keys(values, others)
    typed = {**write_config(request.config), **{key: encode(getattr(request.planner, key)) for key in _PLANNER}}
    changed = changed_values(values, typed, others)
    run = run_config({key: value for key, value in changed.items() if key not in _PLANNER})
    return ChangedRun(change=item, config=run, planner=planner_config(changed))


def _output_keys() -> list[str]:
    return [key for key in own_keys("plan") if key not in _PLANNER]


def _group_of(change: Change) -> str | None:
    """Returns the override that chooses an option of a group, for a change of a group or of its `kind`."""
    groups = default_groups("plan")
    group = change.key.replace(".", "/")
    of_kind = change.key.endswith(".kind") and (parent := group.rpartition("/")[0]) in groups
    if group not in groups and not of_kind:
        return None
    group = parent if of_kind else group
    names = options(group)
    if change.operator != "=":
        raise ConfigError(f"{change}: {change.key} is not a number; nearest valid: {change.key}={names[0]}")
    value = change.operand.strip("'\"")
    if not of_kind:
        return f"{group}={value}"
    kinds = {name: read_option(group, name).get("kind") for name in names}
    matching = [name for name, kind in kinds.items() if kind == value]
    if not any(kinds.values()):
        return None
    if not matching:
        valid = sorted({str(kind) for kind in kinds.values() if kind})
        raise ConfigError(f"{change.key}: must be one of {', '.join(valid)}, is {value!r}; {nearest(value, valid)}")
    return f"{group}={value if value in matching else matching[0]}"


def _with_options(request: PlanRequest, chosen: Iterable[str]) -> dict[str, Any]:
    """Composes the run with other options of groups, without keys that only the replaced options have."""
    overrides = [*chosen]
    groups = {key_of(text) for text in overrides}
    output = _output_keys()
    kept = [text for text in request.overrides if key_of(text) not in groups]
    try:
        values = compose_plan([*kept, *overrides])
    except UnknownKeyError:
        prefixes = tuple(f"{group.replace('/', '.')}." for group in groups)
        others = [text for text in kept if not key_of(text).lstrip("+").startswith(prefixes)]
        values = compose_plan([*others, *overrides])
    for text in overrides:
        _drop_other_keys(values, *text.split("=", 1))
    return {key: value for key, value in values.items() if key not in output}


def _drop_other_keys(values: dict[str, Any], group: str, option: str) -> None:
    """Removes keys of a group's other options, which an experiment set, from the chosen option."""
    *parents, last = group.split("/")
    place = values
    for parent in parents:
        place = place.get(parent, {})
    chosen = place.get(last)
    own = read_option(group, option)
    if not isinstance(chosen, Mapping) or "kind" not in own:
        return
    others = {key for name in options(group) for key in read_option(group, name)} - own.keys()
    place[last] = {key: value for key, value in chosen.items() if key not in others}


def _with_model_keys(values: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Returns values with all keys of the model, if a change is about one that follows from `model.kind`."""
    model = values.get("model")
    names = [change.key.removeprefix("model.") for change in changes if change.key.startswith("model.")]
    if not isinstance(model, Mapping) or all(name.partition(".")[0] in model for name in names):
        return dict(values)
    expanded = expand_model(model, named_weights(values.get("init_from")), values.get("init_mtp"))
    # A head that is not given follows the task.
    return {**values, "model": {key: value for key, value in expanded.items() if key != "head" or key in model}}
