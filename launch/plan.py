"""Plans a run before it is started: memory, time, cost, layouts and hardware: `python -m launch.plan`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import gc

if __name__ == "__main__":  # before the imports, which make cycles that stay
    gc.set_threshold(200_000, 20, 20)  # collections took an eighth of the time of a plan

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from base.decode import decode, encode
from base.refusal import ConfigError, broken
from comm.balance.rows import Ints
from comm.config import DispatchConfig
from comm.dispatch.registry import DISPATCHERS
from dualpipe.api import Drawing
from dualpipe.export import flag_lines, megatron_flags, megatron_layout
from dualpipe.registry import ScheduleConfig, candidates
from infer.deployment import deployment_text, deployment_values
from launch.cli.entry import command, preview_of, write_output
from launch.config import compose
from launch.config.folder import read_folder
from launch.config.memory import check_memory
from launch.config.rules import check_rules
from launch.config.run import write_config
from launch.plan_request import PlanRequest, changed_run, read_request
from planner import forms
from planner.advice import link_balance, plan_with_order, wishes
from planner.balance import GivenLoads, balance_text, balance_values, read_counts
from planner.job_plan import (
    JobPlan,
    compare_built_ranks,
    compared_plan,
    plan_job,
    require_time,
    unmeasured_note,
    untimed_reason,
)
from planner.layouts import MOST_RANKS, SearchSpace, adapted_run, recompute_sets
from planner.page import plan_page
from planner.published_runs import (
    PublishedFit,
    PublishedRun,
    fitted_values,
    halves,
    overrides_of,
    published_fit,
    published_runs,
    published_text,
    row_values,
)
from planner.rollouts import compare_rollouts
from planner.search import search_layouts
from planner.search_forms import search_text, search_values
from planner.smallest import smallest_text, smallest_values
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig
from train.predict.cut import run_cut
from train.predict.timing import SLICES, MeasuredRates
from train.report.micro_batches import read_micro_batch_loads
from train.tasks.registry import TASKS

# Two epochs of the report's 1.5M conversations of 1,000 tokens, which is a guess, in batches of 1,024 x 4,096 tokens.
_SFT_STEPS = 715
REPORT_PHASES: Mapping[str, tuple[int, tuple[str, ...], str]] = {
    "pre-training": (
        2_664_000,
        ("v3_671b",),
        "the recipe has another order and cut; schedule=dualpipe parallelism.cut=even plans those of the report",
    ),
    "context extension": (
        119_000,
        ("v3_32k", "v3_128k"),
        "the published layout is unknown; to fit the memory, the recipes have memory_cap=12, which leaves few F and B "
        "to overlap, and v3_128k recomputes layers",
    ),
    "post-training": (
        5_000,
        (f"v3_sft task.epochs=null task.steps={_SFT_STEPS}", "v3_grpo"),
        "the published layout, steps and lengths are unknown; 1,000 tokens for each of 1.5M conversations are a guess, "
        "and v3_grpo has the steps and samples of R1 and answers of the maximum length",
    ),
}
"""By phase: GPU-hours of table 1 (arXiv:2412.19437), overrides of the recipes, and what a difference is due to."""

_MEGATRON_PARTS = {"norm": "layernorm", "mla_up": "mla_up_proj", "swiglu": "moe_act"}
_MEGATRON_LAYER = ("layernorm", "mla_up_proj", "mlp", "moe")
"""Megatron-Core's names of what is recomputed, one by one, or of all of a layer but attention."""


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

    def __init__(
        self, values: dict[str, Any], lines: Callable[[], str], others: Mapping[str, Callable[[], str]] | None = None
    ) -> None:
        """Stores values and functions that return the other forms; only the plan of one run has more than two."""
        super().__init__({"text": lines, "json": lambda: json.dumps(values, indent=1), **(others or {})})
        self.values = values


def answer_request(request: PlanRequest) -> PlanAnswer:
    """Plans what a request asks for."""
    if request.options.deployment is not None:
        run = request.config
        sizes = deployment_values(run.model, run.cluster, run.precision.kind, request.options.deployment)
        return PlanAnswer(sizes, lambda: deployment_text(sizes))
    if request.options.report_costs:
        costs = report_costs()
        return PlanAnswer(costs, lambda: "\n".join(forms.report_costs_text(costs)))
    if request.options.published is not None:
        return _published(request.options.published)
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


def report_costs() -> dict[str, Any]:
    """Returns the GPU-hours of each phase of DeepSeek-V3: published, and planned with the recipes."""
    phases = []
    for name, (published, recipes, note) in REPORT_PHASES.items():
        parts = {}
        for recipe in recipes:
            run = read_request(f"experiment={recipe}".split())
            cost = plan_job(run.config, run.planner).cost
            assert cost is not None
            parts[recipe] = cost["stages"][0]["gpu_hours"]
        row = {"name": name, "published_gpu_hours": published, "planned_gpu_hours": sum(parts.values())}
        phases.append({**row, "recipes": parts, "note": note})
    return {"phases": phases}


def _published(name: str) -> PlanAnswer:
    """Returns published runs next to their plans, or the factors that fit the plans of one half of them."""
    fit = published_fit()
    rows = [plan_published(key, run, fit) for key, run in published_runs(name).items()]
    if name == "fit":
        fitted = fitted_values(rows)
        return PlanAnswer(fitted, lambda: yaml.safe_dump(fitted, sort_keys=False).rstrip())
    values = {"runs": rows, "halves": [*halves(rows)]}
    return PlanAnswer(values, lambda: "\n".join(published_text(values)))


