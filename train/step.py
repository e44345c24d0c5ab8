"""One optimiser step over all ranks, and one forward pass for validation."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from data.batch_sizes import BatchSizes
from data.loader import IGNORE, Batch, Loader
from data.progress import Progress
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.program import Action, Step
from kernels.attention.documents import Documents
from model.objective import BALANCE, MAIN, CrossEntropy, LossSums, MicroBatch, loss_names
from model.transformer import routers
from train.balance import Balance, update_router_bias
from train.config import StopGuardConfig, TaskConfig
from train.errors import PreemptedError, RefusedStepError
from train.guard.guard import LOSS, NORM, Guard, find, own_norm
from train.learner import Learner
from train.optim.config import OptimConfig
from train.optim.learning_rate import learning_rate
from train.replica import Replica

Read = Callable[[int, int], Batch]
_NO_SPIKES = StopGuardConfig(kind="stop", spike_factor=0.0, spike_window_steps=1)
_PHASES = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """A step's losses over the whole job.

    Attributes:
        by_name: means in nats: per predicted token, per sequence for the balance loss.
        total: what was minimised.
        is_finite_here: whether this rank's own part of them is.
    """

    by_name: Mapping[str, float]
    total: float
    is_finite_here: bool

    @property
    def main(self) -> float:
        """The loss that validation reports."""
        return self.by_name[MAIN]

    @property
    def mtp(self) -> float:
        """The mean over MTP depths, 0 without any."""
        depths = [loss for name, loss in self.by_name.items() if name.startswith("mtp_")]
        return sum(depths) / max(len(depths), 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRates:
    """Rates of a step, functions of the step alone: the same under every layout and after a resume."""

    learning_rate: float
    mtp_loss_weight: float
    bias_update: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step measured; equal on all ranks, except for the execution of this rank's passes."""

    losses: Losses
    grad_norm: float
    rates: StepRates
    seconds: float
    tokens: int
    balance: Balance
    execution: Execution


class BatchReader:
    """A rank's micro-batches of one step, each read once.

    Only the ranks at the ends of the model read them, or every rank where attention must know the documents.
    """

    def __init__(self, replica: Replica, read: Read) -> None:
        self._replica = replica
        self._read = read
        self._known: dict[tuple[int, int], MicroBatch] = {}

    def __call__(self, direction: int, micro_batch: int) -> MicroBatch | None:
        """Returns the micro-batch; None if this rank needs nothing of it."""
        replica, batch = self._replica, self._replica.config.batch
        schedule, model = replica.schedule, replica.model
        if model.model.embed_tokens is None and model.lm_head is None and not batch.document_mask:
            return None
        key = (direction, micro_batch)
        if key not in self._known:
            before = sum(len(schedule.micro_batches_of(earlier)) for earlier in range(direction))
            index = replica.world.data_index * schedule.num_micro_batches + before + micro_batch
            size = batch.micro_sequences
            self._known[key] = to_micro_batch(
                self._read(index * size, size),
                model.config.mtp_depth,
                replica.world.device,
                masks_documents=batch.document_mask,
            )
        return self._known[key]

    def count_targets(self) -> Tensor:
        """Returns targets per depth over the global batch, int64 on the host; all ranks call it.

        Raises:
            PreemptedError: on every rank, if one was preempted. Nothing of the batch has begun.
        """
        replica, world = self._replica, self._replica.world
        counts = torch.zeros(replica.config.model.mtp_depth + 1, dtype=torch.int64)
        for direction in replica.loss_directions:
            for micro_batch in replica.schedule.micro_batches_of(direction):
                batch = self(direction, micro_batch)
                assert batch is not None
                counts += torch.stack([(targets != IGNORE).sum().cpu() for targets in batch.targets_BT])
        asked = torch.tensor([world.preemption.is_requested], dtype=torch.int64)
        summed = world.reduce(torch.cat([counts, asked]), "sum of targets")
        if summed[-1]:
            raise PreemptedError(f"{int(summed[-1])} of {len(world.ranks)} ranks were asked to make room")
        return summed[:-1]


def to_micro_batch(batch: Batch, mtp_depth: int, device: torch.device, *, masks_documents: bool = False) -> MicroBatch:
    """Returns what the model embeds and predicts at every depth, and the documents if they are masked."""
    depths = range(mtp_depth + 1)
    return MicroBatch(
        inputs_BT=tuple(batch.inputs(depth).to(device) for depth in depths),
        targets_BT=tuple(batch.targets(depth + 1).to(device) for depth in depths),
        documents=Documents.of_positions(batch.positions_BT).to(device) if masks_documents else None,
    )


def rates_of(task: TaskConfig, optim: OptimConfig, sizes: BatchSizes, step: int) -> StepRates:
    """Returns the learning rate, the MTP loss weight and the router bias rate of a step.

    Args:
        task: of the run.
        optim: of the run.
        sizes: sequences of every step of the run.
        step: from 0.
    """
    tokens = sizes.tokens_before(step)
    return StepRates(
        learning_rate=learning_rate(optim, sizes, task.steps, step),
        mtp_loss_weight=task.mtp_loss_weight.at(tokens),
        bias_update=task.bias_update_rate.at(tokens),
    )


