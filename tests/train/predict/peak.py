"""Measures the largest sum of live storages on each rank of a job during a whole training step."""

import gc
import weakref
from collections.abc import Iterable
from contextlib import nullcontext
from functools import partial
from unittest.mock import patch

import torch
from torch import Tensor
from torch import distributed as dist

from model.transformer import routers
from tests.inline_lane import InlineLane
from tests.model.live_memory import LiveMemory
from tests.train.job import close_job, open_job, open_loader
from tests.train.predict.live import NUMBER_BYTES
from train.config import TrainConfig
from train.core.replica import StepBatch
from train.core.step import accumulate, rates_of
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
