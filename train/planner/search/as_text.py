"""Formats the result of a search as text. No torch here."""

from collections.abc import Iterator, Sequence

from train.planner.as_json import layout_json
from train.planner.search.as_json import layout_overrides
from train.planner.search.result import FoundLayout, SearchResult

_GB = 1e9
_COLUMNS = 100


def search_text(result: SearchResult) -> str:
    """Returns a result as lines of at most 100 columns, except those of overrides."""
    lines = [_first_line(result), *_notes(result), ""]
    if result.found:
        lines += [*_table(result.found), "", "* on the front: no layout is as fast with less memory", ""]
        for number, found in enumerate(result.found, start=1):
            lines += [f"{number}: {' '.join(map(_quoted, layout_overrides(found.config, result.run)))}"]
        lines.append("")
    lines += [f"rejected: {result.counts.rejected:,} layouts"]
    lines += [line for group in result.rejected for line in _wrapped(f"{group.count:>9,}  {group.reason}", 11)]
    return "\n".join(lines)


def _first_line(result: SearchResult) -> str:
    counts = result.counts
    if not result.found:
        return f"no layout of {counts.layouts:,} fits"
    best = result.found[0]
    mesh = best.config.parallelism
    return (
        f"best of {counts.layouts:,} layouts: {mesh.axes()}, expert {mesh.expert}, "
        f"{best.config.schedule.kind}: {best.time.step:.3f} s"
    )


def _notes(result: SearchResult) -> Iterator[str]:
    counts, batch = result.counts, result.config.batch
    if batch.global_sequences != result.run.batch.global_sequences:
        yield (
            f"batch: {result.run.batch.global_sequences:,} sequences cannot be divided; all layouts have "
            f"{batch.global_sequences:,}"
        )
    yield (f"{counts.rejected:,} rejected, {counts.dropped:,} dropped by bounds, {counts.built:,} schedules built")
    if counts.open_seconds is not None:
        yield from _wrapped(
            f"{counts.open:,} not compared, because their schedules take too long to build: at best "
            f"{counts.open_seconds:.3f} s a step; compare one with launch.plan",
            0,
        )


def _table(found: Sequence[FoundLayout]) -> Iterator[str]:
    shared = ("context",) if any(each.config.parallelism.context > 1 for each in found) else ()
    header = (
        *("", "pipeline", "data", *shared, "expert", "schedule", "chunks", "micro", "precision", "dispatch"),
        *("GB", "step s", "GPU-hours"),
    )
    rows: list[tuple[str, ...]] = [header]
    for number, each in enumerate(found, start=1):
        layout = layout_json(each.config)
        hours = "-" if each.cost is None else f"{each.cost.gpu_hours:,.0f}"
        layout["schedule"] = layout["schedule"].replace("interleaved", "inter.")
        names = ("schedule", "chunks", "micro_batch_sequences", "precision", "dispatch")
        cells = [str(layout[name]) for name in ("pipeline", "data", *shared, "expert", *names)]
        mark = f"{number}{'*' if each.is_pareto else ' '}"
        rows.append((mark, *cells, f"{each.peak_bytes / _GB:.1f}", f"{each.time.step:.3f}", hours))
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    for row in rows:
        yield " ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))


def _quoted(override: str) -> str:
    return f"'{override}'" if "[" in override else override


def _wrapped(line: str, indent: int) -> Iterator[str]:
    """Yields a line in parts of at most 100 columns; all but the first are indented."""
    words, current = line.split(" "), ""
    for word in words:
        joined = f"{current} {word}" if current else word
        if len(joined) > _COLUMNS and current.strip():
            yield current
            current = " " * indent + word
        else:
            current = joined
    yield current
