"""Predicted peak of every rank in a whole training step against the largest sum of live storages."""

import gc
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ParallelismConfig
from dualpipe.registry import ScheduleConfig, candidates
from model.config import RECOMPUTED
from model.transformer import routers
from tests.inline_lane import InlineLane
from tests.model.live_memory import LiveMemory
from tests.ranks import run_ranks
from tests.tiny import write_text
from tests.train.job import close_job, open_job, open_loader
from tests.train.predict.live import NUMBER_BYTES
from tests.train.predict.test_live import BASE, PRECISIONS, make_config
from train.config import TrainConfig
from train.core.replica import StepBatch
from train.core.step import accumulate, rates_of
from train.predict.memory import predict_memory
from train.predict.timing import planning_schedule


def measure_peaks(rank: int, world_size: int, jobs: list[TrainConfig]) -> list[int]:
    """Returns the peak of a step of each job on this rank, in bytes."""
    # Exchanges, reductions and updates run on this thread, so that the mode sees their tensors.
    lanes = [patch(f"train.core.{module}.open_lane", lambda *_: InlineLane()) for module in ("world", "learner")]
    with lanes[0], lanes[1]:
        return [_measure(config) for config in jobs]


def _measure(config: TrainConfig) -> int:
    """Runs two steps, the second with a count of live storages inside every operator."""
    # Weak references, because a storage may get the address of one that has been freed.
    others = [weakref.ref(tensor.untyped_storage()) for tensor in gc.get_objects() if isinstance(tensor, Tensor)]
    learner = open_job(config, planning_schedule(config, config.num_micro_batches))
    _choose_evenly(learner.replica.network, config)
    loader = open_loader(config)
    loaded = _storages(_tensors_of(loader))
    peak = 0
    for step in range(2):
        gc.collect()
        ignored = {storage._cdata for each in others if (storage := each()) is not None}.union(loaded)
        alive = {key: size for key, size in _storages(gc.get_objects()).items() if key not in ignored}
        rates = rates_of(config.task, config.optim, loader.sizes, step)
        # The first step makes what stays. It is not measured, because that takes longer than the step.
        storages = LiveMemory(ignored_bytes=NUMBER_BYTES)
        with storages if step else nullcontext():
            accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
            learner.optimizer.norm()
            learner.optimizer.update(rates.learning_rate)
        peak = sum(alive.values()) + storages.peak_bytes
        dist.barrier()
    close_job(learner)
    return peak


def _choose_evenly(model: torch.nn.Module, config: TrainConfig) -> None:
    """Makes every token choose as many experts of each rank of its expert group."""
    ranks, num_chosen = config.parallelism.expert, config.model.num_experts_per_token
    per_rank = config.model.num_routed_experts // ranks
    assert num_chosen % ranks == 0
    assert config.model.num_expert_groups == 1
    chosen = [rank * per_rank + index for rank in range(ranks) for index in range(num_chosen // ranks)]
    for router in routers(model).values():  # type: ignore[arg-type]
        router.e_score_correction_bias.fill_(0.0)
        router.e_score_correction_bias[chosen] = 10.0


def _storages(objects: Iterable[object]) -> dict[int, int]:
    """Returns the size of the storage of every tensor among some objects, by its address."""
    # DeepSpeed also keeps tensors without memory.
    tensors = [each for each in objects if isinstance(each, Tensor) and each.device.type != "meta"]
    return {each.untyped_storage()._cdata: each.untyped_storage().nbytes() for each in tensors}


def _tensors_of(loader: object) -> list[Tensor]:
    """Returns the tensors that a loader keeps on the host."""
    return [each for each in gc.get_referents(*gc.get_referents(loader)) if isinstance(each, Tensor)]


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
