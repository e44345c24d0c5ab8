"""Converts the result of a search to the public JSON form. No torch here."""

from collections.abc import Iterator
from typing import Any

from train.config import TrainConfig
from train.config.decode import encode
from train.planner.as_json import cost_json, layout_json
from train.planner.search.result import FoundLayout, SearchResult


def search_json(result: SearchResult) -> dict[str, Any]:
    """Returns a result as plain values."""
    return {
        "candidates": [_found_json(found, result.run) for found in result.found],
        "rejected": [encode(group) for group in result.rejected],
        "counts": encode(result.counts),
    }


def _found_json(found: FoundLayout, run: TrainConfig) -> dict[str, Any]:
    return {
        "layout": layout_json(found.config),
        "memory": {"peak_bytes": found.peak_bytes},
        "time": {
            "step_seconds": found.time.step,
            "tokens_per_second_per_gpu": found.time.tokens_per_second_per_gpu,
            "mfu": found.time.mfu,
        },
        "cost": None if found.cost is None else cost_json(found.cost),
        "pareto": found.is_pareto,
        "overrides": list(layout_overrides(found.config, run)),
    }


def layout_overrides(config: TrainConfig, run: TrainConfig) -> Iterator[str]:
    """Yields the overrides that turn a run into a layout.

    Args:
        config: of the layout, with a listed cut.
        run: configuration to which they are added.
    """
    mesh, batch, schedule = config.parallelism, config.batch, config.schedule
    yield f"parallelism.pipeline={mesh.pipeline}"
    yield f"parallelism.data={mesh.data}"
    yield f"parallelism.expert={mesh.expert}"
    if mesh.context != run.parallelism.context:
        yield f"parallelism.context={mesh.context}"
    yield f"parallelism.cut=[{','.join(map(str, mesh.cut.layers))}]"
    yield f"schedule={schedule.kind}"
    yield f"schedule.pairing={schedule.pairing}"
    yield f"batch.micro_sequences={batch.micro_sequences}"
    if batch.global_sequences != run.batch.global_sequences:
        yield f"batch.global_sequences={batch.global_sequences}"
        yield f"task.steps={config.task.steps}"
        yield f"validation.sequences={config.validation.sequences}"
    if batch.ramp != run.batch.ramp:
        yield "batch.ramp=null"
    if config.precision != run.precision:
        yield f"precision={config.precision.kind}"
    if config.recompute != run.recompute:
        yield f"recompute=[{','.join(config.recompute)}]"
    if config.dispatch != run.dispatch:
        yield f"dispatch={config.dispatch.kind}"
        yield f"dispatch.payload={config.dispatch.payload}"
