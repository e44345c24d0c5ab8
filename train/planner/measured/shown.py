"""Shows a comparison of plan and run as JSON, as text and as rows of a table. No torch here."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from train.planner.measured.compare import Compared, Comparison

_NAMES = {
    "step": "step",
    "bubble": "bubble",
    "exposed_exchange": "exposed exchange",
    "outside": "outside the passes",
    "memory": "largest peak memory",
}
_UNITS = {"ms": (1e-3, 1), "s": (1.0, 3), "GB": (1e9, 3)}
HEADER = ("", "predicted", "measured", "measured / predicted")


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """Returns a comparison as plain values."""
    memory, last = comparison.memory, comparison.last
    return {
        "run": comparison.folder,
        "num_steps": comparison.num_steps,
        **{f"{each.name}_seconds": _json_of(each) for each in comparison.times},
        "memory_bytes": None if memory is None else _json_of(memory),
        "memory_note": comparison.memory_note or None,
        "factor": comparison.factor,
        "last_steps": None if last is None else {**asdict(last), "difference": last.difference},
    }


def _json_of(compared: Compared) -> dict[str, float | None]:
    return {"predicted": compared.predicted, "measured": compared.measured, "factor": compared.factor}


def comparison_text(comparison: Comparison) -> str:
    """Returns a comparison as lines of text."""
    lines = [
        f"compared with {comparison.num_steps:,} steps of the run, medians over steps and means over ranks:",
        f"{HEADER[0]:<22}{HEADER[1]:>12}{HEADER[2]:>12}{HEADER[3]:>22}",
        *(
            f"{name:<22}{predicted:>12}{measured:>12}{factor:>22}"
            for name, predicted, measured, factor in rows(comparison)
        ),
        *notes(comparison),
    ]
    return "\n".join(lines)


def rows(comparison: Comparison) -> Iterator[tuple[str, str, str, str]]:
    """Yields the cells of a table with the columns `HEADER`."""
    for each in comparison.times:
        yield _cells(each, "ms" if comparison.times[0].measured < 1 else "s")
    if comparison.memory is not None:
        yield _cells(comparison.memory, "GB")


def _cells(compared: Compared, name: str) -> tuple[str, str, str, str]:
    unit, digits = _UNITS[name]
    predicted, measured = (f"{value / unit:,.{digits}f} {name}" for value in (compared.predicted, compared.measured))
    return _NAMES[compared.name], predicted, measured, "-" if compared.factor is None else f"{compared.factor:.3f}"


def notes(comparison: Comparison) -> Iterator[str]:
    """Yields lines about the factor, the last steps and the memory."""
    if comparison.memory_note:
        yield f"peak memory: {comparison.memory_note}"
    yield f"factor that closes the gap of the step: efficiency.unexplained={comparison.factor:.4g}"
    last = comparison.last
    if last is not None:
        yield (
            f"last {last.count} steps: {100 * last.difference:+.1f} % against the prediction with the factor of the "
            f"steps before them"
        )
