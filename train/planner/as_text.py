"""Formats a plan as lines of text of at most 100 columns. No torch here."""

import re
import textwrap
from collections.abc import Iterator
from itertools import groupby

from train.memory import RankMemory
from train.memory.report import gigabytes, parts
from train.planner.cost import JobCost
from train.planner.job_plan import JobPlan
from train.planner.timing import TimedPlan

COLUMNS = 100
_INDENT = 11
_GB, _MB = 1e9, 1e6
_MEMORY_COLUMNS = (
    "ranks",
    "weights",
    "gradients",
    "optimizer",
    "activations",
    "pending W",
    "buffers",
    "reserve",
    "total",
    "used",
)
_UNIT_GAP = re.compile(r"(?<=\d) (?=(?:s|GB|MB|%|GPU-hours)\b|%)")


def plan_text(plan: JobPlan) -> str:
    """Returns a plan as text. The first line says whether the run fits, and names the largest rank."""
    lines = [_first_line(plan), *_reason_lines(plan), "", *_layout_lines(plan), "", *_memory_lines(plan)]
    if plan.timed is None or plan.cost is None:
        lines += ["", *labeled("time", f"unknown: {plan.untimed}")]
    else:
        lines += ["", *_time_lines(plan.timed), "", *_cost_lines(plan.cost)]
        lines += ["", *labeled("sources", _sources(plan))]
    return "\n".join(lines)


def labeled(label: str, text: str) -> list[str]:
    """Returns lines that start with a label, and continue below its text.

    Args:
        text: any text without line breaks.
    """
    head, room = f"{label:<{_INDENT}}", " " * _INDENT
    # A number stays in the line of its unit: textwrap does not break at a no-break space.
    kept = _UNIT_GAP.sub("\N{NO-BREAK SPACE}", text)
    lines = textwrap.wrap(kept, COLUMNS, initial_indent=head, subsequent_indent=room, break_on_hyphens=False)
    return [line.replace("\N{NO-BREAK SPACE}", " ") for line in lines]


def _weights(number: int) -> str:
    return f"{number / 1e9:,.1f} billion weights" if number >= 1e9 else f"{number / 1e6:,.1f} million weights"


def _flops(number: float) -> str:
    return f"{number / 1e9:,.1f} GFLOP" if number >= 1e9 else f"{number / 1e6:,.1f} MFLOP"


def _first_line(plan: JobPlan) -> str:
    room, worst = plan.config.cluster.memory_bytes, plan.memory.worst
    needs = f"the largest rank, {worst.pipeline_rank}, needs {gigabytes(worst.total)}"
    if room is None:
        return f"{needs}; cluster.memory_bytes, the memory of a device, is not given"
    verdict = "fits" if plan.fits else "does not fit"
    return f"{verdict}: {needs} of {gigabytes(room)}"


def _reason_lines(plan: JobPlan) -> list[str]:
    """Returns the parts of the largest rank, or why the run does not fit and what would."""
    if plan.fits:
        return labeled("largest", f"{parts(plan.memory.worst)}, in GB unless MB is given")
    return [line for reason in plan.reasons for line in labeled("reason", reason)]


def _layout_lines(plan: JobPlan) -> Iterator[str]:
    config, mesh = plan.config, plan.config.parallelism
    batch = config.batch
    yield from labeled(
        "model",
        f"{_weights(plan.parameters)}, {_flops(plan.flops_per_token)} per trained token, {config.precision.kind}",
    )
    yield from labeled(
        "layout",
        f"{mesh.world_size:,} ranks: {mesh.axes()}, experts over {mesh.expert}; "
        f"schedule {config.schedule.kind}, dispatch {config.dispatch.kind}",
    )
    yield from labeled(
        "batch",
        f"{batch.global_sequences:,} sequences of {batch.sequence_length_tokens:,} tokens: in each pipeline "
        f"{config.num_micro_batches} micro-batches of {batch.micro_sequences}",
    )
    yield from labeled("cut", f"{' '.join(map(str, mesh.cut.layers))} layers in the stages")


