"""One optimiser step over all ranks, and one forward pass for validation."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from data.batch_sizes import BatchSizes
from data.loader import IGNORE, Batch, Loader
from data.progress import Progress
from dualpipe.runtime.clock import open_clock
from dualpipe.runtime.execute import Execution, execute
from dualpipe.runtime.program import Action, Step
from kernels.attention.documents import Documents
from model.objective import LossSums, MicroBatch, Objective
from model.transformer import routers
from train.assemble import Assembly, feed
from train.balance import Balance, update_router_bias
from train.config import TrainConfig
from train.errors import PreemptedError, RefusedStepError
from train.guard.guard import LOSS, NORM, Guard, find, own_norm
from train.optim.learning_rate import learning_rate

Read = Callable[[int, int], Batch]
_PHASES = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """Means over the whole job, in nats: per predicted token, per sequence for the balance loss.

    is_finite_here: whether this rank's own part of them is.
    """

    main: float
    mtp: tuple[float, ...]
    balance: float
    total: float
    is_finite_here: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class StepRates:
    """What a step trains with, as functions of the step alone: the same under every layout and after a resume."""

    learning_rate: float
    mtp_loss_weight: float
    bias_update: float


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """What a step showed, equal on all ranks but for the execution of this rank's passes."""

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

    def __init__(self, assembly: Assembly, read: Read) -> None:
        self._assembly = assembly
        self._read = read
        self._known: dict[tuple[int, int], MicroBatch] = {}

    def __call__(self, direction: int, micro_batch: int) -> MicroBatch | None:
        """The micro-batch, None where nothing of it is needed."""
        config, schedule, model = self._assembly.config, self._assembly.schedule, self._assembly.model
        if model.model.embed_tokens is None and model.lm_head is None and not config.batch.document_mask:
            return None
        key = (direction, micro_batch)
        if key not in self._known:
            data_index = self._assembly.layout.data_index(self._assembly.groups.rank)
            before = sum(len(schedule.micro_batches_of(earlier)) for earlier in range(direction))
            index = data_index * schedule.num_micro_batches + before + micro_batch
            size = config.batch.micro_sequences
            self._known[key] = to_micro_batch(
                self._read(index * size, size),
                config.model.mtp_depth,
                self._assembly.device,
                masks_documents=config.batch.document_mask,
            )
        return self._known[key]

    def count_targets(self) -> Tensor:
        """Targets per depth over the whole global batch, int64, on the host; every rank must ask.

        Raises:
            PreemptedError: on every rank, where one was asked to make room. Nothing of the batch has begun.
        """
        counts = torch.zeros(self._assembly.config.model.mtp_depth + 1, dtype=torch.int64)
        for direction in self._assembly.holds_last:
            for micro_batch in self._assembly.schedule.micro_batches_of(direction):
                batch = self(direction, micro_batch)
                assert batch is not None
                counts += torch.stack([(targets != IGNORE).sum().cpu() for targets in batch.targets_BT])
        asked = torch.tensor([self._assembly.preemption.is_asked], dtype=torch.int64)
        summed = _sum_over_world(self._assembly, torch.cat([counts, asked]), "sum of targets")
        if summed[-1]:
            raise PreemptedError(
                f"{int(summed[-1])} of {self._assembly.layout.world_size} ranks were asked to make room"
            )
        return summed[:-1]


def to_micro_batch(batch: Batch, mtp_depth: int, device: torch.device, *, masks_documents: bool = False) -> MicroBatch:
    """What the model embeds and predicts at every depth, and whether the pieces of a sequence see each other."""
    depths = range(mtp_depth + 1)
    return MicroBatch(
        inputs_BT=tuple(batch.inputs(depth).to(device) for depth in depths),
        targets_BT=tuple(batch.targets(depth + 1).to(device) for depth in depths),
        documents=Documents.of_positions(batch.positions_BT).to(device) if masks_documents else None,
    )


def rates_of(config: TrainConfig, sizes: BatchSizes, step: int) -> StepRates:
    """Returns the learning rate, the MTP loss weight and the router bias rate of a step.

    Args:
        config: of the run; of any size of its batch ramp.
        sizes: sequences of every step of the run.
        step: from 0.
    """
    task, tokens = config.task, sizes.tokens_before(step)
    return StepRates(
        learning_rate=learning_rate(config.optim, sizes, task.steps, step),
        mtp_loss_weight=task.mtp_loss_weight.at(tokens),
        bias_update=task.bias_update_rate.at(tokens),
    )


def make_objective(config: TrainConfig, num_targets: Tensor, mtp_loss_weight: float) -> Objective:
    """The step's objective from the targets per depth of its global batch."""
    depth = config.model.mtp_depth
    weights = [1.0] + [mtp_loss_weight / max(depth, 1)] * depth
    return Objective(
        cross_entropy=tuple(
            weight / max(count, 1) for weight, count in zip(weights, num_targets.tolist(), strict=True)
        ),
        balance=config.task.balance_loss_weight / config.batch.global_sequences,
    )


