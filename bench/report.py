"""Formats measurements as tables with targets, and as plain data."""

import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.contenders import ALONE, OWN_KINDS
from bench.measure import COSTS, Plan, Sample, make_schedule
from bench.overlap import Overlap, OverlapPlan
from dualpipe.simulation import simulate

MOST_OF_SIMULATED = 1.03
MOST_OF_TORCH = {"torch:ScheduleDualPipeV": 0.95, "torch:Schedule1F1B": 0.78}
MOST_CPU = 1.15
MOST_MICROSECONDS = 100.0
MOST_OF_LONGER = 1.15


def machine() -> dict[str, Any]:
    """Returns a description of the machine."""
    return {
        "device": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def sleep_rows(plan: Plan, samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """Returns one row per contender: median seconds of a step, also relative to torch's schedules."""
    rows = []
    for name, own in samples.items():
        simulated = None
        if name in OWN_KINDS:
            schedule = make_schedule(name, plan.num_ranks, plan.num_micro_batches)
            simulated = simulate(schedule, COSTS).makespan * plan.workload.seconds
        row: dict[str, Any] = {
            "contender": name,
            "step_seconds": statistics.median(sample.seconds for sample in own),
            "simulated_seconds": simulated,
            "over_simulated": None if simulated is None else _ratio(own, [simulated] * len(own)),
            "cpu_seconds": statistics.median(sample.cpu_seconds for sample in own),
            "sleeps_per_rank": _same([sum(rank.sleeps.values()) for sample in own for rank in sample.ranks]),
            "slept_seconds_per_rank": statistics.mean(rank.slept_seconds for sample in own for rank in sample.ranks),
        }
        for other in MOST_OF_TORCH:
            if other in samples:
                row[f"over_{other}"] = _ratio(own, [sample.seconds for sample in samples[other]])
        rows.append(row)
    return rows


def products_rows(samples: dict[str, list[Sample]]) -> list[dict[str, Any]]:
    """Returns one row per contender: median CPU seconds of a step, also relative to the blocks alone."""
    alone = [sample.cpu_seconds for sample in samples[ALONE]]
    return [
        {
            "contender": name,
            "step_seconds": statistics.median(sample.seconds for sample in own),
            "cpu_seconds": statistics.median(sample.cpu_seconds for sample in own),
            "cpu_over_alone": statistics.median(
                sample.cpu_seconds / base for sample, base in zip(own, alone, strict=True)
            ),
        }
        for name, own in samples.items()
    ]


def sleep_text(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    lines = [
        f"Step time: {plan.num_ranks} gloo ranks, {plan.num_micro_batches} micro-batches, F, I and W sleep "
        f"{plan.workload.seconds * 1e3:g} ms each, medians of {plan.num_rounds} interleaved rounds",
        f"{'':26}{'step s':>9}{'simulated':>11}{'ratio':>8}{'CPU s':>8}{'sleeps':>8}{'slept s':>9}"
        + "".join(f"{'/ ' + name.removeprefix('torch:Schedule'):>14}" for name in MOST_OF_TORCH),
    ]
    for row in rows:
        own = row["simulated_seconds"] is not None
        lines.append(
            f"{row['contender']:26}{row['step_seconds']:9.3f}{_shown(row['simulated_seconds'], 11)}"
            f"{_shown(row['over_simulated'], 8)}{row['cpu_seconds']:8.2f}{row['sleeps_per_rank']:8d}"
            f"{row['slept_seconds_per_rank']:9.3f}"
            + "".join(_shown(row.get(f"over_{name}") if own else None, 14) for name in MOST_OF_TORCH)
        )
    limits = "".join(f"{f'<= {most}':>14}" for most in MOST_OF_TORCH.values())
    lines.append(f"{'target':26}{'':20}{f'<= {MOST_OF_SIMULATED}':>8}{'':25}{limits}")
    return "\n".join(lines)


def products_text(plan: Plan, rows: Sequence[dict[str, Any]]) -> str:
    work = plan.workload
    alone = next(row for row in rows if row["contender"] == ALONE)
    one = alone["cpu_seconds"] / (3 * plan.num_ranks * plan.num_micro_batches)
    lines = [
        f"CPU time: {plan.num_ranks} gloo ranks, {plan.num_micro_batches} micro-batches of {work.num_rows} rows, "
        f"{work.num_layers} layers of {work.hidden} a rank; one F, I or W {one * 1e3:.1f} ms; "
        f"medians of {plan.num_rounds} interleaved rounds",
        f"{'':26}{'step s':>9}{'CPU s':>9}{'/ blocks alone':>16}",
    ]
    lines += [
        f"{row['contender']:26}{row['step_seconds']:9.3f}{row['cpu_seconds']:9.3f}{row['cpu_over_alone']:16.3f}"
        for row in rows
    ]
    lines.append(f"{'target':26}{'':18}{f'<= {MOST_CPU}':>16}")
    return "\n".join(lines)


def interpreter_text(microseconds: dict[str, float]) -> str:
    """Formats the interpreter's microseconds per operation by schedule."""
    lines = ["Interpreter: stages and links that do nothing, microseconds for an operation of the schedule"]
    lines += [f"{name:26}{value:9.1f}" for name, value in microseconds.items()]
    lines.append(f"{'target':26}{f'< {MOST_MICROSECONDS:g}':>9}")
    return "\n".join(lines)


def overlap_row(plan: OverlapPlan, found: Overlap) -> dict[str, Any]:
    """Returns the data of one dispatcher, in seconds."""
    return {
        "dispatch": plan.dispatch.kind,
        **asdict(found),
        "over_longer": found.over_longer,
        "hidden_share": found.hidden_share,
    }


def overlap_text(plans: Sequence[OverlapPlan], rows: Sequence[dict[str, Any]]) -> str:
    """Formats the table of `overlap_row`s, one per plan."""
    columns = ("compute", "exchange", "in_sequence", "overlapped", "step_in_sequence", "step_overlapped")
    lines = [
        "Overlap: schedule dualpipe, 2 pipeline ranks x 4 data ranks on 4 nodes, expert groups of 4 ranks on 2 nodes, "
        f"{plans[0].num_micro_batches} micro-batches;",
        "exchanges and transfers are real, on links of 200 Mbit/s between nodes and 640 within; "
        "COMPUTATION IS EMULATED BY SLEEPING.",
        f"Seconds of an F&B pair and of a step; medians, interleaved rounds: {plans[0].num_rounds}",
        f"{'':12}{'blocks':>7}{'compute':>9}{'exchange':>10}{'in sequence':>13}{'overlapped':>12}{'/ longer':>10}"
        f"{'hidden':>8}{'step in sequence':>18}{'overlapped':>12}",
    ]
    for plan, row in zip(plans, rows, strict=True):
        compute, exchange, in_sequence, overlapped, step_in_sequence, step_overlapped = (row[name] for name in columns)
        lines.append(
            f"{row['dispatch']:12}{plan.model.blocks_per_stage:7}{compute:9.3f}{exchange:10.3f}"
            f"{in_sequence:13.3f}{overlapped:12.3f}"
            f"{row['over_longer']:10.3f}{row['hidden_share']:8.0%}{step_in_sequence:18.3f}{step_overlapped:12.3f}"
        )
    lines.append(f"{'target':12}{'':51}{f'<= {MOST_OF_LONGER}':>10}")
    return "\n".join(lines)


def _ratio(own: Sequence[Sample], others: Sequence[float]) -> float:
    return statistics.median(sample.seconds / other for sample, other in zip(own, others, strict=True))


def _same(numbers: Sequence[int]) -> int:
    assert len(set(numbers)) == 1, f"ranks or rounds differ: {sorted(set(numbers))}"
    return numbers[0]


def _shown(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.3f}"
