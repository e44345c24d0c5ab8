"""Gives every size of a batch ramp a schedule that accepts it. No torch here."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from dualpipe.registry import kind_for_size
from train.config import TrainConfig, sized_config
from train.schedule.cut import run_stages


def sized_run(config: TrainConfig, sequences: int) -> TrainConfig:
    """Returns the configuration of a run with one size of its batch ramp, and no ramp.

    If the configured schedule does not accept the size, another one with the same placement is configured.

    Raises:
        ScheduleError: no schedule with this placement accepts the size.
    """
    sized, kind, pipeline = sized_config(config, sequences), config.schedule.kind, config.parallelism.pipeline
    if kind == "auto":
        return sized
    chunks = run_stages(config, kind) // pipeline
    other = kind_for_size(kind, pipeline, sized.num_micro_batches, chunks, micro_batches_key="batch.ramp")
    if other == kind:
        return sized
    return replace(sized, schedule=replace(config.schedule, kind=other, chunks=chunks))


def ramp_notices(config: TrainConfig) -> Iterator[str]:
    """Yields a line for consecutive sizes of the ramp that do not use the configured schedule."""
    kinds = [(size, sized_run(config, size).schedule.kind) for size in config.batch_sizes.sizes]
    for kind, group in groupby(kinds, key=lambda item: item[1]):
        if kind != config.schedule.kind:
            sizes = [size for size, _ in group]
            span = f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"
            yield (
                f"batch.ramp: steps of {span} sequences use schedule {kind}, which has the same placement, because "
                f"{config.schedule.kind} is not defined for their number of micro-batches"
            )
