"""Plans a run before it is started: memory, time, cost, layouts and hardware: `python -m launch.plan`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import gc
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from base.decode import decode, encode
from base.refusal import ConfigError, UnknownKeyError, broken, nearest
from comm.config import DispatchConfig
from comm.dispatch.registry import DISPATCHERS
from dualpipe.api import Drawing
from dualpipe.registry import ScheduleConfig, candidates
from infer.deployment import deployment_text, deployment_values
from launch.cli.entry import command, plain_text, write_output
from launch.config import compose
from launch.config.memory import check_memory
from launch.config.rules import check_rules
from launch.config.run import expand_model, write_config
from launch.plan_request import (
    EXAMPLE,
    PLANNER,
    Change,
    PlanRequest,
    changed_values,
    compose_plan,
    make_validation_whole,
    parse_changes,
    planner_config,
    read_request,
    run_config,
)
from planner import forms
from planner.advice import link_balance, plan_with_order, wishes
from planner.job_plan import (
    JobPlan,
    PlannerConfig,
    compare_built_ranks,
    compared_plan,
    plan_job,
    require_time,
    unmeasured_note,
    untimed_reason,
)
from planner.layouts import MOST_RANKS, SearchSpace, adapted_run, recompute_sets
from planner.page import plan_page
from planner.rollouts import compare_rollouts
from planner.search import search_layouts
from planner.search_forms import search_text, search_values
from planner.smallest import smallest_text, smallest_values
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig, named_weights
from train.predict.timing import SLICES, MeasuredRates
from train.tasks.registry import TASKS


def main(overrides: Sequence[str]) -> int:
    """Plans a run and prints the plan. Returns exit code 0, also if the run does not fit."""
    with compose.system_errors():
        request = read_request(overrides)
        answer = answer_request(request)
        write_output(answer.render(request.options.format), request.options.out)
    for kind in answer.values.get("dry_run", ()):
        if kind["differences"]:
            raise ConfigError(f"dry_run: rank {kind['pipeline_ranks'][0]}: {kind['differences'][0]}")
    return 0


class PlanAnswer(Drawing):
    """Plan of a run, or layouts that a search found: values, printed text, and a page in notebooks."""

    def __init__(self, values: dict[str, Any], lines: Callable[[], str], page: Callable[[], str] | None = None) -> None:
        """Stores values and functions that return the other forms; a search has no page."""
        writers = {"text": lines, "json": lambda: json.dumps(values, indent=1)}
        super().__init__(writers if page is None else writers | {"html": page})
        self.values = values


def answer_request(request: PlanRequest) -> PlanAnswer:
    """Plans what a request asks for."""
    if request.options.deployment is not None:
        run = request.config
        sizes = deployment_values(run.model, run.cluster, run.precision.kind, request.options.deployment)
        return PlanAnswer(sizes, lambda: deployment_text(sizes))
    if request.options.smallest:
        jobs = smallest_values(search_space(request), request.planner, check_rules)
        return PlanAnswer({"jobs": jobs}, lambda: "\n".join(smallest_text(jobs)))
    if not request.options.search:
        return _planned(request)
    sequences = request.values["validation"]["sequences"]
    given = replace(request.config, validation=replace(request.config.validation, sequences=sequences))
    result = search_layouts(search_space(request), given, request.planner, check_rules)
    values = search_values(result) | {"notes": list(request.notes)}
    batches = (given.batch.global_sequences, result.config.batch.global_sequences)
    return PlanAnswer(values, lambda: "\n".join(search_text(values, *batches)))


def preview(overrides: Sequence[str]) -> str:
    """Returns the composed, checked configuration as YAML."""
    request = read_request(overrides)
    return plain_text("plan", write_config(request.config) | encode(request.options) | encode(request.planner))


def _planned(request: PlanRequest) -> PlanAnswer:
    """Returns the plan of a run with what was asked for, by the keys of the JSON form."""
    asked: dict[str, Any] = {}
    changed = read_what_ifs(request)
    if request.options.run is None:
        plan = with_advice(plan_job(request.config, request.planner))
    else:
        folder = Path(request.options.run)
        plan, comparison = compared_plan(request.config, request.planner, folder)
        asked["compared"] = comparison.values() | compare_rollouts(plan.rollouts, plan.config, folder)
    asked["what_if"] = [plan_what_if(request, plan, run) for run in changed]
    if request.options.advice:
        asked["advice"] = advise_hardware(request, plan)
    if request.options.dry_run:
        asked["dry_run"] = compare_built_ranks(plan.config)
    values = forms.plan_values(plan, request.planner) | {"notes": list(request.notes)} | asked
    page = partial(plan_page, values, plan.timed, request.config.name)
    return PlanAnswer(values, lambda: _plan_lines(plan, values, asked), page)


def with_advice(plan: JobPlan) -> JobPlan:
    """Returns a plan whose reasons name the nearest change that fits."""
    if plan.fits:
        return plan
    try:
        check_memory(replace(plan.config, plan=replace(plan.config.plan, check=True)), check_rules)
    except ConfigError as error:
        return replace(plan, reason=str(error))
    return plan


def _plan_lines(plan: JobPlan, values: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    formats: dict[str, Callable[[Any], Iterable[str]]] = {
        "compared": forms.comparison_text,
        "what_if": forms.what_if_text,
        "advice": forms.advice_text,
        "dry_run": forms.built_text,
    }
    parts = [forms.plan_text(plan, values), *(formats[key](part) for key, part in asked.items())]
    return "\n\n".join(filter(None, ("\n".join(lines) for lines in parts)))


def search_space(request: PlanRequest) -> SearchSpace:
    """Returns all layouts of a run; with measured rates, only those of its precision and dispatch."""
    config = request.config
    ranks = request.options.ranks or config.parallelism.world_size
    if ranks > MOST_RANKS:
        raise broken("ranks", f"must be at most {MOST_RANKS}", ranks, MOST_RANKS)
    is_measured = isinstance(request.planner.rates, MeasuredRates)
    own = config.precision
    fp8 = own if isinstance(own, Fp8PrecisionConfig) else Fp8PrecisionConfig(kind="fp8", scales="float32")
    precisions: tuple[Precision, ...] = (own,) if is_measured else (fp8, PrecisionConfig(kind="bf16"))
    if untimed := untimed_reason(replace(config, precision=precisions[0]), request.planner.rates):
        raise ConfigError(untimed)
    return SearchSpace(
        config=adapted_run(config, ranks),
        ranks=ranks,
        schedules=tuple(_schedules(config)),
        precisions=precisions,
        recomputes=(config.recompute,) if is_measured else recompute_sets(),
        dispatches=_dispatches(config),
    )


def _schedules(config: TrainConfig) -> Iterator[ScheduleConfig]:
    """Yields every kind of schedule, with slices too if the kind and the task allow them.

    The pairing is that of the kind's option, or of the run if that is its kind.
    """
    slices = {*SLICES, config.schedule.slices} if TASKS.get(config.task.kind).splits_sequences else set[int]()
    for kind, spec in candidates().items():
        schedule = replace(config.schedule, chunks=None, slices=1)
        if kind != schedule.kind:
            pairing: Any = compose.read_option("schedule", kind).get("pairing", schedule.pairing)
            schedule = ScheduleConfig(kind=kind, chunks=None, pairing=pairing)
        yield schedule
        if spec.takes_slices:
            yield from (replace(schedule, slices=number) for number in sorted(slices - {1}))


def _dispatches(config: TrainConfig) -> tuple[DispatchConfig, ...]:
    """Returns the dispatchers with an option, with the run's payload, and the run's own as it is."""
    dispatches: list[DispatchConfig] = []
    for name in DISPATCHERS.names():
        if name == config.dispatch.kind:
            dispatches.append(config.dispatch)
        elif name in compose.options("dispatch"):
            values = compose.read_option("dispatch", name) | {"payload": config.dispatch.payload}
            dispatch: Any = decode(DISPATCHERS.get(name).config, values, "dispatch")
            dispatches.append(dispatch)
    return tuple(dispatches)


@dataclass(frozen=True, kw_only=True, slots=True)
class ChangedRun:
    """A run with changes."""

    change: str
    config: TrainConfig
    planner: PlannerConfig


def read_what_ifs(request: PlanRequest) -> tuple[ChangedRun, ...]:
    """Returns the runs of a request's what-ifs; an invalid one has one message for all causes."""
    runs = []
    for item in request.options.what_if:
        try:
            runs.append(changed_run(request, item))
        except compose.user_errors() as error:
            message = str(error)
            text = message if message.startswith(item) and item else f"{item or repr(item)}: {message}"
            raise ConfigError(f"what_if: {text}{_as_in_run(request, message)}") from error
    return tuple(runs)


