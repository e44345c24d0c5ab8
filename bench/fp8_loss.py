"""Draws the curves of `bench.fp8_loss`: losses above, their gap below."""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

SHOWN_FROM_STEP = 20

COLOURS = ("#2163c9", "#d1495b", "#00798c", "#927600", "#6a4c93")


def draw(smoothed: Mapping[tuple[str, int], Sequence[float]], limit: float, title: str, path: Path) -> None:
    """Writes the picture.

    Args:
        smoothed: smoothed losses of each step by precision (`bf16` and `fp8`) and seed.
        limit: limit of the gap, as a fraction.
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


SMOOTHING = 0.9

LAST_STEPS = 200

PRECISIONS = ("bf16", "fp8")

MODEL_OVERRIDES = (
    "parallelism=one_rank",
    "schedule=1f1b",
    "dispatch=local",
    "model=quickstart",
    "model.hidden_size=256",
    "model.expert_intermediate_size=128",
    "batch.global_sequences=8",
    "batch.micro_sequences=4",
    "batch.sequence_length_tokens=128",
    "validation.sequences=0",
    "validation.every_steps=0",
    "checkpointing.every_steps=0",
    "samples.tokens=0",
    "optim.learning_rate=3e-4",
    "optim.schedule.warmup=50 steps",
    "optim.schedule.decay_start=50 %",
)


@dataclass(frozen=True, slots=True)
class Gap:
    """Largest and mean relative gap of one seed's smoothed losses over the last steps."""

    seed: int
    largest: float
    mean: float


def main() -> int:
    """Trains, prints a line per seed, and writes the picture. Returns 1 if a gap reaches a limit."""
    arguments = _arguments()
    jobs = [(precision, seed) for seed in arguments.seeds for precision in PRECISIONS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        losses = dict(zip(jobs, pool.map(lambda job: _train(arguments, *job), jobs), strict=True))
    smoothed = {job: smooth(values) for job, values in losses.items()}
    gaps = [gap(seed, smoothed["bf16", seed], smoothed["fp8", seed]) for seed in arguments.seeds]
    for each in gaps:
        print(f"seed {each.seed}: largest gap {each.largest:.3%}, mean {each.mean:.3%}, last {LAST_STEPS} steps")
    draw(smoothed, arguments.limit, _caption(arguments, gaps), arguments.picture)
    print(f"picture: {arguments.picture}")
    return int(any(each.largest >= arguments.limit for each in gaps))


def smooth(losses: Sequence[float]) -> list[float]:
    """Returns the exponential mean with factor 0.9, which starts from the first loss."""
    return list(accumulate(losses, lambda mean, loss: SMOOTHING * mean + (1 - SMOOTHING) * loss))


def gap(seed: int, bf16: Sequence[float], fp8: Sequence[float]) -> Gap:
    """Returns the gap of two smoothed curves over the last 200 steps."""
    pairs = list(zip(bf16, fp8, strict=True))[-LAST_STEPS:]
    distances = [abs(ours - theirs) / theirs for theirs, ours in pairs]
    return Gap(seed, max(distances), sum(distances) / len(distances))


def _train(arguments: argparse.Namespace, precision: str, seed: int) -> list[float]:
    folder = arguments.folder / f"{precision}-{seed}"
    steps = arguments.steps
    command = [sys.executable, "-m", "launch.train", *MODEL_OVERRIDES, f"precision={precision}", f"seed={seed}"]
    command += [f"task.steps={steps}", f"out_dir={folder}", *arguments.overrides]
    metrics = folder / "metrics.jsonl"
    if not metrics.exists():
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    losses = [json.loads(line)["loss"] for line in metrics.read_text().splitlines()]
    assert len(losses) == steps, f"{folder}: {len(losses)} of {steps} steps; remove it to train again"
    return losses


def _caption(arguments: argparse.Namespace, gaps: Sequence[Gap]) -> str:
    worst = max(each.largest for each in gaps)
    return f"{arguments.steps} steps, {len(gaps)} seeds; largest gap over the last {LAST_STEPS} steps {worst:.3%}"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("overrides", nargs="*", help="of conf/train.yaml, for both")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("--limit", type=float, default=0.0025)
    parser.add_argument("--folder", type=Path, default=Path("outputs/fp8_loss"), help="of the runs; finished ones stay")
    parser.add_argument("--picture", type=Path, default=Path("docs/fp8_loss.svg"))
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
