"""Selects presets of the list builder by simulation: `python -m bench.presets > presets.json`.

From the recorded presets and neighbors of them, it repeatedly takes the one that shortens the best orders of a set of
pipelines most. The recorded presets are such a selection, of more pipelines and over many rounds.
"""

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from itertools import product

from dualpipe.bounds import lower_bound
from dualpipe.costs import Costs, uniform
from dualpipe.generate.dualpipe_interleaved import empty
from dualpipe.generate.list_builder import build_order
from dualpipe.generate.list_pipeline import PRESETS, Pipeline, Preferences, Preset
from dualpipe.ir import straight_placement

SIZES = ((4, 12, 1), (4, 16, 2), (6, 25, 1), (8, 32, 2))
"""Numbers of ranks, micro-batches and chunks."""
TIMES = ((1.0, 1.0, 1.0, 0.0, 0.0), (1.0, 1.0, 1.0, 1.0, 0.0), (1.0, 1.3, 0.7, 0.6, 0.1))
"""Times of F, I and W, of exchange, and latency."""
_NAMES = [field.name for field in fields(Preferences)]
_PARTS = ("warm_up", "steady", "cool_down")


def pipelines() -> list[tuple[Pipeline, float]]:
    """Returns pipelines of one and of two directions, each with its lower bound."""
    found = []
    for (num_ranks, count, chunks), times in product(SIZES, TIMES):
        names = (field.name for field in fields(Costs) if field.name != "offload")
        costs = uniform(Costs(**dict(zip(names, times, strict=True))), num_ranks, num_ranks * chunks)
        shape = empty(num_ranks, count, chunks)
        for each in (shape, replace(shape, placement=straight_placement(num_ranks, chunks))):
            cap = num_ranks + 2.0
            found.append((Pipeline(each, costs, cap), lower_bound(each, costs, cap).value))
    return found


def changed(preset: Preset, draws: random.Random) -> Preset:
    """Returns a neighbor: another value of one to three preferences of a part."""
    part = draws.choice(_PARTS)
    values = asdict(getattr(preset, part))
    for name in draws.sample(_NAMES, draws.randint(1, 3)):
        match values[name]:
            case bool():
                values[name] = not values[name]
            case int():
                values[name] += draws.choice((-1, 1))
            case _:
                values[name] = round(values[name] + draws.gauss(0, 0.5), 2)
    return replace(preset, **{part: Preferences(**values)})  # type: ignore[arg-type]


def lengths(preset: Preset, among: Sequence[tuple[Pipeline, float]]) -> list[float]:
    """Returns the makespan of each pipeline's order relative to its lower bound; twice the bound if there is none."""
    attempts = ((build_order(pipeline, preset, 2 * bound), bound) for pipeline, bound in among)
    return [2.0 if attempt.ranks is None else attempt.time / bound for attempt, bound in attempts]


def select(scores: Sequence[Sequence[float]], count: int) -> list[int]:
    """Returns at most `count` rows, the most useful first: each lowers the sum of the least values most."""
    chosen: list[int] = []
    least = [float("inf")] * len(scores[0])
    while len(chosen) < count:
        sums = [sum(map(min, least, row)) for row in scores]
        best = min(range(len(scores)), key=sums.__getitem__)
        if sums[best] >= sum(least):
            break
        chosen.append(best)
        least = list(map(min, least, scores[best]))
    return chosen


def as_json(presets: Sequence[Preset]) -> str:
    """Returns the text that `read_presets` reads, a line for each part of a preset."""
    entries = []
    for preset in presets:
        parts = [getattr(preset, part) for part in _PARTS]
        rows = [json.dumps(list(asdict(part).values())) for part in (parts if len(set(parts)) > 1 else parts[:1])]
        entries.append('{"cool_down_blocks": ' + f'{preset.cool_down_blocks}, "parts": [\n' + ",\n".join(rows) + "]}")
    return f'{{"preferences": {json.dumps(_NAMES)},\n"presets": [\n' + ",\n".join(entries) + "]}\n"


def main() -> None:
    """Prints the selected presets."""
    parser = argparse.ArgumentParser(prog="python -m bench.presets", description=__doc__)
    parser.add_argument("--neighbors", type=int, default=4, help="of each recorded preset")
    parser.add_argument("--count", type=int, default=len(PRESETS), help="of presets to select")
    arguments = parser.parse_args()
    draws = random.Random(0)
    pool = [*PRESETS, *(changed(preset, draws) for preset in PRESETS for _ in range(arguments.neighbors))]
    among = pipelines()
    scores = [lengths(preset, among) for preset in pool]
    print(as_json([pool[index] for index in select(scores, arguments.count)]), end="")


if __name__ == "__main__":
    main()
