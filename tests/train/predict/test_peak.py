"""Predicted peak of every rank in a whole training step against the largest sum of live storages."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig, candidates
from model.config import RECOMPUTED
from tests.ranks import run_ranks
from tests.tiny import write_text
from tests.train.predict.peak import measure_peaks
from tests.train.predict.test_live import BASE, PRECISIONS, make_config
from train.config import TrainConfig
from train.predict.memory import predict_memory

MOST_OVER, MOST_UNDER = 0.03, 0.01
SLICED = {"sliced_1f1b": 4, "dualpipe_split": 2}
EVERY_KIND = (*candidates(), *SLICED)
# Both directions, a V with deferred weight gradients, and slices in both directions; both optimizers.
EVERY_PLACEMENT = ("dualpipe", "zb_v", "dualpipe_split")


def make_job(folder: Path, kind: str, pipeline: int, num_ranks: int) -> TrainConfig:
    """Returns a job in float32, in which a CPU computes like a GPU.

    Groups run sequentially, because exchanges run inline here. With overlapped groups, the prediction adds their
    buffers to those of computation.
    """
    data = num_ranks // pipeline
    config = make_config(
        folder,
        replace(BASE, num_layers=2 * pipeline, num_expert_groups=1, num_limited_groups=1),
        RECOMPUTED,
        PRECISIONS["float32"],
        parallelism=ParallelismConfig(pipeline=pipeline, data=data, expert=data),
        schedule=ScheduleConfig(
            kind=kind,
            chunks=None,
            pairing="sequential",
            slices=SLICED.get(kind, 1),
            link_depth=2 if kind in SLICED else 1,
        ),
    )
    sequences = 2 * pipeline * data * config.batch.micro_sequences
    sharding: Literal["zero1", "replicated"] = "zero1" if len(kind) % 2 or kind in SLICED else "replicated"
    return replace(
        config,
        batch=replace(config.batch, global_sequences=sequences),
        optim=replace(config.optim, sharding=sharding, bucket_elements=16_384),
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("kinds", "pipeline", "num_ranks"),
    [
        (EVERY_PLACEMENT, 2, 4),
        pytest.param(EVERY_KIND, 2, 8, marks=pytest.mark.exhaustive),
        pytest.param(EVERY_KIND, 4, 8, marks=pytest.mark.exhaustive),
    ],
    ids=["placements", "kinds of 2", "kinds of 4"],
)
def test_peak_of_a_step_is_the_largest_sum_of_live_storages(
    tmp_path: Path, kinds: tuple[str, ...], pipeline: int, num_ranks: int
) -> None:
    """All experts of a rank receive equally many rows, as the prediction assumes."""
    write_text(tmp_path)
    jobs = [make_job(tmp_path, kind, pipeline, num_ranks) for kind in kinds]
    results = run_ranks(num_ranks, measure_peaks, jobs, timeout_seconds=1200.0)
    problems = []
    for number, job in enumerate(jobs):
        predicted = [rank.total for rank in predict_memory(job).ranks]
        for rank, measured in enumerate(results):
            total = predicted[rank // job.parallelism.data]
            if not -MOST_UNDER <= total / measured[number] - 1 <= MOST_OVER:
                difference = f"{total / measured[number] - 1:+.2%}"
                problems.append(f"{job.schedule.kind} {job.parallelism}: rank {rank} {measured[number]}, {difference}")
    assert not problems, "\n".join(problems)
