"""Draws, simulates and compares pipeline schedules: `python -m launch.schedule`."""

if not __package__:
    import started_as_file  # type: ignore[import-not-found]  # noqa: F401

import re
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from base.decode import decode
from base.figures import aligned
from base.ranges import PositiveInt
from base.refusal import broken
from base.registry import closest
from dualpipe.api import build, compare
from dualpipe.bounds import Bound
from dualpipe.builder import decode as decode_schedule
from dualpipe.builder import schedules_folder
from dualpipe.draw.entry import TimedSchedule, UnavailableSchedule, kind_of, number, spread
from dualpipe.draw.svg import svg
from dualpipe.draw.text import decode_summary, grid, html, table
from dualpipe.draw.trace import trace
from dualpipe.export import MEGATRON_KINDS, TorchGroups, flag_lines, megatron_flags, torch_csv
from dualpipe.ir import Schedule, ScheduleError, to_json
from dualpipe.passes import ungroup
from dualpipe.registry import FALLBACK, SCHEDULES, ModelCosts, ScheduleConfig, check_size, check_slices
from dualpipe.simulation import simulate
from dualpipe.validate import validate
from launch.cli.entry import command, preview_of, write_output
from launch.cli.help import terminal_columns
from launch.config.compose import compose

# From this number of ranks times micro-batches, the computation takes about half a second or more.
_LONG_WORK = 512
_MOST_COLUMNS = 160  # of a timeline in the terminal
_EXPORTS = {
    "torch": "have one direction with format=torch, as torch holds a stage once",
    "megatron": "be a kind of Megatron's with format=megatron, as Megatron reads no order from a file",
}
"""Formats that other programs run, each with the rule for a kind."""
_REPORT_KINDS = ("1f1b", "zb1p", "dualpipe")
_REPORT_MEANING = (
    "bubble: idle time of a rank; B = I + W; F&B: both overlapped; parameters: copies of the weights; "
    "activations: largest number of a rank, of model/P; simulated: least to greatest of all ranks"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleCommandConfig:
    """Configuration of the command. `conf/schedule.yaml` explains the keys."""

    schedule: ScheduleConfig
    program: Literal["train", "decode"]
    cohorts: PositiveInt | None
    num_ranks: int
    num_micro_batches: int
    costs: ModelCosts
    memory_cap: float | None
    format: Literal["text", "json", "svg", "html", "trace", "torch", "megatron"]
    groups: TorchGroups
    table: Literal["kinds", "report"]
    out: str
    cache_dir: str
    plugins: tuple[str, ...]


def main(overrides: Sequence[str]) -> int:
    """Builds, validates and shows a schedule."""
    config = _read(overrides)
    if config.groups != "none" and config.format != "torch":
        raise broken("groups", f"must be none with format={config.format}", config.groups, "none, or format=torch")
    if config.num_ranks * config.num_micro_batches >= _LONG_WORK:
        size = f"{config.num_ranks} ranks and {config.num_micro_batches} micro-batches"
        print(f"computing schedules of {size}", file=sys.stderr, flush=True)
    write_output(_report_table(config) if config.table == "report" else _shown(config), config.out)
    return 0


def _read(overrides: Sequence[str]) -> ScheduleCommandConfig:
    return decode(ScheduleCommandConfig, compose("schedule", overrides))


def _shown(config: ScheduleCommandConfig) -> str:
    """Returns the schedule that trains, or that decodes, in the configured format."""
    if config.program == "decode":
        return _shown_decoding(config)
    kind = config.schedule.kind
    _check_export(config)
    check_size(FALLBACK if kind == "auto" else kind, config.num_ranks, config.num_micro_batches)
    check_slices(kind, config.num_micro_batches, config.schedule.slices)
    if config.schedule.slice_by != "work":
        rule = "schedule.slice_by: must be work, because costs are those of equal slices"
        raise ScheduleError(f"{rule}, is {config.schedule.slice_by}; nearest: work, or python -m launch.train")
    size: dict[str, Any] = {
        "ranks": config.num_ranks,
        "micro_batches": config.num_micro_batches,
        "costs": config.costs,
        "chunks": config.schedule.chunks,
        "slices": config.schedule.slices,
        "link_depth": config.schedule.link_depth,
        "memory_cap": config.memory_cap,
        "cache_dir": schedules_folder(config.cache_dir),
    }
    compared = compare(**size) if kind == "auto" else None
    if compared is not None:
        kinds = _export_kinds(config.format)
        compared = replace(compared, rows=tuple(row for row in compared.rows if kind_of(row) in kinds))
    built = build(kind, **size) if compared is None else compared.best
    schedule = built.schedule
    validate(schedule)
    if config.schedule.pairing == "sequential":  # a run executes the schedule without overlap
        alone = ungroup(schedule)
        built = replace(built, schedule=alone, simulation=simulate(alone, built.costs))
    match config.format:
        case "json":
            return to_json(schedule)
        case "trace":
            return trace(built.schedule, built.simulation, built.costs)
        case "torch":
            return torch_csv(schedule, config.groups)
        case "megatron":
            return flag_lines(megatron_flags(schedule))
        case "svg":
            return built.draw().render("svg")
    compared = compared or compare(**size)
    others = [
        row for row in compared.rows if isinstance(row, UnavailableSchedule) or row.schedule.ranks != schedule.ranks
    ]
    if config.format == "html":
        return html([built, *others])
    rows = [built if row not in others else row for row in compared.rows]
    rows = rows if built in rows else [built, *rows]
    window = None if config.out else terminal_columns(_MOST_COLUMNS)
    reason = [f"auto: {compared.reason}"] if kind == "auto" else []
    return "\n".join([table(rows, min(window or 100, 100)), *reason, "", built.draw(window).render("text")])


def _export_kinds(form: str) -> list[str]:
    """Returns the kinds that a format can have; torch holds each stage on one rank."""
    if form == "megatron":
        return list(MEGATRON_KINDS)
    return [name for name, spec in SCHEDULES.items() if form != "torch" or not spec.is_bidirectional()]


def _check_export(config: ScheduleCommandConfig) -> None:
    """Rejects what the program of a format has no operations for."""
    if config.format not in _EXPORTS:
        return
    kind = config.schedule.kind
    form = config.format
    kinds = _export_kinds(form)
    if kind != "auto" and SCHEDULES.current_name(kind) not in kinds:
        limits = {name: SCHEDULES.get(name).limit for name in kinds}
        valid = [name for name, limit in limits.items() if limit(config.num_ranks, config.num_micro_batches) is None]
        near = " or ".join(f"schedule={name}" for name in (*(closest(kind, valid) or valid)[:1], "auto"))
        raise broken("schedule", f"must {_EXPORTS[form]}", kind, near)
    if config.schedule.slices > 1:
        raise broken(
            "schedule.slices", f"must be 1 with format={form}, whose sequences are whole", config.schedule.slices, 1
        )
    if config.costs.offload is not None:
        rule = f"must be null with format={form}, which copies no activations"
        raise broken("costs.offload", rule, config.costs.offload, "null")
    if form == "megatron" and config.memory_cap is not None:
        rule = "must be null with format=megatron, as Megatron's order has its own peak"
        raise broken("memory_cap", rule, config.memory_cap, "null")
    if form == "megatron" and config.costs.stages:
        rule = "must be empty with format=megatron, as only a plan has layers to cut"
        raise broken("costs.stages", rule, [*config.costs.stages], "[], or python -m launch.plan format=megatron")


def _report_table(config: ScheduleCommandConfig) -> str:
    """Returns table 2 of the report (arXiv:2412.19437), as formulas and as simulated values."""
    rule = "must have its default with table=report, which compares " + ", ".join(_REPORT_KINDS)
    for key, value, default in (
        ("schedule", config.schedule.kind, "dualpipe_interleaved"),
        ("schedule.chunks", config.schedule.chunks, None),
        ("schedule.slices", config.schedule.slices, 1),
        ("program", config.program, "train"),
        ("format", config.format, "text"),
        ("memory_cap", config.memory_cap, None),
        ("costs.offload", config.costs.offload, None),
    ):
        if value != default:
            raise broken(key, rule, value, "null" if default is None else default)
    ranks = config.num_ranks
    batches = config.num_micro_batches
    costs = config.costs
    holds = {
        "no exchange": (costs.exchange == 0, "costs.exchange"),
        "no latency": (costs.latency == 0, "costs.latency"),
        "F = I >= W": (costs.forward == costs.backward_input >= costs.backward_weight, "costs of F, I and W"),
        "W <= F": (costs.backward_weight <= costs.forward, "costs.backward_weight"),
        "W <= I": (costs.backward_weight <= costs.backward_input, "costs.backward_weight"),
        "equal stages": (not costs.stages, "costs.stages"),
    }
    header = ("schedule", "bubble", "= formula", "simulated", "parameters", "activations", "= formula", "simulated")
    rows = [header]
    notes = []
    check_size("1f1b", ranks, batches)
    for kind in _REPORT_KINDS:
        limit = SCHEDULES.get(kind).limit(ranks, batches)
        if limit is not None:
            value = {"num_ranks": ranks, "num_micro_batches": batches}[limit.about]
            raise broken(limit.about, f"schedule '{kind}' {limit.rule}", value, " or ".join(map(str, limit.nearest)))
        built = build(kind, ranks=ranks, micro_batches=batches, costs=costs)
        idle = SCHEDULES.get(kind).idle
        assert idle is not None
        directions = built.schedule.num_directions
        formulas = idle.value(ranks, costs), ranks + directions - 1
        simulated = built.simulation.idle, built.simulation.peaks
        bubble, peak = ((number(value), spread(each)) for value, each in zip(formulas, simulated, strict=True))
        rows.append((kind, idle.text, *bubble, f"{directions}x", "P" + "+1" * (directions - 1), *peak))
        if any(number(value) != number(max(each)) for value, each in zip(formulas, simulated, strict=True)):
            assumptions = [*re.split(r", | and ", idle.assumes), "equal stages"]
            causes = [f"{text} (see {holds[text][1]})" for text in assumptions if not holds[text][0]]
            notes.append(f"{kind}: simulated values differ, because the formulas assume {', '.join(causes)}")
    return "\n".join([*aligned(rows, text=(0, 1, 4, 5), gap="  "), *notes, *textwrap.wrap(_REPORT_MEANING, 100)])


def _shown_decoding(config: ScheduleCommandConfig) -> str:
    schedule = _decode_schedule(config)
    validate(schedule, forward_only=True)
    costs = config.costs.of_stages(config.num_ranks, schedule.num_stages)
    simulation = simulate(schedule, costs)
    match config.format:
        case "json":
            return to_json(schedule)
        case "trace":
            return trace(schedule, simulation, costs)
        case "torch" | "megatron":
            rule = "must be another one with program=decode, which other programs cannot run"
            raise broken("format", rule, config.format, "json")
        case "text":
            return "\n".join([grid(schedule, simulation), decode_summary(schedule, simulation)])
    work = max(sum(costs.compute_of(op) for group in groups for op in group) for groups in schedule.ranks)
    bound = Bound(value=work, reason="the computation of the busiest rank")
    if config.format == "svg":
        return svg(schedule, simulation, bound=bound)
    return html([TimedSchedule(schedule=schedule, costs=costs, simulation=simulation, bound=bound)])


def _decode_schedule(config: ScheduleCommandConfig) -> Schedule:
    """Builds the schedule that decodes. By default, 2 cohorts for each rank are in flight."""
    num_ranks = config.num_ranks
    num_micro_batches = config.num_micro_batches
    for name, value in (("num_ranks", num_ranks), ("num_micro_batches", num_micro_batches)):
        if value < 1:
            raise ScheduleError(f"{name}: program=decode needs at least 1, has {value}; nearest: 1")
    spec = SCHEDULES.get(FALLBACK if config.schedule.kind == "auto" else config.schedule.kind)
    placement = spec.placement(num_ranks, spec.chunk_choices(config.schedule.chunks)[0])
    cohorts = config.cohorts or 2 * num_ranks // len(placement)
    rounds, rest = divmod(num_micro_batches, cohorts * len(placement))
    if rest or not rounds:
        total = cohorts * len(placement)
        nearest = " or ".join(str(total * count) for count in (rounds, rounds + 1) if count)
        raise ScheduleError(
            f"num_micro_batches: program=decode with {total} cohorts needs a multiple of them, has "
            f"{num_micro_batches}; nearest: {nearest}"
        )
    return decode_schedule(placement, cohorts, rounds)


preview = preview_of("schedule", _read)

if __name__ == "__main__":
    sys.exit(command("schedule", main, preview))
