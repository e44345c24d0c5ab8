"""Plans a run before it is started: memory, time, cost, layouts and hardware: `python -m launch.plan`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from launch.config.errors import system_errors
from launch.config.memory_rules import check_memory
from launch.config.output import write_output
from launch.config.rules import check_rules
from launch.config.run_config import write_config
from launch.help.command import command, plain_text
from launch.planning.advice import advise_hardware
from launch.planning.request import PlanRequest, read_request
from launch.planning.search import search_request
from launch.planning.what_if import plan_what_if, read_what_ifs
from train.config.decode import encode
from train.config.errors import ConfigError
from train.planner.advice.shown import PlanSection, advice_section, what_if_section
from train.planner.as_json import plan_json
from train.planner.as_text import plan_text
from train.planner.dry_run import built_json, built_lines, compare_built_ranks
from train.planner.job_plan import JobPlan, plan_job
from train.planner.measured.compare import Comparison, compared_plan
from train.planner.measured.shown import comparison_json, comparison_text
from train.planner.page.page import plan_page
from train.planner.search.as_json import search_json
from train.planner.search.as_text import search_text
from train.planner.search.result import SearchResult


def main(overrides: Sequence[str]) -> int:
    """Plans a run and prints the plan.

    Args:
        overrides: overrides for `conf/plan.yaml`: the keys of `conf/train.yaml`, rates, and what is planned.

    Returns:
        The exit code, 0, also if the run does not fit.

    Raises:
        ConfigError, ScheduleError, CutError: an invalid configuration, or a file that cannot be written.
    """
    with system_errors():
        request = read_request(overrides)
        if request.options.search:
            write_output(_shown_search(search_request(request), request), request.options.out)
            return 0
        changed = read_what_ifs(request)
        if request.options.run is None:
            plan, sections = with_advice(plan_job(request.config, request.planner)), list[PlanSection]()
        else:
            plan, comparison = compared_plan(request.config, request.planner, Path(request.options.run))
            sections = [_compared_section(comparison)]
        sections.append(what_if_section([plan_what_if(request, plan, run) for run in changed]))
        if request.options.advice:
            sections.append(advice_section(advise_hardware(request, plan)))
        built = compare_built_ranks(plan.config) if request.options.dry_run else ()
        if built:
            sections.append(PlanSection(key="dry_run", value=built_json(built), lines=tuple(built_lines(built))))
        write_output(_shown(plan, sections, request), request.options.out)
    for kind in built:
        if kind.differences:
            raise ConfigError(f"dry_run: rank {kind.pipeline_ranks[0]}: {kind.differences[0]}")
    return 0


def preview(overrides: Sequence[str]) -> str:
    """Returns the composed, checked configuration as YAML.

    Args:
        overrides: overrides for `conf/plan.yaml`.

    Raises:
        ConfigError, ScheduleError, CutError: an invalid configuration.
    """
    request = read_request(overrides)
    own = {**encode(request.options), "rates": encode(request.planner.rates)}
    values = {**write_config(request.config), **own, "efficiency": encode(request.planner.efficiency)}
    return plain_text("plan", values)


def with_advice(plan: JobPlan) -> JobPlan:
    """Returns a plan whose reasons name the nearest change that fits."""
    if plan.fits:
        return plan
    try:
        check_memory(replace(plan.config, plan=replace(plan.config.plan, check=True)), check_rules)
    except ConfigError as error:
        return replace(plan, reasons=(str(error),))
    return plan


def _compared_section(comparison: Comparison) -> PlanSection:
    lines = comparison_text(comparison).splitlines()
    return PlanSection(key="compared", value=comparison_json(comparison), lines=tuple(lines))


def _shown(plan: JobPlan, sections: Sequence[PlanSection], request: PlanRequest) -> str:
    if request.options.format == "text":
        parts = [plan_text(plan), *("\n".join(section.lines) for section in sections)]
        return "\n\n".join(filter(None, parts))
    values = plan_json(plan, request.planner) | {section.key: section.value for section in sections}
    if request.options.format == "html":
        return plan_page(values, plan.timed, request.config.name)
    return json.dumps(values, indent=1)


def _shown_search(result: SearchResult, request: PlanRequest) -> str:
    if request.options.format == "json":
        return json.dumps(search_json(result), indent=1)
    return search_text(result)


if __name__ == "__main__":
    gc.set_threshold(200_000, 20, 20)  # a plan makes few cycles, and collections took an eighth of its time
    sys.exit(command("plan", main, preview))
