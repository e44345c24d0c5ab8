"""Shows what-ifs and hardware advice as JSON and as text of at most 100 columns. No torch here."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from textwrap import wrap
from typing import Any

from train.planner.advice.advice import AdviceRow, HardwareAdvice
from train.planner.advice.balance import LinkBalance
from train.planner.advice.what_if import WhatIf

_COLUMNS = 100
_NAME = 57


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanSection:
    """A part of a plan that was asked for.

    Attributes:
        key: of the plan's JSON.
        value: in JSON.
        lines: as text; empty to show nothing.
    """

    key: str
    value: Any
    lines: tuple[str, ...]


def what_if_section(what_ifs: Sequence[WhatIf]) -> PlanSection:
    """Returns the part of a plan about what-ifs.

    Args:
        what_ifs: changed runs next to the run.
    """
    lines = tuple(what_if_lines(what_ifs)) if what_ifs else ()
    return PlanSection(key="what_if", value=[what_if_json(what_if) for what_if in what_ifs], lines=lines)


def advice_section(advice: HardwareAdvice) -> PlanSection:
    """Returns the part of a plan about hardware."""
    return PlanSection(key="advice", value=advice_json(advice), lines=tuple(advice_lines(advice)))


def what_if_json(what_if: WhatIf) -> dict[str, Any]:
    """Returns a what-if as plain values.

    Args:
        what_if: a changed run next to the run.
    """
    plan = what_if.plan
    time = None if plan.timed is None else plan.timed.time
    cost = plan.cost
    return {
        "change": what_if.change,
        "step_seconds": None if time is None else time.step,
        "speedup": what_if.speedup,
        "gain": what_if.gain,
        "tokens_per_second_per_gpu": None if time is None else time.tokens_per_second_per_gpu,
        "mfu": None if time is None else time.mfu,
        "gpu_hours": None if cost is None else cost.gpu_hours,
        "gpu_hours_per_trillion_tokens": None if cost is None else cost.gpu_hours_per_trillion_tokens,
        "dollars": None if cost is None else cost.dollars,
        "fits": plan.fits,
        "peak_bytes": plan.memory.worst.total,
        "capacity_bytes": plan.config.cluster.memory_bytes,
        "time_unknown": plan.untimed or None,
    }


def advice_json(advice: HardwareAdvice) -> dict[str, Any]:
    """Returns hardware advice as plain values."""
    balance = advice.balance
    return {
        "rows": [
            {"wish": row.wish.name, **what_if_json(row.what_if), "fits": row.fits, "note": row.wish.note or None}
            for row in advice.rows
        ],
        "unknown": [{"wish": wish.name, "needs": wish.needs} for wish in advice.unknown],
        "exchange_over_compute": balance.ratio,
        "exchange_seconds_per_layer": balance.exchange_seconds,
        "compute_seconds_per_layer": balance.compute_seconds,
        "hidden": balance.hidden,
        "limit": balance.limit,
        "inter_node_bytes_per_second": balance.link_bytes_per_second,
        "break_even_bytes_per_second": balance.break_even_bytes_per_second,
        "link_over_break_even": balance.margin,
    }


def what_if_lines(what_ifs: Sequence[WhatIf]) -> Iterator[str]:
    """Yields a table of what-ifs in their order.

    Args:
        what_ifs: changed runs next to the run.
    """
    yield _line("what if", "step s", "speedup", "GPU-hours", "fits")
    for what_if in what_ifs:
        yield from _row(what_if.change, what_if, fits=what_if.plan.fits)


def advice_lines(advice: HardwareAdvice) -> Iterator[str]:
    """Yields hardware advice: the balance, a table of computed wishes, and unknown wishes."""
    yield from _balance_lines(advice.balance)
    yield ""
    yield _line("hardware", "step s", "gain", "GPU-hours", "fits")
    for row in advice.rows:
        yield from _advice_row(row)
    yield ""
    yield "not computed, with what would have to be known:"
    for wish in advice.unknown:
        yield from wrap(f"{wish.name}: {wish.needs}", _COLUMNS, initial_indent="  ", subsequent_indent="    ")


def _balance_lines(balance: LinkBalance) -> Iterator[str]:
    milliseconds = f"{1e3 * balance.exchange_seconds:.2f} ms, computation {1e3 * balance.compute_seconds:.2f} ms"
    yield f"balance    a MoE layer's F and B: exchange {milliseconds}: {balance.ratio:.2f}; hidden: {balance.hidden}"
    link, even, margin = balance.link_bytes_per_second, balance.break_even_bytes_per_second, balance.margin
    if link is None or even is None or margin is None:
        if link is None:
            yield "break-even unknown; cluster.inter_node_bytes_per_second is null"
            return
        yield f"break-even none for the link between nodes; the exchange is limited by: {balance.limit}"
        return
    side = f"{margin:.2f} x faster" if margin >= 1 else f"{1 / margin:.2f} x slower"
    yield f"break-even {even / 1e9:.1f} GB/s between nodes: below it, exchange is longer than computation;"
    yield f"           the link has {link / 1e9:.1f} GB/s, {side}; the exchange is limited by: {balance.limit}"


def _advice_row(row: AdviceRow) -> Iterator[str]:
    yield from _row(row.wish.name, row.what_if, fits=row.fits, is_gain=True)
    note = f"   ({row.wish.note})" if row.wish.note else ""
    yield from wrap(f"{row.what_if.change}{note}", _COLUMNS, initial_indent="  ", subsequent_indent="    ")


def _row(name: str, what_if: WhatIf, *, fits: bool | None, is_gain: bool = False) -> Iterator[str]:
    """Yields a row of a table; a long name takes several lines."""
    plan = what_if.plan
    step = "-" if plan.timed is None else f"{plan.timed.time.step:.3f}"
    hours = "-" if plan.cost is None else _hours(plan.cost.gpu_hours)
    speedup = "-" if what_if.speedup is None else f"{what_if.speedup:.3f}"
    # Without the sign of a rounded zero.
    gain = "-" if what_if.gain is None else f"{round(100 * what_if.gain, 1) + 0.0:+.1f} %"
    verdict = "-" if fits is None or plan.config.cluster.memory_bytes is None else "yes" if fits else "no"
    *above, last = wrap(name, _NAME, subsequent_indent="  ", break_on_hyphens=False)
    yield from above
    yield _line(last, step, gain if is_gain else speedup, hours, verdict)


def _line(name: str, step: str, gain: str, hours: str, fits: str) -> str:
    return f"{name:<{_NAME}}{step:>12}{gain:>10}{hours:>14}{fits:>7}"


def _hours(hours: float) -> str:
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2f}"