def plan_what_if(request: PlanRequest, base: JobPlan, run: ChangedRun, *, keeps_order: bool = False) -> dict[str, Any]:
    """Plans a changed run, and compares it with the run, as plain values.

    If the order and the cut of the run apply, they are planned too, and the better plan is returned; with
    `keeps_order`, they are the only ones.
    """
    try:
        ordered = plan_with_order(base, request.config, run.config, run.planner)
        plans = [] if ordered is None else [ordered]
        if ordered is None or not keeps_order:
            plans.append(plan_job(run.config, run.planner))
    except compose.user_errors() as error:
        raise ConfigError(f"what_if: {run.change}: {error}") from error
    best = min(plans, key=lambda plan: (not plan.fits, plan.timed.time.step if plan.timed is not None else 0.0))
    note = unmeasured_note(request.config, run.config, run.planner.rates)
    return forms.what_if_values(run.change, base, best, note)


def advise_hardware(request: PlanRequest, base: JobPlan) -> dict[str, Any]:
    """Returns what better hardware would gain for a run that keeps its order and its cut if they apply."""
    require_time(base)
    rows = []
    unknown = []
    for wish in wishes(request.config, request.planner.rates):
        needs = wish.needs
        if wish.change:
            try:
                run = changed_run(request, wish.change)
                values = plan_what_if(request, base, run, keeps_order=True)
                fits = values["fits"] if wish.has_memory and values["capacity_bytes"] is not None else None
                rows.append({"wish": wish.name, **values, "fits": fits, "note": wish.note or None})
                continue
            except compose.user_errors() as error:
                needs = f"another run; {wish.change} is refused: {error}"
        unknown.append({"wish": wish.name, "needs": needs})
    rows.sort(key=lambda row: (row["gain"] is None, -(row["gain"] or 0.0)))
    return {"rows": rows, "unknown": unknown, **link_balance(base.config, request.planner.rates)}


