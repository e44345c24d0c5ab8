"""Runs one optimizer step over all ranks: the passes, the update, and the balance of experts.

Shape legend: L layers with routers, in order; E experts; S statistics of a bias (minimum, maximum, standard deviation).
"""

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from data.config import BatchSizes
from data.loader import Loader
from data.progress import Progress
from dualpipe.runtime.execute import Execution
from dualpipe.runtime.program import Action, Step
from model.objective import BALANCE, MAIN, LossSums
from model.transformer import routers
from train.config import StopGuardConfig, TaskConfig
from train.core.by_source import SourceMeans, SumsBySource
from train.core.guard import (
    LOSS,
    NORM,
    Guard,
    describe_refusal,
)
from train.core.learner import Learner
from train.core.micro_batch_loads import MicroBatchLoads
from train.core.replica import BatchReader, Replica, StepBatch
from train.errors import RefusedStepError
from train.optim.learning_rate import OptimConfig, learning_rate
from train.tasks.registry import StepRates, Task, open_task

_BIAS = ("bias_least", "bias_most", "bias_std")
_MTP = "mtp_"
NO_SPIKES = StopGuardConfig(kind="stop", spike_factor=0.0, spike_window_steps=1)
_PHASES = (Action.FORWARD, Action.BACKWARD, Action.WEIGHT)


