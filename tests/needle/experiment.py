"""Runs the needle test of one seed, and checks the results."""

from dataclasses import dataclass

import torch

from tests.needle.measure import LENGTHS, Measured, measure
from tests.needle.network import BASE_LENGTH, LONG_LENGTH, PLAIN, YARN, build, train, with_rope

VARIANTS = ("plain", "yarn", "yarn_trained", "plain_trained")
NAMES = {
    "plain": "plain extrapolation",
    "yarn": "YaRN, no training",
    "yarn_trained": "YaRN, {steps} steps",
    "plain_trained": "plain, {steps} steps",
}
Results = dict[str, Measured]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Steps of the base and of the extension, and what is asked."""

    base_steps: int = 1200
    long_steps: int = 40
    samples: int = 36
    lengths: tuple[int, ...] = LENGTHS


def run_seed(seed: int, recipe: Recipe) -> Results:
    """Trains a base, extends it with and without YaRN, and measures all four networks. Uses one thread."""
    torch.set_num_threads(1)
    base = build(PLAIN, seed)
    train(base, recipe.base_steps, is_base=True, seed=1_000 + seed)
    stretched = with_rope(base, YARN)
    found = {"plain": measure(base, recipe.samples, recipe.lengths)}
    found["yarn"] = measure(stretched, recipe.samples, recipe.lengths)
    for name, model in (("yarn_trained", stretched), ("plain_trained", base)):
        train(model, recipe.long_steps, is_base=False, seed=2_000 + seed)
        found[name] = measure(model, recipe.samples, recipe.lengths)
    return found


def failures(found: Results) -> list[str]:
    """Returns what a seed's results should be and are not."""
    far = {name: found[name].mean(LONG_LENGTH) for name in VARIANTS}
    near = {name: found[name].mean(BASE_LENGTH) for name in VARIANTS}
    bits = {name: found[name].last_bits for name in VARIANTS}
    rules = (
        ("plain extrapolation at 8x is at most 0.20", far["plain"] <= 0.20),
        ("YaRN without training at 8x is at least 2.5 x plain extrapolation", far["yarn"] >= 2.5 * far["plain"]),
        ("YaRN after training at 8x is at least 2 x plain", far["yarn_trained"] >= 2 * far["plain_trained"]),
        ("YaRN after training at 8x is at least plain + 0.10", far["yarn_trained"] >= far["plain_trained"] + 0.10),
        ("the base length loses at most 0.05", near["yarn_trained"] >= near["plain"] - 0.05),
        ("bits per byte of the last half are 0.10 lower", bits["yarn_trained"] <= bits["plain_trained"] - 0.10),
    )
    return [rule for rule, holds in rules if not holds]


def lines(seed: int, recipe: Recipe, found: Results) -> list[str]:
    """Returns a table row per network: accuracy by length, and bits per byte of both ends."""
    rows = []
    for name in VARIANTS:
        each = found[name]
        label = NAMES[name].format(steps=recipe.long_steps)
        accuracy = " | ".join(f"{each.mean(length):.2f}" for length in LENGTHS)
        rows.append(f"| {seed} | {label} | {accuracy} | {each.first_bits:.2f} / {each.last_bits:.2f} |")
    return rows