def _as_in_run(request: PlanRequest, message: str) -> str:
    """Returns the value of the run as the end of a message that names no valid value, or nothing."""
    if re.search(r"nearest|valid|did you mean|write|least is|options:", message):
        return ""
    key = message.partition(":")[0]
    run_values = dict(compose.dotted_keys({**request.values}))
    if key not in run_values or isinstance(run_values[key], dict | list):
        return ""
    value = "null" if run_values[key] is None else run_values[key]
    return f"; valid: {key}={value}, as in the run"


def changed_run(request: PlanRequest, item: str) -> ChangedRun:
    """Returns a run with changes, which passes the rules."""
    chosen: list[str] = []
    others: list[Change] = []
    for change in parse_changes(item):
        if change.key in _output_keys():
            raise ConfigError(f"{change}: {change.key} is not part of the run; nearest valid: {EXAMPLE}")
        if (group := _group_of(change)) is None:
            others.append(change)
        else:
            chosen.append(group)
    values = _with_model_keys(_with_options(request, chosen) if chosen else request.values, others)
    typed = write_config(request.config) | encode(request.planner)
    changed = changed_values(values, typed, others)
    run_values = {key: value for key, value in changed.items() if key not in PLANNER}
    list(make_validation_whole(run_values))
    run = run_config(run_values)
    return ChangedRun(change=item, config=run, planner=planner_config(changed))


def _output_keys() -> list[str]:
    return [key for key in compose.own_keys("plan") if key not in PLANNER]


def _group_of(change: Change) -> str | None:
    """Returns the override that chooses an option of a group, for a change of a group or of its `kind`."""
    groups = compose.default_groups("plan")
    group = change.key.replace(".", "/")
    of_kind = change.key.endswith(".kind") and (parent := group.rpartition("/")[0]) in groups
    if group not in groups and not of_kind:
        return None
    group = parent if of_kind else group
    names = compose.options(group)
    if change.operator != "=":
        raise ConfigError(f"{change}: {change.key} is not a number; nearest valid: {change.key}={names[0]}")
    value = change.operand.strip("'\"")
    if not of_kind:
        return f"{group}={value}"
    kinds = {name: compose.read_option(group, name).get("kind") for name in names}
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
    groups = {compose.key_of(text) for text in overrides}
    output = _output_keys()
    other_overrides = [text for text in request.overrides if compose.key_of(text) not in groups]
    try:
        values = compose_plan([*other_overrides, *overrides])
    except UnknownKeyError:
        prefixes = tuple(f"{group.replace('/', '.')}." for group in groups)
        others = [text for text in other_overrides if not compose.key_of(text).lstrip("+").startswith(prefixes)]
        values = compose_plan([*others, *overrides])
    for text in overrides:
        _drop_other_keys(values, *text.split("=", 1))
    return {key: value for key, value in values.items() if key not in output}


def _drop_other_keys(values: dict[str, Any], group: str, option: str) -> None:
    """Removes keys of a group's other options, which an experiment set, from the chosen option."""
    *parents, last = group.split("/")
    group_values = values
    for parent in parents:
        group_values = group_values.get(parent, {})
    chosen = group_values.get(last)
    option_values = compose.read_option(group, option)
    if not isinstance(chosen, Mapping) or "kind" not in option_values:
        return
    others = {key for name in compose.options(group) for key in compose.read_option(group, name)} - option_values.keys()
    group_values[last] = {key: value for key, value in chosen.items() if key not in others}


def _with_model_keys(values: Mapping[str, Any], changes: Sequence[Change]) -> dict[str, Any]:
    """Returns values with all keys of the model, if a change is about one that follows from `model.kind`."""
    model = values.get("model")
    names = [change.key.removeprefix("model.") for change in changes if change.key.startswith("model.")]
    if not isinstance(model, Mapping) or all(name.partition(".")[0] in model for name in names):
        return dict(values)
    expanded = expand_model(model, named_weights(values.get("init_from")), values.get("init_mtp"))
    # A head that is not given follows the task.
    return {**values, "model": {key: value for key, value in expanded.items() if key != "head" or key in model}}


if __name__ == "__main__":
    gc.set_threshold(200_000, 20, 20)  # a plan makes few cycles, and collections took an eighth of its time
    sys.exit(command("plan", main, preview))
