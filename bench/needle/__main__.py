"""Shows that YaRN extends a context by 8: trains three small models from random weights.

Each seed trains a base at length 128, extends it to 1,024 with and without YaRN, and asks for a value that text before
names. Prints a table, draws accuracy by depth and length, and returns 1 if a rule does not hold.
"""

import argparse
import json
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

from bench.needle.experiment import (
    DEPTHS,
    LENGTHS,
    NAMES,
    VARIANTS,
    Recipe,
    Results,
    failures,
    lines,
    run_seed,
)


def main() -> int:
    """Runs all seeds, two at a time by default."""
    arguments = _arguments()
    recipe, began = Recipe(arguments.base_steps, arguments.long_steps), time.monotonic()
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may hang
    with ProcessPoolExecutor(arguments.jobs, mp_context=context) as pool:
        found = dict(zip(arguments.seeds, pool.map(partial(run_seed, recipe=recipe), arguments.seeds), strict=True))
    lengths = " | ".join(f"{length:,}" for length in LENGTHS)
    print(f"| seed | network | {lengths} | bits per byte at 0-128 / 512-1,024 |")
    print("|" + " --- |" * (3 + len(LENGTHS)))
    for seed, results in found.items():
        print("\n".join(lines(seed, recipe, results)))
    broken = [f"seed {seed}: not so: {rule}" for seed, results in found.items() for rule in failures(results)]
    print("\n".join(broken) if broken else f"all rules hold for {len(found)} seeds")
    print(f"{time.monotonic() - began:.0f} s")
    if arguments.results is not None:
        values = {seed: {name: asdict(each) for name, each in results.items()} for seed, results in found.items()}
        arguments.results.write_text(json.dumps(values), encoding="utf-8")
    if arguments.picture is not None:
        seed = arguments.seeds[0]
        title = f"Share of right answers, seed {seed}: base of 128 tokens, {recipe.base_steps:,} steps"
        draw(found[seed], recipe.long_steps, title, arguments.picture)
    return int(bool(broken))


def draw(found: Results, long_steps: int, title: str, path: Path) -> None:
    """Draws accuracy by depth and length, one panel per network. The suffix of the path selects the format."""
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


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.needle", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="seeds at a time, one core each")
    parser.add_argument("--base-steps", type=int, default=Recipe().base_steps)
    parser.add_argument("--long-steps", type=int, default=Recipe().long_steps)
    parser.add_argument("--results", type=Path, help="file for all numbers, as JSON")
    parser.add_argument("--picture", type=Path, help="file for the heat map of the first seed")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
