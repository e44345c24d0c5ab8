"""Draws the needle test: accuracy by depth and length, one panel per network."""

from pathlib import Path

from tests.needle.experiment import NAMES, VARIANTS, Results
from tests.needle.measure import DEPTHS, LENGTHS


def draw(found: Results, long_steps: int, title: str, path: Path) -> None:
    """Writes the picture.

    Args:
        found: results of one seed.
        long_steps: steps of the extension.
        title: above the panels.
        path: of the picture; its suffix selects the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams["svg.hashsalt"] = "dualpipe"  # makes the file reproducible
    figure, panels = pyplot.subplots(1, 4, sharey=True, figsize=(11, 3.4), layout="constrained")
    for panel, name in zip(panels, VARIANTS, strict=True):
        accuracy = [[row[depth] for row in found[name].accuracy] for depth in range(len(DEPTHS))]
        image = panel.imshow(accuracy, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        panel.set_title(NAMES[name].format(steps=long_steps), fontsize="medium")
        panel.set_xticks(range(len(LENGTHS)), [f"{length:,}" for length in LENGTHS])
        panel.set_yticks(range(len(DEPTHS)), [f"{depth:.0%}" for depth in DEPTHS])
        for row, values in enumerate(accuracy):
            for column, value in enumerate(values):
                color = "black" if value > 0.6 else "white"
                panel.text(column, row, f"{value:.2f}", ha="center", va="center", color=color, fontsize="x-small")
    panels[0].set_ylabel("depth of the needle")
    figure.supxlabel("length in tokens", fontsize="medium")
    figure.suptitle(title, fontsize="medium")
    figure.colorbar(image, ax=panels, label="share of right answers")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)