def _memory_lines(plan: JobPlan) -> Iterator[str]:
    """Yields a table of the ranks' memory at its peak; neighbors of the same sizes share a line."""
    worst, room = plan.memory.worst, plan.config.cluster.memory_bytes
    unit, name = (_GB, "GB") if worst.total >= _GB else (_MB, "MB")
    columns = _MEMORY_COLUMNS if room is not None else _MEMORY_COLUMNS[:-1]
    yield f"memory of the pipeline ranks at their peak, in {name}"
    rows = [list(columns)]
    for cells, held in groupby(plan.memory.ranks, key=lambda rank: [_size(size, unit) for size in _peak_parts(rank)]):
        ranks = list(held)
        first, last = ranks[0].pipeline_rank, ranks[-1].pipeline_rank
        used = [] if room is None else [f"{100 * ranks[0].total / room:.0f} %"]
        rows.append([str(first) if first == last else f"{first}-{last}", *cells, *used])
    widths = [max(len(row[place]) for row in rows) for place in range(len(columns))]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _peak_parts(rank: RankMemory) -> tuple[int, ...]:
    """Returns the bytes of a rank in the order of the columns. All but the last add up to the last."""
    is_reducing = rank.reducing > rank.passes
    passes = rank.cool_down if is_reducing else rank.pipeline
    buffers = rank.weight_codes + passes.exchange + passes.transfers + passes.inside
    buffers += rank.update if is_reducing else 0
    static = (rank.weights, rank.gradients, rank.optimizer)
    return (*static, passes.activations + rank.batch, passes.pending, buffers, rank.reserve, rank.total)


def _size(size: int, unit: float) -> str:
    """Returns a size for a column; what a column of GB would round to nothing is in MB."""
    if unit == _GB and 0 < size < 0.1 * _GB:
        return f"{size / _MB:.1f} MB"
    return f"{size / unit:.1f}" if size else "0"


def _time_lines(timed: TimedPlan) -> Iterator[str]:
    time, spent = timed.time, timed.time.ranks[timed.time.busiest]
    mfu = "" if time.mfu is None else f", MFU {100 * time.mfu:.1f} %"
    yield from labeled("step", f"{time.step:.3f} s, {time.tokens_per_second_per_gpu:,.0f} tokens/s per GPU{mfu}")
    factor = time.step / time.without_factor
    if factor != 1:
        yield from labeled(
            "factor",
            f"{time.without_factor:.3f} s from the rates, x {factor:.3f} for what no rate explains "
            "(efficiency.unexplained)",
        )
    yield from labeled(
        "busiest",
        f"rank {time.busiest}, without the factor: F {spent.forward:.2f} s, B {spent.backward:.2f} s, "
        f"W {spent.weight:.2f} s, F with B {spent.pairs:.2f} s, bubble {spent.bubble:.2f} s, "
        f"optimizer {time.optimizer:.2f} s; {time.exposed_exchange:.2f} s of it are exchange that nothing hides",
    )


def _cost_lines(cost: JobCost) -> Iterator[str]:
    yield f"{'stage':<18}{'billion tokens':>16}{'GPU-hours':>14}{'dollars':>14}{'days':>10}{'kWh':>14}"
    for stage in cost.stages:
        tokens = "-" if stage.tokens is None else f"{stage.tokens / 1e9:,.1f}"
        yield (
            f"{stage.name:<18}{tokens:>16}{_hours(stage.gpu_hours):>14}{_number(stage.dollars):>14}"
            f"{stage.days:>10,.1f}{_number(stage.kilowatt_hours):>14}"
        )
    if len(cost.stages) > 1:
        yield (
            f"{'all':<18}{'':>16}{_hours(cost.gpu_hours):>14}{_number(cost.dollars):>14}"
            f"{sum(stage.days for stage in cost.stages):>10,.1f}{_number(cost.kilowatt_hours):>14}"
        )
    yield from labeled("price", f"{cost.gpu_hours_per_trillion_tokens:,.0f} GPU-hours for a trillion tokens")
    for stage in cost.stages[1:]:
        yield from labeled("note", f"{stage.name}: {stage.note}")
    if cost.goodput is not None:
        failures = f"the job fails once in {cost.goodput.job_mtbf_hours:,.1f} h"
        yield from labeled("goodput", f"{100 * cost.goodput.share:.1f} %, included above: {failures}")


def _sources(plan: JobPlan) -> str:
    return f"format=json and format=html list {len(plan.assumptions)} values behind these figures, with their sources"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:,.2f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.0f}"
