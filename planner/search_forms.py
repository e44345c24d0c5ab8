"""Converts searches of layouts to their public JSON form, and formats it as text. No torch here."""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from base.figures import aligned
from planner.forms import INDENT, wrapped
from planner.job_plan import layout_json
from planner.search import FoundLayout, SearchResult
from train.config import TrainConfig

_GB = 1e9
_LAYOUT_COLUMNS = (
    *("pipeline", "data", "context", "expert", "schedule", "chunks", "slices", "micro_batch_sequences"),
    *("precision", "dispatch"),
)


def search_values(result: SearchResult) -> dict[str, Any]:
    """Returns the result of a search as plain values."""
    rejected = [{"layout": group.layout, "reason": group.reason, "count": group.count} for group in result.rejected]
    found = [_found_values(layout, result.run) for layout in result.found]
    return {"candidates": found, "rejected": rejected, "counts": result.counts}


def _found_values(layout: FoundLayout, run: TrainConfig) -> dict[str, Any]:
    time = layout.time
    speed = {"tokens_per_second_per_gpu": time.tokens_per_second_per_gpu, "mfu": time.mfu}
    return {
        "layout": layout_json(layout.config),
        "memory": {"peak_bytes": layout.peak_bytes},
        "time": {"step_seconds": time.step, "error": layout.error, **speed},
        "cost": layout.cost,
        "pareto": layout.is_pareto,
        "extended": layout.is_extended,
        "measured": layout.is_measured,
        "overrides": list(layout_overrides(layout.config, run, measures=layout.is_measured)),
    }


def layout_overrides(config: TrainConfig, run: TrainConfig, *, measures: bool = False) -> Iterator[str]:
    """Yields the overrides that turn a run into a layout; `schedule=auto` if it `measures`."""
    mesh = config.parallelism
    batch = config.batch
    schedule = config.schedule
    yield f"parallelism.pipeline={mesh.pipeline}"
    yield f"parallelism.data={mesh.data}"
    yield f"parallelism.expert={mesh.expert}"
    if mesh.context != run.parallelism.context:
        yield f"parallelism.context={mesh.context}"
    yield f"parallelism.cut=[{','.join(map(str, mesh.cut.layers))}]"
    yield f"schedule={'auto' if measures else schedule.kind}"
    yield f"schedule.pairing={schedule.pairing}"
    if schedule.slices > 1 or run.schedule.slices > 1:
        yield f"schedule.slices={schedule.slices}"
    yield f"batch.micro_sequences={batch.micro_sequences}"
    if batch.global_sequences != run.batch.global_sequences:
        yield f"batch.global_sequences={batch.global_sequences}"
        yield f"task.steps={config.task.steps}"
    if config.validation.sequences != run.validation.sequences:
        yield f"validation.sequences={config.validation.sequences}"
    if batch.ramp != run.batch.ramp:
        yield "batch.ramp=null"
    if config.precision != run.precision:
        yield f"precision={config.precision.kind}"
    if config.recompute != run.recompute:
        yield f"recompute=[{','.join(config.recompute)}]"
    if config.dispatch != run.dispatch:
        yield f"dispatch={config.dispatch.kind}"
        yield f"dispatch.payload={config.dispatch.payload}"


def search_text(values: Mapping[str, Any], given_sequences: int, sequences: int) -> list[str]:
    """Returns the result of a search as lines of at most 100 columns, except those of overrides."""
    counts = values["counts"]
    layouts = values["candidates"]
    lines = [_search_line(layouts, counts), *values.get("notes", ())]
    if given_sequences != sequences:
        lines.append(f"batch: {given_sequences:,} sequences cannot be divided; all layouts have {sequences:,}")
    lines.append(
        f"{counts['rejected']:,} rejected, {counts['dropped']:,} dropped as slower, {counts['built']:,} schedules built"
    )
    if counts["open"]:
        least = f"at best {counts['open_seconds']:.3f} s a step; compare one with launch.plan"
        lines += wrapped(f"{counts['open']:,} not compared, because that takes too long: {least}")
    lines.append("")
    if layouts:
        lines += [*_found_lines(layouts), "", "* on the front: no layout is as fast with less memory"]
        if any(layout["extended"] for layout in layouts):
            lines.append("~ from a short order, with more of its steady state; launch.plan builds the whole order")
        lines += [*_tie_lines(layouts), ""]
        lines += [f"{number}: {shlex.join(layout['overrides'])}" for number, layout in enumerate(layouts, start=1)]
        lines.append("")
    lines.append(f"rejected: {counts['rejected']:,} layouts")
    for group in values["rejected"]:
        lines += wrapped(f"{group['count']:>9,}  {group['reason']}", others=" " * INDENT)
    return lines


def _search_line(found: Sequence[Mapping[str, Any]], counts: Mapping[str, Any]) -> str:
    if found:
        layout = found[0]["layout"]
        step = found[0]["time"]["step_seconds"]
        axes = f"pipeline {layout['pipeline']} x data {layout['data']}"
        axes += f" x context {layout['context']}" if layout["context"] > 1 else ""
        best = f"best of {counts['layouts']:,} layouts"
        if counts["open"]:
            best = f"best found, {counts['open']:,} of {counts['layouts']:,} open"
        kind = layout["schedule"].replace("interleaved", "inter.")
        return f"{best}: {axes}, expert {layout['expert']}, {kind}: {step:.3f} s"
    if counts["open"]:
        return f"none found: {counts['rejected']:,} of {counts['layouts']:,} are ruled out, {counts['open']:,} are open"
    return f"no layout of {counts['layouts']:,} fits"


def _tie_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns which layouts tie with the fastest, within the error bar of its step."""
    step, error = found[0]["time"]["step_seconds"], found[0]["time"]["error"]
    if error is None:
        return []
    steps = [layout["time"]["step_seconds"] for layout in found]
    ties = [str(number) for number, other in enumerate(steps, 1) if other <= step * (1 + error)]
    bar = f"error bar of a step: {100 * error:.0f} %, {step * error:.2g} s for layout 1"
    return wrapped(f"{bar}; within it, {', '.join(ties)} are ties" if len(ties) > 1 else bar)


def _found_lines(found: Sequence[Mapping[str, Any]]) -> list[str]:
    names = {name: name for name in _LAYOUT_COLUMNS} | {"micro_batch_sequences": "micro"}
    for name in ("context", "slices"):
        if all(layout["layout"][name] == 1 for layout in found):
            del names[name]
    rows = [["", *names.values(), "GB", "step s", "GPU-hours"]]
    for number, layout in enumerate(found, start=1):
        cells = [str(layout["layout"][name]).replace("interleaved", "inter.") for name in names]
        hours = "-" if layout["cost"] is None else f"{layout['cost']['gpu_hours']:,.0f}"
        size = f"{layout['memory']['peak_bytes'] / _GB:.1f}"
        step = f"{'~' * layout['extended']}{layout['time']['step_seconds']:.3f}"
        rows.append([f"{number}{'*' if layout['pareto'] else ' '}", *cells, size, step, hours])
    return aligned(rows, gap=" ")
