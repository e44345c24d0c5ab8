"""Draws a layer's experts: their loads over the run as a heat map, and the router's bias below it."""

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape

import numpy as np
from numpy.typing import NDArray

from train.figures import plain
from train.report.charts import Chart, ChartWriter
from train.report.source import History

_ROW, _LEAST_MAP, _MOST_MAP = 9.0, 96.0, 260.0  # pixels
_LEAST_ROW = 8.0
_MOST_ROW = 22.0
_OVERVIEW = 160.0
_MOST_NAMES = 12
# Load over the mean, from a quarter (or less) to four times (or more), by its logarithm.
_COLD = (33, 99, 201)
_EVEN = (240, 240, 236)
_HOT = (178, 34, 0)
_SHADES = 65
_OCTAVES = 2.0


def overview(history: History, name: str = "") -> str:
    """Returns a map of the latest known loads: layers below each other, experts to the right."""
    latest = next((bucket for bucket in reversed(range(len(history.loads))) if history.loads[bucket]), None)
    if latest is None:
        return ""
    loads = history.loads[latest]
    first = history.firsts[latest]
    last = history.lasts[latest]
    layers = [layer for layer in history.layers() if layer in loads]
    share_RC = np.stack([_share(loads[layer]) for layer in layers])
    rows, experts = share_RC.shape
    height = rows * min(max(_LEAST_ROW, _OVERVIEW / rows), _MOST_ROW)
    steps = f"step {first:,}" + (f" to {last:,}" if last > first else "")
    every = -(-rows // _MOST_NAMES)
    names = [_name(layer) if row % every == 0 else "" for row, layer in enumerate(layers)]
    heat = _heat(relative_shades(share_RC), height, names, is_fixed=True)
    ends = f'<div class="ends"><span>expert 0</span><span>expert {experts - 1}</span></div>'
    return f"<figure><h3>Load of each expert, {steps}{escape(name)}</h3>{heat}{ends}</figure>"


def card(charts: ChartWriter, history: History, layer: str) -> str:
    """Returns a layer's `<figure>`; empty text if nothing is known of it."""
    bias = Chart(
        title=f"{_name(layer)}: bias of the router",
        lines={f"router.{layer}.bias_least": "least bias", f"router.{layer}.bias_most": "greatest bias"},
        colors=[1, 1],
        y="bias",
        from_zero=True,
        is_range=True,
    )
    plot = charts.plot(bias)
    rows = [loads[layer] for loads in history.loads if layer in loads]
    if not rows and not plot:
        return ""
    heat = ""
    if rows:
        experts = len(rows[0])
        height = min(max(experts * _ROW, _LEAST_MAP), _MOST_MAP)
        heat = _heat(relative_shades(_over_time(history, layer, experts)), height, ["expert 0", f"{experts - 1}"])
    return f"<figure><h3>{escape(_name(layer).capitalize())}{_facts(history, layer)}</h3>{heat}{plot}</figure>"


def relative_shades(share_RC: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Palette numbers for loads over their mean; NaN is the mean's."""
    with np.errstate(divide="ignore", invalid="ignore"):
        octaves = np.log2(share_RC)
    octaves = np.clip(np.nan_to_num(octaves, nan=0.0, neginf=-_OCTAVES, posinf=_OCTAVES), -_OCTAVES, _OCTAVES)
    shades: NDArray[np.uint8] = np.rint((octaves + _OCTAVES) / (2 * _OCTAVES) * (_SHADES - 1)).astype(np.uint8)
    return shades


def palette() -> list[tuple[int, int, int]]:
    """Blue for little, nearly white for the mean, red for much."""
    middle = (_SHADES - 1) // 2
    below = [_mixed(_COLD, _EVEN, place / middle) for place in range(middle)]
    return [*below, *(_mixed(_EVEN, _HOT, place / middle) for place in range(middle + 1))]


def legend_gradient() -> str:
    """The palette for CSS, from left to right."""
    return "linear-gradient(to right," + ",".join(f"rgb({red},{green},{blue})" for red, green, blue in palette()) + ")"


def png(shades_RC: NDArray[np.uint8], colors: Sequence[tuple[int, int, int]]) -> bytes:
    """A palette image, one pixel for a number."""
    rows, columns = shades_RC.shape
    header = struct.pack(">IIBBBBB", columns, rows, 8, 3, 0, 0, 0)
    lines = b"".join(b"\0" + row.tobytes() for row in np.ascontiguousarray(shades_RC))
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(value for color in colors for value in color)),
        (b"IDAT", zlib.compress(lines, 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, content) for name, content in chunks)


def _heat(shades_RC: NDArray[np.uint8], height: float, names: Sequence[str], *, is_fixed: bool = False) -> str:
    """The map with names to its left; it follows the zoom of the plot below it unless `is_fixed`."""
    content = base64.b64encode(png(shades_RC, palette())).decode()
    labels = "".join(f"<span>{escape(name)}</span>" for name in names)
    return (
        f'<div class="heat{" fixed" if is_fixed else ""}" style="height:{height:g}px"><div class="names">{labels}</div>'
        f'<div class="map"><img alt="" src="data:image/png;base64,{content}"></div></div>'
    )


def _name(layer: str) -> str:
    return layer.replace("_", " ")


def _facts(history: History, layer: str) -> str:
    violation = history.latest(f"router.{layer}.max_violation")
    spread = history.latest(f"router.{layer}.bias_std")
    facts = [] if violation is None else [f"MaxVio {violation:.2f}"]
    facts += [] if spread is None else [f"bias's standard deviation {plain(spread)}"]
    return f" <small>{', '.join(facts)}</small>"


def _share(loads: NDArray[np.float64]) -> NDArray[np.float64]:
    return loads / max(float(loads.mean()), 1e-300)


def _over_time(history: History, layer: str, experts: int) -> NDArray[np.float64]:
    """Returns experts by buckets; a bucket without loads shows those before it."""
    columns: list[NDArray[np.float64]] = []
    for loads in history.loads:
        before = columns[-1] if columns else np.full(experts, np.nan)
        columns.append(_share(loads[layer]) if layer in loads else before)
    return np.stack(columns, axis=1)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _mixed(start: tuple[int, int, int], end: tuple[int, int, int], share: float) -> tuple[int, int, int]:
    red, green, blue = (round(one + (other - one) * share) for one, other in zip(start, end, strict=True))
    return red, green, blue