def make_objective(
    task: TaskConfig, num_targets: Tensor, mtp_loss_weight: float, global_sequences: int
) -> CrossEntropy:
    """Returns the step's objective from the targets per depth of its global batch.

    Args:
        task: of the run.
        num_targets: per depth, over all ranks.
        mtp_loss_weight: of all MTP depths together.
        global_sequences: of the global batch.
    """
    depth = len(num_targets) - 1
    weights = [1.0] + [mtp_loss_weight / max(depth, 1)] * depth
    return CrossEntropy(
        factors=tuple(weight / max(count, 1) for weight, count in zip(weights, num_targets.tolist(), strict=True)),
        balance=task.balance_loss_weight / global_sequences,
    )


def train_step(
    learner: Learner,
    task: TaskConfig,
    loader: Loader,
    step: int,
    guard: Guard | None = None,
    progress: Progress | None = None,
) -> StepResult:
    """Runs forward and backward of the step's global batch, then updates weights, router bias and average.

    Args:
        learner: of this rank.
        task: of the run.
        loader: of the data.
        step: from 0.
        guard: judges loss and gradient norm before the update; None: one that refuses only what is not finite.
        progress: shows how far this rank's phases are; None: nothing does.

    Raises:
        PreemptedError: on every rank alike, before anything was begun.
        RefusedStepError: on every rank alike, before anything was updated.
    """
    started, replica = time.perf_counter(), learner.replica
    rates = rates_of(task, learner.config, loader.sizes, step)
    losses, execution = accumulate(learner, task, partial(loader.batch, step), rates.mtp_loss_weight, progress)
    norm = _update(learner, guard or Guard(_NO_SPIKES), losses, step, rates.learning_rate)
    balance = update_router_bias(replica, rates.bias_update)
    if learner.ema is not None:
        learner.ema.update()
    return StepResult(
        losses=losses,
        grad_norm=norm,
        rates=rates,
        seconds=time.perf_counter() - started,
        tokens=replica.global_sequences * replica.config.batch.sequence_length_tokens,
        balance=balance,
        execution=execution,
    )


def _update(learner: Learner, guard: Guard, losses: Losses, step: int, rate: float) -> float:
    """Sums gradients and applies them if the guard accepts the step; returns their norm."""
    own, norm, world = own_norm(learner.store), math.nan, learner.world
    reason = guard.judge(LOSS, losses.total)
    with world.phase("update of the weights"):
        if not reason:
            norm = learner.optimiser.reduce()
            reason = guard.judge(NORM, norm)
        if not reason:
            learner.optimiser.update(rate)
    if reason:
        finding = find(world, guard, step, reason, own, losses.is_finite_here)
        discard(learner)
        raise RefusedStepError(finding)
    guard.accept(losses.total, norm)
    return norm


def discard(learner: Learner) -> None:
    """Discards what passes left behind: gradients, routers' loads, counts of what was sent."""
    learner.optimiser.discard()
    for gate in routers(learner.replica.model).values():
        gate.load.zero_()
    learner.replica.observers.traffic.take()
    learner.replica.observers.clips.take()


def accumulate(
    learner: Learner, task: TaskConfig, read: Read, mtp_loss_weight: float, progress: Progress | None = None
) -> tuple[Losses, Execution]:
    """Runs all passes of one global batch; gradients stay in the store, loads in the routers.

    Args:
        learner: of this rank.
        task: of the run.
        read: the sequences of the batch, from a first one on.
        mtp_loss_weight: of all MTP depths together, relative to the main loss.
        progress: shows how far this rank's phases are; None: nothing does.

    Raises:
        PreemptedError: on every rank alike, before anything was begun.
    """
    replica = learner.replica
    batches = BatchReader(replica, read)
    num_targets = batches.count_targets()
    objective = make_objective(task, num_targets, mtp_loss_weight, replica.global_sequences)
    sums = _no_sums(replica)
    execution = replica.train(batches, objective, sums, learner.store, partial(_followed, progress))
    return _reduce(replica, task, sums, num_targets, mtp_loss_weight), execution


def _followed(progress: Progress | None, steps: tuple[Step, ...]) -> Iterable[Step]:
    """Returns a program's steps, whose phases are counted as they run."""
    if progress is None:
        return steps
    computes = [step.action in _PHASES for step in steps]
    return progress.over("first step", steps, sum(computes), lambda step: int(step.action in _PHASES), "phases")


def validate_pass(replica: Replica, task: TaskConfig, read: Read) -> tuple[Losses, int]:
    """Runs a forward pass of one global batch: losses, MTP's without weight, and the number of main targets."""
    batches = BatchReader(replica, read)
    num_targets = batches.count_targets()
    objective, sums = make_objective(task, num_targets, 0.0, replica.global_sequences), _no_sums(replica)
    replica.forward(batches, objective, sums)
    return _reduce(replica, task, sums, num_targets, 0.0), int(num_targets[0])


def _no_sums(replica: Replica) -> LossSums:
    return LossSums(loss_names(replica.config.model.mtp_depth))


def _reduce(replica: Replica, task: TaskConfig, sums: LossSums, num_targets: Tensor, mtp_loss_weight: float) -> Losses:
    own = sums.settle()
    is_finite_here = bool(own.isfinite().all())
    totals = replica.world.reduce(own, "sum of losses").tolist()
    counts = [*num_targets.tolist(), replica.global_sequences]
    means = {name: total / max(n, 1) for name, total, n in zip(sums.names, totals, counts, strict=True)}
    mtp = [means[name] for name in sums.names[1:-1]]
    mtp_part = mtp_loss_weight * sum(mtp) / max(len(mtp), 1)
    total = means[MAIN] + mtp_part + task.balance_loss_weight * means[BALANCE]
    return Losses(by_name=means, total=total, is_finite_here=is_finite_here)
