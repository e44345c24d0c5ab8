"""Draws the curves of `tests.bench.fp8_loss`: losses above, their gap below."""

from collections.abc import Mapping, Sequence
from pathlib import Path

SHOWN_FROM_STEP = 20
COLOURS = ("#2163c9", "#d1495b", "#00798c", "#927600", "#6a4c93")


def draw(smoothed: Mapping[tuple[str, int], Sequence[float]], limit: float, title: str, path: Path) -> None:
    """Writes the picture.

    Args:
        smoothed: smoothed losses of each step by precision (`bf16` and `fp8`) and seed.
        limit: limit of the gap, as a fraction.
        title: title of the picture.
        path: path of the picture; its suffix selects the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "dualpipe"  # makes the file reproducible
    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(9, 6.4), height_ratios=(3, 2), layout="tight")
    seeds = sorted({seed for _, seed in smoothed})
    for color, seed in zip(COLOURS, seeds, strict=False):
        bf16, fp8 = smoothed["bf16", seed], smoothed["fp8", seed]
        steps = range(1, len(bf16) + 1)
        shown = slice(SHOWN_FROM_STEP, None)
        above.plot(steps[shown], bf16[shown], color=color, linewidth=1, label=f"bf16, seed {seed}")
        above.plot(steps[shown], fp8[shown], color=color, linewidth=1.6, linestyle=":", label=f"fp8, seed {seed}")
        gaps = [100 * (ours - theirs) / theirs for theirs, ours in zip(bf16, fp8, strict=True)]
        below.plot(steps[shown], gaps[shown], color=color, linewidth=1, label=f"seed {seed}")
    for side in (-100 * limit, 100 * limit):
        below.axhline(side, color="#5c6370", linewidth=1, linestyle="--")
    below.axhline(0, color="#5c6370", linewidth=0.6)
    above.set(title=title, ylabel="loss, exponential mean (0.9)")
    below.set(xlabel="step", ylabel="fp8 over bf16, %")
    above.legend(ncols=len(seeds), fontsize="small", frameon=False)
    below.legend(ncols=len(seeds), fontsize="small", frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
