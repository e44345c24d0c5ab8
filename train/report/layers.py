"""A layer's experts: their loads over the run as a heat map, and below it the path of the router's bias."""

from html import escape

import numpy as np
from numpy.typing import NDArray

from train.report.chart import Frame, element, step_axis
from train.report.figures import plain, ticks
from train.report.heat import image, relative_shades
from train.report.history import Bucket, History

_WIDTH, _LEFT, _RIGHT, _TOP = 560.0, 66.0, 14.0, 34.0
_ROW, _LEAST_MAP, _MOST_MAP = 9.0, 96.0, 260.0
_BIAS, _GAP, _AXIS = 74.0, 24.0, 26.0


def overview(history: History) -> str:
    """Layers below each other, experts to the right: the loads of the latest steps that are known."""
    latest = next((bucket for bucket in reversed(history.buckets) if bucket.loads), None)
    if latest is None:
        return ""
    layers = [layer for layer in history.layers() if layer in latest.loads]
    share_RC = np.stack([_share(latest, layer) for layer in layers])
    rows, experts = share_RC.shape
    row = min(max(8.0, 160.0 / rows), 22.0)
    height = _TOP + rows * row + _AXIS
    steps = f"step {latest.first:,}" + (f" to {latest.last:,}" if latest.last > latest.first else "")
    parts = [f'<text class="title" x="12" y="20">Load of each expert, {steps}</text>']
    parts.append(image(relative_shades(share_RC), _LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, rows * row))
    every = -(-rows // 12) if row < 11 else 1
    for place, layer in enumerate(layers):
        if place % every == 0:
            y = _TOP + (place + 0.5) * row + 4
            parts.append(f'<text class="soft end" x="{_LEFT - 7:g}" y="{y:.1f}">{escape(_name(layer))}</text>')
    parts.append(f'<text class="soft" x="{_LEFT:g}" y="{height - 8:g}">expert 0</text>')
    parts.append(f'<text class="soft end" x="{_WIDTH - _RIGHT:g}" y="{height - 8:g}">expert {experts - 1}</text>')
    return f"<figure>{element(_WIDTH, height, 'Load of each expert', parts)}</figure>"


def card(history: History, layer: str) -> str:
    """One layer's `<figure>`; empty text where nothing is known of it."""
    loaded = [bucket for bucket in history.buckets if layer in bucket.loads]
    biased = history.tallies(f"router.{layer}.bias_most")
    if not loaded and not biased:
        return ""
    experts = len(loaded[0].loads[layer]) if loaded else 0
    height_of_map = min(max(experts * _ROW, _LEAST_MAP), _MOST_MAP) if loaded else 0.0
    height = _TOP + height_of_map + (_GAP + _BIAS if biased else 0.0) + _AXIS
    parts = [f'<text class="title" x="12" y="20">{escape(_name(layer).capitalize())}{_facts(history, layer)}</text>']
    if loaded:
        shades_ES = relative_shades(_over_time(history, layer, experts))
        parts.append(image(shades_ES, _LEFT, _TOP, _WIDTH - _LEFT - _RIGHT, height_of_map))
        parts.append(f'<text class="soft end" x="{_LEFT - 7:g}" y="{_TOP + 10:g}">expert 0</text>')
        parts.append(f'<text class="soft end" x="{_LEFT - 7:g}" y="{_TOP + height_of_map:g}">{experts - 1}</text>')
    first, last = history.buckets[0].first, history.buckets[-1].last
    # As wide as the map's columns: the last one may stand for fewer steps than the others.
    columns = (first - 0.5, first - 0.5 + len(history.buckets) * history.width)
    frame = Frame(width=_WIDTH, height=_BIAS, steps=columns, values=(0.0, 1.0))
    if biased:
        parts += _bias(history, layer, _TOP + height_of_map + _GAP, frame)
    parts += step_axis(frame, height - 8, (first, last))
    return f"<figure>{element(_WIDTH, height, _name(layer), parts)}</figure>"


def _name(layer: str) -> str:
    return layer.replace("_", " ")


def _facts(history: History, layer: str) -> str:
    violation = history.latest(f"router.{layer}.max_violation")
    spread = history.latest(f"router.{layer}.bias_std")
    told = [] if violation is None else [f"MaxVio {violation:.2f}"]
    told += [] if spread is None else [f"bias's standard deviation {plain(spread)}"]
    return f'<tspan class="fact" dx="12">{", ".join(told)}</tspan>'


def _share(bucket: Bucket, layer: str) -> NDArray[np.float64]:
    loads = bucket.loads[layer]
    share: NDArray[np.float64] = loads / max(float(loads.mean()), 1e-300)
    return share


def _over_time(history: History, layer: str, experts: int) -> NDArray[np.float64]:
    """Experts by buckets; a bucket without loads shows those before it."""
    columns: list[NDArray[np.float64]] = []
    for bucket in history.buckets:
        before = columns[-1] if columns else np.full(experts, np.nan)
        columns.append(_share(bucket, layer) if layer in bucket.loads else before)
    return np.stack(columns, axis=1)


def _bias(history: History, layer: str, top: float, frame: Frame) -> list[str]:
    """From the least to the greatest bias of the layer's router, as a band around zero."""
    below, above = (history.tallies(f"router.{layer}.bias_{name}") for name in ("least", "most"))
    low, high = min(tally.least for _, tally in below), max(tally.most for _, tally in above)
    scale = ticks(min(low, 0.0), max(high, 0.0), 2)

    def y(value: float) -> float:
        return top + _BIAS * (1 - (value - scale[0]) / (scale[-1] - scale[0]))

    def points(tallies: list[tuple[Bucket, float]]) -> list[str]:
        return [f"{frame.x((bucket.first + bucket.last) / 2):.1f},{y(value):.1f}" for bucket, value in tallies]

    lower = points([(bucket, tally.least) for bucket, tally in below])
    upper = points([(bucket, tally.most) for bucket, tally in above])
    parts = []
    for value in scale:
        parts.append(
            f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>'
        )
        parts.append(f'<text class="soft end" x="{_LEFT - 7:g}" y="{y(value) + 4:.1f}">{plain(value)}</text>')
    parts.append(f'<polygon class="band colour-1" points="{" ".join(upper + lower[::-1])}"/>')
    parts += [f'<polyline class="line colour-1" points="{" ".join(line)}"/>' for line in (upper, lower)]
    parts.append(f'<text class="soft" x="{_LEFT:g}" y="{top - 7:g}">bias of the router, least to greatest</text>')
    return parts