def plan_published(name: str, run: PublishedRun, fit: PublishedFit) -> dict[str, Any]:
    """Returns a published run next to its plan; an error names the run."""
    try:
        request = read_request(overrides_of(run, fit))
        time = require_time(plan_job(request.config, request.planner)).time
    except compose.user_errors() as error:
        raise ConfigError(f"published/{name}.yaml: {error}") from error
    config = request.config
    if config.parallelism.world_size != run.gpus:
        raise broken(
            f"published/{name}.yaml: gpus", "must be those of overrides", run.gpus, config.parallelism.world_size
        )
    # A published step has all updates on the answers of one round.
    steps = 1 if config.rollout is None else config.rollout.updates
    tokens = time.tokens_per_second_per_gpu * time.step * run.gpus * steps
    return row_values(name, run, fit, tokens, time.step * steps)


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
    if request.options.loads is not None:
        asked["balance"] = balance_values(plan, request.planner, open_loads(request.options.loads))
    if request.options.dry_run:
        asked["dry_run"] = compare_built_ranks(plan.config)
    values = forms.plan_values(plan, request.planner) | {"notes": list(request.notes)} | asked
    page = partial(plan_page, values, plan.timed, request.config.name)
    pages = {"megatron": partial(_megatron_flags, plan), "html": page}
    return PlanAnswer(values, lambda: _plan_lines(plan, values, asked), pages)


def open_loads(loads: GivenLoads) -> float | Iterator[tuple[int, Ints]]:
    """Returns a MaxVio, or layer and rows of each micro-batch in the folder of a run or a file of counts."""
    if isinstance(loads.value, float):
        return loads.value
    path = Path(loads.value)
    return read_micro_batch_loads(path, read_folder(path)) if path.is_dir() else read_counts(path)


def _megatron_flags(plan: JobPlan) -> str:
    """Returns the flags of Megatron-Core for the layout, the cut and the recomputed parts of a plan.

    Raises:
        ConfigError, ScheduleError: if Megatron-Core cannot run the plan.
    """
    config = plan.config
    model = config.model
    sizes = config.parallelism
    schedule = require_time(plan).schedule
    layout = megatron_layout([len(layers) for layers in run_cut(config, schedule.placement)], model.mtp_depth)
    flags = megatron_flags(schedule, layout)
    if config.memory_cap is not None:
        raise broken("memory_cap", "must be null for Megatron, whose order has its own peak", config.memory_cap, "null")
    flags |= {"expert-model-parallel-size": sizes.expert, "context-parallel-size": sizes.context}
    flags |= {"tensor-model-parallel-size": sizes.tensor, "sequence-parallel": ""} if sizes.tensor > 1 else {}
    dense = model.num_dense_layers
    flags |= {"num-layers": model.num_layers, "moe-layer-freq": f"([0]*{dense}+[1]*{model.num_layers - dense})"}
    flags |= {"mtp-num-layers": model.mtp_depth} if model.mtp_depth else {}
    flags |= {"micro-batch-size": config.batch.micro_sequences, "global-batch-size": config.batch.global_sequences}
    # The interleaved order is planned with overlapped exchange, for which Megatron has conditions.
    if schedule.kind != "1f1b" and sizes.expert > 1:
        rule = "with schedule=interleaved_1f1b for Megatron, which overlaps no exchange of others"
        for key, value, is_wrong, near in (
            ("precision", config.precision.kind, config.precision.kind == "float32", "bf16"),
            ("model.mtp_depth", model.mtp_depth, model.mtp_depth > 1, "1"),
            ("recompute", [*config.recompute], "layer" in config.recompute, "[norm, mla_up, swiglu]"),
        ):
            if is_wrong:
                raise broken(key, f"must be another one {rule}", value, near)
        flags |= {"overlap-moe-expert-parallel-comm": "", "delay-wgrad-compute": ""}
    parts = _MEGATRON_LAYER if "layer" in config.recompute else [_MEGATRON_PARTS[part] for part in config.recompute]
    recompute = f"--recompute-granularity selective\n--recompute-modules {' '.join(parts)}"
    return "\n".join([flag_lines(flags), *([recompute] if parts else [])])


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
        "balance": balance_text,
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


def read_what_ifs(request: PlanRequest) -> tuple[PlanRequest, ...]:
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


def plan_what_if(request: PlanRequest, base: JobPlan, run: PlanRequest, *, keeps_order: bool = False) -> dict[str, Any]:
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
    if re.search(r"nearest|valid|did you mean|write|least is|options:|belongs to", message):
        return ""
    key = message.partition(":")[0]
    run_values = dict(compose.dotted_keys({**request.values}))
    if key not in run_values or isinstance(run_values[key], dict | list):
        return ""
    value = "null" if run_values[key] is None else run_values[key]
    return f"; valid: {key}={value}, as in the run"


def _to_plain(request: PlanRequest) -> dict[str, Any]:
    return {**write_config(request.config), **encode(request.options), **encode(request.planner)}


preview = preview_of("plan", read_request, to_plain=_to_plain)

if __name__ == "__main__":
    sys.exit(command("plan", main, preview))
