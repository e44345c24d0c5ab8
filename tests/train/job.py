"""Trains on one rank of a test's job, and trains the plain model with which it is compared."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor
from torch import distributed as dist

from base.registry import load_plugins
from comm.layout import Layout
from data.loader import Loader
from data.shards.open import Prepared
from dualpipe.builder import build_schedule
from dualpipe.ir import Schedule
from infer.engines.local import LocalEngine
from model.objective import LossSums, MicroBatch, Objective
from model.objectives.distillation import TEACHER_STATES, Distillation
from model.transformer import Transformer, named_tensors
from train.checkpoint.save import CheckpointSaver
from train.checkpoint.sources import open_source
from train.config import TrainConfig, sized_config
from train.core.learner import Learner, LearnersByBatchSize, open_learner
from train.core.replica import BatchReader, Replica, StepBatch, TaskHook, open_replica
from train.core.step import Losses, accumulate, rates_of, reduce_losses, update_router_bias
from train.core.world import ReplicaConfig, World, open_world, weight_dtype
from train.post.comparison import open_comparison
from train.post.sampler import StudentSampler, open_hook
from train.predict.cut import run_cut
from train.predict.timing import nominal_costs
from train.start.corpus import prepare_corpus
from train.start.plan import ramp_schedules
from train.tasks.distill import DistillConfig, is_scores_folder
from train.tasks.registry import StepRates, Task, open_task
from verify.steps import PlainModel, StepValues, local_dispatcher, run_step, start_biases


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """A run from the start. `starved`: experts without tokens; without a schedule, the configured one is made."""

    config: TrainConfig
    starved: int = 0
    schedule: Schedule | None = None


def open_job(config: TrainConfig, schedule: Schedule | None = None) -> Learner:
    """Opens world, replica and learner of this rank in the test harness' process group.

    Args:
        schedule: that is followed; None: the configured one.
    """
    schedule = configured_schedule(config) if schedule is None else schedule
    replica = open_replica(
        make_world(config, schedule), ReplicaConfig.of_run(config), schedule, run_cut(config, schedule.placement)
    )
    comparison = open_comparison(config, replica)
    hook = open_hook(config, replica, read_corpus(config), comparison, lambda line: None)
    return open_learner(replica, config.optim, config.ema, comparison, hook)


def make_world(config: TrainConfig, schedule: Schedule) -> World:
    """Opens this rank's world in the test harness' process group."""
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    return open_world(layout, schedule, config.model.mtp_depth, config.cluster, torch.device("cpu"))


@contextmanager
def opened_replica(config: TrainConfig) -> Iterator[Replica]:
    """Opens this rank's world and replica, and closes them after all ranks have left."""
    schedule = configured_schedule(config)
    world, cut = make_world(config, schedule), run_cut(config, schedule.placement)
    replica = open_replica(world, ReplicaConfig.of_run(config), schedule, cut)
    yield replica
    dist.barrier()
    replica.close()
    world.close()


def configured_schedule(config: TrainConfig) -> Schedule:
    assert config.schedule.kind != "auto"
    costs = nominal_costs(config, config.schedule.kind) if config.schedule.slices > 1 else None
    return build_schedule(config.schedule.kind, config.parallelism.pipeline, config.num_micro_batches, costs)


def task_of(config: TrainConfig) -> Task:
    return open_task(config.task, config.model, config.batch)


def close_job(learner: Learner) -> None:
    """Ends what `open_job` opened; all ranks call it at the same point."""
    learner.close()
    learner.world.close()


def open_loader(config: TrainConfig) -> Loader:
    """The run's data."""
    return Loader(read_corpus(config), sizes=config.batch_sizes)


@lru_cache(maxsize=1)
def read_corpus(config: TrainConfig) -> Prepared:
    """Reads the corpus once for a job and its loader, because its key takes a look at every file."""
    return prepare_corpus(config)


def run_jobs(rank: int, world_size: int, jobs: list[Job], num_steps: int) -> list[list[StepValues]]:
    """Runs one job after the other; what this rank saw of each step of each."""
    return [_run_one(job, num_steps) for job in jobs]


def _run_one(job: Job, num_steps: int) -> list[StepValues]:
    config = job.config
    load_plugins(config.plugins)
    whole, loader = open_job(config, job.schedule), open_loader(config)
    learners = LearnersByBatchSize(whole, config.batch_sizes, ramp_schedules(config))
    start_biases(whole.replica.model, job.starved)
    whole.comparison.follow(whole.replica)
    seen = []
    for step in range(num_steps):
        seen.append(run_step(learners.for_step(step), config, loader, step))
    dist.barrier()
    close_job(whole)
    return seen