def train_step(
    assembly: Assembly, loader: Loader, step: int, guard: Guard | None = None, progress: Progress | None = None
) -> StepResult:
    """Forward and backward of the step's global batch, the update, the router bias.

    Args:
        assembly: of the rank.
        loader: of the data.
        step: from 0.
        guard: that is asked before the update; without one, it is a new one of the configured kind.
        progress: shows how far this rank's phases are; None: nothing does.

    Raises:
        PreemptedError: on every rank alike, before anything was begun.
        RefusedStepError: on every rank alike, before anything was updated.
    """
    started = time.perf_counter()
    config = assembly.config
    guard = guard or Guard(config.guard)
    rates = rates_of(config, loader.sizes, step)
    read = partial(loader.batch, step)
    losses, execution = accumulate(assembly, read, rates.mtp_loss_weight, progress)
    norm = _update(assembly, guard, losses, step, rates.learning_rate)
    balance = update_router_bias(assembly, rates.bias_update)
    if assembly.ema is not None:
        assembly.ema.update()
    tokens = config.batch.global_sequences * config.batch.sequence_length_tokens
    return StepResult(
        losses=losses,
        grad_norm=norm,
        rates=rates,
        seconds=time.perf_counter() - started,
        tokens=tokens,
        balance=balance,
        execution=execution,
    )


def _update(assembly: Assembly, guard: Guard, losses: Losses, step: int, rate: float) -> float:
    """Sums gradients and applies them, if the guard lets it; gives their norm."""
    own, norm = own_norm(assembly.store), math.nan
    reason = guard.judge(LOSS, losses.total)
    with assembly.observers.log.phase("world", range(assembly.layout.world_size), "update of the weights"):
        if not reason:
            norm = assembly.optimiser.reduce()
            reason = guard.judge(NORM, norm)
        if not reason:
            assembly.optimiser.update(rate)
    if reason:
        finding = find(assembly, guard, step, reason, own, losses.is_finite_here)
        discard(assembly)
        raise RefusedStepError(finding)
    guard.accept(losses.total, norm)
    return norm


def discard(assembly: Assembly) -> None:
    """Forgets what passes left behind: gradients, routers' loads, counts of what was sent."""
    assembly.optimiser.discard()
    for gate in routers(assembly.model).values():
        gate.load.zero_()
    assembly.observers.traffic.take()
    assembly.observers.clips.take()


def accumulate(
    assembly: Assembly, read: Read, mtp_loss_weight: float, progress: Progress | None = None
) -> tuple[Losses, Execution]:
    """All passes of one global batch, and what this rank's took; gradients stay in the store, loads in the routers.

    Args:
        assembly: of the rank.
        read: the sequences of the batch, from a first one on.
        mtp_loss_weight: of all MTP depths together, beside the main loss.
        progress: shows how far this rank's phases are; None: nothing does.

    Raises:
        PreemptedError: on every rank alike, before anything was begun.
    """
    batches = BatchReader(assembly, read)
    num_targets = batches.count_targets()
    objective, sums = make_objective(assembly.config, num_targets, mtp_loss_weight), _no_sums(assembly)
    fed = feed(assembly, batches, objective, sums, assembly.store)
    with assembly.model.weights_unchanged():
        execution = execute(
            assembly.train_program, fed, assembly.links, open_clock(assembly.device), partial(_followed, progress)
        )
    return _reduce(assembly, sums, num_targets, mtp_loss_weight), execution


def _followed(progress: Progress | None, steps: tuple[Step, ...]) -> Iterable[Step]:
    """Returns a program's steps, whose phases are counted as they run."""
    if progress is None:
        return steps
    computes = [step.action in _PHASES for step in steps]
    return progress.over("first step", steps, sum(computes), lambda step: int(step.action in _PHASES), "phases")


def validate_pass(assembly: Assembly, read: Read) -> tuple[Losses, int]:
    """A forward pass of one global batch: losses, MTP's without weight, and the number of main targets."""
    batches = BatchReader(assembly, read)
    num_targets = batches.count_targets()
    objective, sums = make_objective(assembly.config, num_targets, 0.0), _no_sums(assembly)
    with assembly.model.weights_unchanged():
        execute(assembly.forward_program, feed(assembly, batches, objective, sums, None), assembly.links)
    return _reduce(assembly, sums, num_targets, 0.0), int(num_targets[0])


def _no_sums(assembly: Assembly) -> LossSums:
    return LossSums(cross_entropy=[0.0] * (assembly.config.model.mtp_depth + 1))


def _reduce(assembly: Assembly, sums: LossSums, num_targets: Tensor, mtp_loss_weight: float) -> Losses:
    config = assembly.config
    own = sums.settle()
    is_finite_here = bool(own.isfinite().all())
    totals = _sum_over_world(assembly, own, "sum of losses").tolist()
    means = [total / max(count, 1) for total, count in zip(totals[:-1], num_targets.tolist(), strict=True)]
    balance, mtp = totals[-1] / config.batch.global_sequences, tuple(means[1:])
    mtp_part = mtp_loss_weight * sum(mtp) / max(len(mtp), 1)
    total = means[0] + mtp_part + config.task.balance_loss_weight * balance
    return Losses(main=means[0], mtp=mtp, balance=balance, total=total, is_finite_here=is_finite_here)


def _sum_over_world(assembly: Assembly, values: Tensor, name: str) -> Tensor:
    """Sum over all ranks, back on the host."""
    values = values.to(assembly.device)
    with assembly.observers.log.collective("world", assembly.groups.world, name):
        dist.all_reduce(values, group=assembly.groups.world)
    return values.cpu()