@dataclass(frozen=True, kw_only=True, slots=True)
class Losses:
    """The losses of a step over the whole job, in nats per predicted token, balance per sequence."""

    by_name: Mapping[str, float]
    total: float
    is_finite_here: bool
    by_source: SourceMeans | None = None

    @property
    def main(self) -> float:
        """The loss that validation reports."""
        return self.by_name[MAIN]

    @property
    def reported(self) -> dict[str, float]:
        """Further means that the task reports, such as the accuracy of a reward model."""
        return {name: mean for name, mean in self.by_name.items() if is_reported(name)}

    @property
    def mtp(self) -> float:
        """The mean loss over MTP depths; 0 if the model has none."""
        depths = [loss for name, loss in self.by_name.items() if name.startswith(_MTP)]
        return sum(depths) / max(len(depths), 1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Balance:
    """The loads and biases of all routers after a step's update.

    `layers` has MTP modules last. `load_LE` are tokens of the step, equal on all ranks, and `bias_LS` are minimum,
    maximum and deviation of the new biases: rows of layers that this rank does not hold are -inf, until the record of
    the step takes maxima over all ranks. Both are float64, loads on the host.
    """

    layers: Sequence[int]
    load_LE: Tensor
    bias_LS: Tensor

    @property
    def violations(self) -> list[float]:
        """MaxVio of each layer: its largest load divided by the mean load, minus 1."""
        max_violations: list[float] = (self.load_LE.amax(1) / self.load_LE.mean(1) - 1).tolist() if self.layers else []
        return max_violations

    def metrics(self) -> dict[str, object]:
        """Returns `max_violation` of the worst layer and, under `router`, the values and bias of each layer."""
        return {
            "max_violation": max(self.violations, default=0.0),
            "router": {
                f"layer_{layer}": {"max_violation": violation, **dict(zip(_BIAS, bias, strict=True))}
                for layer, violation, bias in zip(self.layers, self.violations, self.bias_LS.tolist(), strict=True)
            },
        }

    def loads(self) -> dict[str, list[int]]:
        """Returns the tokens per expert of each layer."""
        rows = self.load_LE.to(torch.int64).tolist()
        return {f"layer_{layer}": row for layer, row in zip(self.layers, rows, strict=True)}


@dataclass(frozen=True, kw_only=True, slots=True)
class StepResult:
    """The measurements of a step, equal on all ranks except for seconds and the execution of the passes."""

    losses: Losses
    grad_norm: float
    rates: StepRates
    seconds: float
    update_seconds: float
    tokens: int
    balance: Balance
    execution: Execution
    rollouts: Mapping[str, Any] | None
    part_seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Done:
    """The outcome of a step that updated the weights."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class Skipped:
    """The outcome of a step with a skipped batch; nothing was updated."""


@dataclass(frozen=True, slots=True)
class RolledBack:
    """The outcome of a step from which the run was rolled back to a checkpoint."""

    to_step: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PassResult:
    """What the passes of a step measured on this rank."""

    losses: Losses
    execution: Execution
    earlier_seconds: float


def train_step(
    learner: Learner,
    task: TaskConfig,
    loader: Loader,
    step: int,
    guard: Guard | None = None,
    progress: Progress | None = None,
    by_source: SumsBySource | None = None,
    micro_batch_loads: MicroBatchLoads | None = None,
) -> StepResult:
    """Runs forward and backward of the global batch, then updates weights, router bias and average.

    Raises:
        PreemptedError: on every rank, before any pass has started.
        RefusedStepError: on every rank, before anything was updated.
    """
    started = time.perf_counter()
    replica = learner.replica
    rates = rates_of(task, learner.config, loader.sizes, step)
    guard = guard or Guard(NO_SPIKES)
    try:
        # The task prepares the step's batches: it reads data, or samples answers and scores them.
        batch = guard.judged_batch(learner.hook, loader, step)
        if micro_batch_loads is not None:
            batch = replace(batch, routes=micro_batch_loads.count(step + 1, batch.routes))
        passes = accumulate(learner, task, batch, rates, progress, learner.optimizer.reduce, by_source)
        part_seconds = learner.hook.finish(passes.earlier_seconds)
        passed = time.perf_counter()
        norm = _update(learner, guard, passes.losses, step, rates.learning_rate)
    except RefusedStepError:
        learner.discard()
        raise
    balance = update_router_bias(replica, rates.bias_update)
    learner.update_average()
    learner.comparison.refresh(replica, step + 1)
    ended = time.perf_counter()
    return StepResult(
        losses=passes.losses,
        grad_norm=norm,
        rates=rates,
        seconds=ended - started,
        update_seconds=ended - passed,
        tokens=len(batch.reads) * replica.global_sequences * replica.config.batch.sequence_length_tokens,
        balance=balance,
        execution=passes.execution,
        rollouts=batch.metrics,
        part_seconds=part_seconds,
    )


def _update(learner: Learner, guard: Guard, losses: Losses, step: int, rate: float) -> float:
    """Completes the sums of gradients, starts the update if the guard accepts them, returns their norm."""
    world = learner.world
    bad = guard.judge_kl(losses.by_name, step, rate)
    reason = guard.judge(LOSS, losses.total)
    norm = math.nan
    with world.phase("update of the weights"):
        if not reason and bad is None:
            norm = learner.optimizer.norm()
            reason = guard.judge(NORM, norm)
        if not reason and bad is None:
            learner.optimizer.update(rate)
    if reason:
        norm_here = learner.optimizer.local_norm()
        raise RefusedStepError(
            describe_refusal(world, guard, step, reason, norm_here, is_finite_here=losses.is_finite_here)
        )
    if bad is not None:
        raise RefusedStepError(bad)
    guard.accept(losses.total, norm)
    return norm


def update_router_bias(replica: Replica, rate: float) -> Balance:
    """Updates every router's bias by `rate` for the load of the whole global batch. All ranks call it."""
    world = replica.world
    shape = replica.config.model
    gates = routers(replica.network)
    # MTP modules are counted after the main layers.
    layers = range(shape.num_dense_layers, shape.num_layers + shape.mtp_depth)
    rows = [layers.index(layer) for layer in gates]
    load_LE = torch.zeros(len(layers), shape.num_routed_experts, dtype=torch.int64, device=world.device)
    bias_LS = torch.full((len(layers), len(_BIAS)), -torch.inf, dtype=torch.float64, device=world.device)
    if gates:
        load_LE[rows] = torch.stack([gate.load for gate in gates.values()])
    # A sum over all ranks, because the process group of the stages may still be gathering weights.
    load_LE = world.reduce(load_LE, "sum of router loads")
    if gates:
        for gate, load_E in zip(gates.values(), load_LE[rows].to(world.device), strict=True):
            gate.update_bias(load_E, rate)
            gate.load.zero_()
        bias_LE = torch.stack([gate.e_score_correction_bias for gate in gates.values()]).double()
        bias_LS[rows] = torch.stack([bias_LE.amin(1), bias_LE.amax(1), bias_LE.std(1, correction=0)], dim=1)
    return Balance(layers=layers, load_LE=load_LE.double(), bias_LS=bias_LS)


def accumulate(
    learner: Learner,
    config: TaskConfig,
    batch: StepBatch,
    rates: StepRates,
    progress: Progress | None = None,
    reduce: Callable[[int], None] = lambda stage: None,
    by_source: SumsBySource | None = None,
) -> PassResult:
    """Runs all passes of a step; `reduce` gets each stage after its last backward.

    Raises PreemptedError on every rank before any pass has started.
    """
    replica = learner.replica
    task = open_task(config, replica.config.model, replica.config.batch)
    began = time.perf_counter()
    passes = [BatchReader(replica, task, read) for read in batch.reads]
    counts = torch.stack([batches.count() for batches in passes]).sum(0)
    for name, count in batch.more_counts.items():
        counts[task.names.index(name)] += count
    sums = LossSums(task.names, None if by_source is None else {})
    objective = task.objective(counts, rates)
    follow = partial(_count_phases, progress)
    for batches, routes in zip(passes[:-1], batch.routes[:-1], strict=True):
        replica.train(batches, learner.comparison.add(batches, objective), sums, learner.store, follow, routes)
    earlier_seconds = time.perf_counter() - began if len(passes) > 1 else 0.0
    compared = learner.comparison.add(passes[-1], objective)
    execution = replica.train(passes[-1], compared, sums, learner.store, follow, batch.routes[-1], reduce)
    if by_source is not None:
        by_source.add(passes[-1], sums.log_probs or {}, passes[-1].sources_of)
    losses = reduce_losses(replica, task, sums, counts, rates, by_source)
    return PassResult(losses=losses, execution=execution, earlier_seconds=earlier_seconds)


def _count_phases(progress: Progress | None, steps: tuple[Step, ...]) -> Iterable[Step]:
    """Returns the steps of a program, and counts their phases as they run."""
    if progress is None:
        return steps
    computes = [step.action in _PHASES for step in steps]
    return progress.over("first step", steps, sum(computes), lambda step: int(step.action in _PHASES), "phases")


def reduce_losses(
    replica: Replica,
    task: Task,
    sums: LossSums,
    counts: Tensor,
    rates: StepRates,
    by_source: SumsBySource | None = None,
) -> Losses:
    """Returns the losses of a pass over all ranks. All ranks call it."""
    local_sums = sums.settle()
    is_finite_here = bool(local_sums.isfinite().all())
    # The sums by source share the collective of the others.
    source_sums = local_sums.new_empty(0) if by_source is None else by_source.take()
    summed = replica.world.reduce(torch.cat([local_sums, source_sums]), "sum of losses")
    totals, source_totals = summed.split([len(local_sums), len(source_sums)])
    counted = zip(task.names, totals.tolist(), counts.tolist(), strict=True)
    means = {name: total / (n or 1) for name, total, n in counted if n or not is_reported(name)}
    return Losses(
        by_name=means,
        total=task.total(means, rates),
        is_finite_here=is_finite_here,
        by_source=None if by_source is None else by_source.means(source_totals),
    )


def is_reported(name: str) -> bool:
    """Returns whether a task reports a mean in addition to the losses that all tasks have."""
    return name not in (MAIN, BALANCE) and not name.startswith(_MTP)


def rates_of(task: TaskConfig, optim: OptimConfig, sizes: BatchSizes, step: int) -> StepRates:
    """Returns the learning rate, the MTP loss weight and the router bias rate of a step."""
    tokens = sizes.tokens_before(step)
    return StepRates(
        learning_rate=learning_rate(optim, sizes, task.steps, step),
        mtp_loss_weight=task.mtp_loss_weight.at(tokens),
        bias_update=task.bias_update_rate.at(tokens),
    )