def score_pass(learner: Learner, config: TrainConfig, loader: Loader) -> tuple[Losses, Tensor]:
    """Runs a forward pass of the first batch. All ranks call it.

    Returns:
        The losses, and every main target's log-probability or every token's score, [B, T], in the order of the batch.
    """
    replica = learner.replica
    task = task_of(config)
    batches = BatchReader(replica, task, partial(loader.batch, 0))
    sums = LossSums(task.names, {})
    counts = batches.count()
    rates = StepRates(learning_rate=0.0, mtp_loss_weight=0.0, bias_update=0.0)
    replica.forward(batches, task.objective(counts, rates), sums)
    return reduce_losses(replica, task, sums, counts, rates), replica.gather(sums.log_probs or {})


def sequential_step(learner: Learner, config: TrainConfig, loader: Loader, step: int) -> float:
    """Runs a step that reduces after all passes and completes every update before the router bias."""
    rates = rates_of(config.task, config.optim, loader.sizes, step)
    accumulate(learner, config.task, StepBatch((partial(loader.batch, step),)), rates)
    norm = learner.optimizer.norm()
    learner.optimizer.update(rates.learning_rate)
    learner.replica.weight_updates.wait_all()
    update_router_bias(learner.replica, rates.bias_update)
    return norm


def run_plain(config: TrainConfig, starved: int, num_steps: int) -> list[StepValues]:
    """The whole model in this process under ordinary autograd and torch's own optimizer and clipping."""
    plain, loader = PlainModel(config, starved), open_loader(config)
    hook = plain_hook(config, plain.model)
    teacher = load_teacher(config)
    return [_plain_step(config, plain, loader, step, teacher, hook) for step in range(num_steps)]


class PlainEngine(LocalEngine):
    """An engine of a plain model, as a training run needs one."""

    def close(self) -> None:
        """Does nothing, because nothing is open."""


def plain_hook(config: TrainConfig, model: Transformer) -> TaskHook:
    """Returns the hook of a run, which may train on the plain model's answers."""
    if not isinstance(config.task, DistillConfig) or config.task.answers == "data":
        return TaskHook()
    engine = PlainEngine(model, speculative=model.config.mtp_depth > 0, batch_size=5)
    return StudentSampler(engine, config.task, config.seed)


def load_teacher(config: TrainConfig) -> Transformer | None:
    """Loads the whole teacher of a run that has one in its pipeline."""
    if not isinstance(config.task, DistillConfig) or is_scores_folder(config.task.teacher):
        return None
    source = open_source(config.task.teacher, "task.teacher", drop_mtp=True)
    teacher = Transformer(source.config, local_dispatcher(config), weight_dtype(config.precision))
    source.fill(named_tensors(teacher))
    return teacher


@torch.no_grad()
def with_states(batch: MicroBatch, teacher: Transformer) -> MicroBatch:
    states_BTS = teacher.final_states(batch.inputs_BT[0], batch.documents)
    return replace(batch, extras={**batch.extras, TEACHER_STATES: states_BTS})


def _plain_step(
    config: TrainConfig, plain: PlainModel, loader: Loader, step: int, teacher: Transformer | None, hook: TaskHook
) -> StepValues:
    config = sized_config(config, loader.sizes.sequences(step))
    task, size, device = task_of(config), config.batch.micro_sequences, torch.device("cpu")
    reads = range(0, config.batch.global_sequences, size)
    (read,) = hook.prepare(loader, step).reads
    batches = [task.read(read(first, size), device) for first in reads]
    if teacher is not None:
        batches = [with_states(batch, teacher) for batch in batches]

    def adapt(objective: Objective) -> Objective:
        if isinstance(objective, Distillation) and teacher is not None:
            return replace(objective, teacher_head_VS=teacher.head_weight.detach())
        return objective

    return plain.step(batches, loader.sizes, step, adapt)


def save_checkpoint(config: TrainConfig, learner: Learner, step: int, prepared: Prepared) -> Path:
    """Writes the state after `step` updates and the tokenizer, and returns the folder. All ranks call it."""
    saver = CheckpointSaver(config, learner, prepared)
    saver.save(step)
    folder = saver.close()
    assert folder is not None
    return folder
