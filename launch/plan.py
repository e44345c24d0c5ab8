"""Plans a run before it is started: memory, time, cost, layouts and hardware: `python -m launch.plan`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import gc
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from comm.config import DispatchConfig
from comm.dispatch.registry import DISPATCHERS
from dualpipe.registry import ScheduleConfig, candidates
from launch.config.compose import options, read_option, system_errors
from launch.config.memory_rules import check_memory
from launch.config.output import write_output
from launch.config.rules import check_rules
from launch.config.run_config import write_config
from launch.help.command import command, plain_text
from launch.planning.request import PlanRequest, read_request
from launch.planning.what_if import advise_hardware, plan_what_if, read_what_ifs
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError, broken
from train.planner.forms import (
    advice_text,
    built_text,
    comparison_text,
    plan_text,
    plan_values,
    search_text,
    search_values,
    what_if_text,
    what_if_values,
)
from train.planner.job_plan import JobPlan, compare_built_ranks, compared_plan, plan_job, untimed_reason
from train.planner.layouts import MOST_RANKS, SearchSpace, adapted_run, recompute_sets
from train.planner.page import plan_page
from train.planner.search import SearchResult, search_layouts
from train.schedule.timing import MeasuredRates


def main(overrides: Sequence[str]) -> int:
    """Plans a run and prints the plan. Returns exit code 0, also if the run does not fit."""
    with system_errors():
        request = read_request(overrides)
        if request.options.search:
            result = search_layouts(search_space(request), request.config, request.planner, check_rules)
            write_output(_search_output(result, request.options.format), request.options.out)
            return 0
        plan, asked = _planned(request)
        write_output(_plan_output(plan, asked, request), request.options.out)
    for kind in asked.get("dry_run", ()):
        if kind["differences"]:
            raise ConfigError(f"dry_run: rank {kind['pipeline_ranks'][0]}: {kind['differences'][0]}")
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the composed, checked configuration as YAML."""
    request = read_request(overrides)
    planned = {**encode(request.options), "rates": encode(request.planner.rates)}
    values = {**write_config(request.config), **planned, "efficiency": encode(request.planner.efficiency)}
    return plain_text("plan", values)


def _planned(request: PlanRequest) -> tuple[JobPlan, dict[str, Any]]:
    """Returns the plan of a run, and what was asked for with it, by the keys of the JSON form."""
    asked: dict[str, Any] = {}
    changed = read_what_ifs(request)
    if request.options.run is None:
        plan = with_advice(plan_job(request.config, request.planner))
    else:
        plan, comparison = compared_plan(request.config, request.planner, Path(request.options.run))
        asked["compared"] = comparison.values()
    asked["what_if"] = [what_if_values(plan_what_if(request, plan, run)) for run in changed]
    if request.options.advice:
        asked["advice"] = advise_hardware(request, plan)
    if request.options.dry_run:
        asked["dry_run"] = compare_built_ranks(plan.config)
    return plan, asked


def with_advice(plan: JobPlan) -> JobPlan:
    """Returns a plan whose reasons name the nearest change that fits."""
    if plan.fits:
        return plan
    try:
        check_memory(replace(plan.config, plan=replace(plan.config.plan, check=True)), check_rules)
    except ConfigError as error:
        return replace(plan, reasons=(str(error),))
    return plan


def _plan_output(plan: JobPlan, asked: dict[str, Any], request: PlanRequest) -> str:
    values = plan_values(plan, request.planner)
    match request.options.format:
        case "json":
            return json.dumps(values | asked, indent=1)
        case "html":
            return plan_page(values | asked, plan.timed, request.config.name)
        case "text":
            formats: dict[str, Callable[[Any], Iterable[str]]] = {
                "compared": comparison_text,
                "what_if": what_if_text,
                "advice": advice_text,
                "dry_run": built_text,
            }
            parts = [plan_text(plan, values), *(formats[key](part) for key, part in asked.items())]
            return "\n\n".join(filter(None, ("\n".join(lines) for lines in parts)))


def _search_output(result: SearchResult, form: str) -> str:
    values = search_values(result)
    if form == "json":
        return json.dumps(values, indent=1)
    sequences = (config.batch.global_sequences for config in (result.run, result.config))
    return "\n".join(search_text(values, *sequences))


def search_space(request: PlanRequest) -> SearchSpace:
    """Returns all layouts of a run; with measured rates, only those of its precision and dispatch."""
    config = request.config
    if config.schedule.slices > 1:
        rule = "must be 1 with search=true, which compares layouts of whole sequences"
        raise broken("schedule.slices", rule, config.schedule.slices, "1")
    if request.options.format == "html":
        raise ConfigError("format: must be text or json with search=true, is html; nearest valid: text")
    ranks = request.options.ranks or config.parallelism.world_size
    if ranks > MOST_RANKS:
        raise ConfigError(f"ranks: must be at most {MOST_RANKS}, is {ranks}; nearest valid: {MOST_RANKS}")
    is_measured = isinstance(request.planner.rates, MeasuredRates)
    precisions: tuple[Precision, ...] = (config.precision,)
    if not is_measured:
        is_fp8 = isinstance(config.precision, Fp8PrecisionConfig)
        fp8 = config.precision if is_fp8 else Fp8PrecisionConfig(kind="fp8", scales="float32")
        precisions = (fp8, PrecisionConfig(kind="bf16"))
    if untimed := untimed_reason(replace(config, precision=precisions[0]), request.planner.rates):
        raise ConfigError(untimed)
    return SearchSpace(
        config=adapted_run(config, ranks),
        ranks=ranks,
        schedules=tuple(_schedule(config, kind) for kind in candidates()),
        precisions=precisions,
        recomputes=(config.recompute,) if is_measured else recompute_sets(),
        dispatches=_dispatches(config),
    )


def _schedule(config: TrainConfig, kind: str) -> ScheduleConfig:
    """Returns a kind of schedule with the pairing of its option, or of the run if that is its kind."""
    if kind == config.schedule.kind:
        return replace(config.schedule, chunks=None)
    pairing: Any = read_option("schedule", kind).get("pairing", config.schedule.pairing)
    return ScheduleConfig(kind=kind, chunks=None, pairing=pairing)


def _dispatches(config: TrainConfig) -> tuple[DispatchConfig, ...]:
    """Returns the dispatchers with an option, with the run's payload, and the run's own as it is."""
    dispatches: list[DispatchConfig] = []
    for name in DISPATCHERS.names():
        if name == config.dispatch.kind:
            dispatches.append(config.dispatch)
        elif name in options("dispatch"):
            values = read_option("dispatch", name) | {"payload": config.dispatch.payload}
            other: Any = decode(DISPATCHERS.get(name).config, values, "dispatch")
            dispatches.append(other)
    return tuple(dispatches)


if __name__ == "__main__":
    gc.set_threshold(200_000, 20, 20)  # a plan makes few cycles, and collections took an eighth of its time
    sys.exit(command("plan", main, preview))
