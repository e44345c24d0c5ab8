"""Compares small runs on all ranks with the whole model, and overlapped runs with sequential ones."""

import hashlib
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import gather_present
from dualpipe.ir import Op, Schedule
from model.objective import LossSums
from model.transformer import BIAS, named_tensors
from train.config import TrainConfig
from train.core.guard import NORM, Guard
from train.core.learner import Learner
from train.core.step import NO_SPIKES, rates_of, train_step
from train.tasks.registry import open_task
from verify.checks import Failure, Findings, Verification
from verify.layouts import CONFIGURED, OPTIMIZER, Trial
from verify.runs import PlainRun, PlainRuns, loader_of, loss_names, opened_learner
from verify.steps import (
    KINDS,
    Difference,
    PlainModel,
    StepValues,
    by_released_name,
    rank_differences,
    ratio_of,
    relative_error,
    run_step,
    tensor_differences,
)

COMPARED_STEPS = 2
_EXPERTS = ".experts."
_TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bf16": 5e-2}
"""Largest error of a tensor over its largest value, by precision."""
_UPDATE_DELAY_SECONDS = 0.1
_MOST_NAMED = 4  # tensors of a failed trial that are reported
_LEAST_SHARE = 0.25  # of the largest error of a kind; smaller ones are not reported
_CHANGE_TOLERANCE = 1e-4  # of the change of a weight in a step, which is smaller than the weight


def tolerance_of(config: TrainConfig) -> float:
    """Returns the tolerance for the precision of a small run."""
    return _TOLERANCES[config.precision.kind]


def check_equality(verification: Verification) -> Findings:
    """Compares two steps of every trial with the whole model's, up to the first trial that differs."""
    plain = PlainRuns(verification.device)
    copies: list[Failure] = []
    failures: list[Failure] = []
    largest = 0.0
    num_run = 0
    for trial in verification.trials:
        comparison = _Comparison(verification, trial, plain.of(trial.config, COMPARED_STEPS))
        failures = comparison.run()
        num_run += 1
        if trial.config.precision == verification.trials[0].config.precision:
            largest = max(largest, comparison.largest_error)
        copies += comparison.copies
        has_unequal_copies = bool(gather_present(copies or None))
        if failures or has_unequal_copies:
            break
    verification.copies = copies
    return Findings(
        summary=f"losses, gradients, norm, router bias and weights of {COMPARED_STEPS} steps equal one rank's in "
        f"{num_run} layouts, largest error {largest:.2g}",
        failures=failures,
        measured=largest,
        tolerance=tolerance_of(verification.trials[0].config),
    )


def check_copies(verification: Verification) -> Findings:
    """Reports copies of a weight that differ between ranks, which the trials of `check_equality` compared."""
    summary = "all copies of weights and router biases are equal bit by bit"
    return Findings(summary=summary, failures=verification.copies)


class _Comparison:
    """The comparison of one trial, on one rank."""

    def __init__(self, verification: Verification, trial: Trial, plain: PlainRun) -> None:
        self._verification = verification
        self._trial = trial
        self._tolerance = tolerance_of(trial.config)
        self._plain = plain
        self._rank = dist.get_rank()
        self._loader = loader_of(trial.config)
        self.largest_error = 0.0
        self.copies: list[Failure] = []

    def run(self) -> list[Failure]:
        """Runs the trial until a step differs, and returns the failures of all ranks. All ranks call it."""
        config = self._trial.config
        before = self._plain.initial
        with opened_learner(self._verification, config) as learner:
            held = {name: tensor.cpu() for name, tensor in named_tensors(learner.replica.model).items()}
            initial = tensor_differences("initial weight", held, before, self._tolerance)
            failures = self._gather("before the first step", initial)
            for step, expected in enumerate(self._plain.steps[:COMPARED_STEPS]):
                if failures:
                    return failures
                values = run_step(learner, config, self._loader, step).on_host()
                failures = self._gather(f"in step {step + 1}", self._differences(step, values, expected, before))
                self.copies = differing_copies(values.weights, expected.weights)
                before = expected.weights
        if failures or self._trial.name != OPTIMIZER:
            return failures
        return self._gather(f"after step {COMPARED_STEPS}", self._run_on())

    def _differences(
        self, step: int, values: StepValues, expected: StepValues, before: Mapping[str, Tensor]
    ) -> Iterator[Difference]:
        """Yields what differs in a step on this rank. The ratio of a weight is that of its change in the step."""
        totals = list(self._totals(values, expected))
        yield from (one for one in totals if one.name in values.gradients)
        mesh = self._trial.config.parallelism
        # Only then does each rank compute the gradients of whole sequences, from equal weights.
        if totals and step == 0 and mesh.pipeline == mesh.context == 1:
            own = {one.name: values.gradients[one.name] for one in totals if one.name in values.gradients}
            yield from tensor_differences("gradient", own, self._own_parts(own), self._tolerance)
        for one in rank_differences(values, expected, loss_names(self._trial.config), self._tolerance):
            if one.kind == "weight" and one.name in before:
                start = before[one.name]
                changes = values.weights[one.name] - start, expected.weights[one.name] - start
                one = replace(one, ratio=ratio_of(*changes, _CHANGE_TOLERANCE))
            yield one

    def _run_on(self) -> Iterator[Difference]:
        """Runs the steps as training does, with late updates, and yields weights and averages that differ."""
        config = self._trial.config
        with opened_learner(self._verification, config) as learner:
            for step in range(COMPARED_STEPS):
                train_step(learner, config.task, self._loader, step, _LateUpdates(learner))
            weights = {name: weight.cpu() for name, weight in named_tensors(learner.replica.model).items()}
            averages = (
                {} if learner.ema is None else {name: value.clone() for name, value in learner.ema.state().items()}
            )
        yield from tensor_differences(
            "late weight", weights, self._plain.steps[COMPARED_STEPS - 1].weights, self._tolerance
        )
        yield from tensor_differences("average", averages, self._averages(), self._tolerance)

    def _averages(self) -> dict[str, Tensor]:
        """Returns the averages of the whole model's weights."""
        averages = dict(self._plain.initial)
        decay = self._trial.config.ema.decay or 0.0
        for step in self._plain.steps[:COMPARED_STEPS]:
            for name, weight in step.weights.items():
                averages[name] = weight if name.endswith(BIAS) else decay * averages[name] + (1 - decay) * weight
        return averages

    def _totals(self, values: StepValues, expected: StepValues) -> Iterator[Difference]:
        """Sums the gradients over ranks and yields those that differ, the same on all ranks."""
        flat = torch.cat(
            [
                values.gradients.get(name, torch.zeros_like(wanted)).flatten()
                for name, wanted in expected.gradients.items()
            ]
        )
        flat = self._reduce(flat.double())
        parts = flat.split([wanted.numel() for wanted in expected.gradients.values()])
        sums = {
            name: part.view_as(wanted) for part, (name, wanted) in zip(parts, expected.gradients.items(), strict=True)
        }
        errors = [relative_error(total, expected.gradients[name]) for name, total in sums.items()]
        self.largest_error = max(self.largest_error, *errors)
        yield from tensor_differences("whole gradient", sums, expected.gradients, self._tolerance)

    def _reduce(self, values: Tensor) -> Tensor:
        values = values.to(self._verification.device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
        return values.cpu()  # host sync

    def _own_parts(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Returns what this rank's sequences contribute to gradients of the first step, by the whole model.

        The rows of a whole expert group reach the group's experts.
        """
        config = self._trial.config
        task = open_task(config.task, config.model, config.batch)
        rates = rates_of(config.task, config.optim, config.batch_sizes, 0)
        num_sequences = config.batch.global_sequences
        whole = task.read(self._loader.batch(0, 0, num_sequences), self._verification.device)
        objective = task.objective(task.count(whole), rates)
        parts: dict[str, Tensor] = {}
        for width in dict.fromkeys((1, config.parallelism.expert)):
            size = num_sequences // config.parallelism.data * width
            batch = task.read(self._loader.batch(0, self._rank // width * size, size), self._verification.device)
            plain = PlainModel(config, 0, self._verification.device)
            plain.model.loss(plain.compared(batch), objective, LossSums(task.names)).backward()
            gradients = by_released_name(plain.model, lambda parameter: parameter.grad)
            is_experts = width > 1
            parts |= {name: gradients[name].cpu() for name in names if not is_experts or _EXPERTS in name}
        return parts

    def _gather(self, when: str, differences: Iterable[Difference]) -> list[Failure]:
        """Returns the failures of the first kind of value that differs on any rank. All ranks call it."""
        own = sorted(differences, key=lambda one: -one.error)
        worst = [one for kind in KINDS for one in [one for one in own if one.kind == kind][:_MOST_NAMED]]
        gathered = gather_present((self._rank, worst) if worst else None)
        found = [(rank, one) for rank, ones in gathered for one in ones]
        if not found:
            return []
        losses = [one for _, one in found if one.kind == "loss"]
        kind = "loss" if _has_own_means(losses) else min((one.kind for _, one in found), key=KINDS.index)
        found = [(rank, one) for rank, one in found if one.kind == kind]
        # Wrong sequences on one rank change the number of targets, and so the parts of all ranks a little.
        least = max(one.error for _, one in found) * _LEAST_SHARE
        num_holders = Counter(one.name for _, one in found)
        cause = f"the {self._trial.name}" + ("" if self._trial.axis else ", as each axis alone agrees")
        failures = (
            one.failure(
                None if kind == "whole gradient" and num_holders[one.name] > 2 else rank,
                f"{when} of {self._trial}",
                cause,
            )
            for rank, one in found
            if not one.error < least
        )
        return list(dict.fromkeys(failures))


def _has_own_means(losses: Sequence[Difference]) -> bool:
    """Returns whether ranks seem to divide losses by their own number of targets instead of the job's.

    Ranks then report unequal losses, or a whole multiple of the expected one if their numbers are equal.
    """
    ratios = {(one.name, round(one.ratio, 3)) for one in losses if one.ratio is not None}
    is_multiple = any(ratio > 1 and ratio.is_integer() for _, ratio in ratios)
    return is_multiple or len(ratios) > len({name for name, _ in ratios})


class _LateUpdates(Guard):
    """Accepts every step and delays its update, so that a pass that does not wait reads old weights."""

    def __init__(self, learner: Learner) -> None:
        super().__init__(NO_SPIKES)
        self._learner = learner

    def judge(self, name: str, value: float) -> str:
        """Accepts the value, and delays the update that follows the norm."""
        if name == NORM:
            self._learner.optimizer.after_updates(partial(time.sleep, _UPDATE_DELAY_SECONDS))
        return ""


def differing_copies(weights: Mapping[str, Tensor], names: Iterable[str]) -> list[Failure]:
    """Compares each tensor bit by bit with the copy of the lowest rank that holds one. All ranks call it."""
    rank = dist.get_rank()
    names = list(names)
    digests = torch.tensor([_digest(weights[name]) if name in weights else 0 for name in names], dtype=torch.int64)
    is_held = torch.tensor([name in weights for name in names])
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    first = torch.where(is_held, rank, dist.get_world_size()).to(device)
    dist.all_reduce(first, op=dist.ReduceOp.MIN)
    first = first.cpu()
    expected = torch.where(first == rank, digests, 0).to(device)
    dist.all_reduce(expected)
    differs = is_held & (digests != expected.cpu())
    return [
        Failure(
            rank=rank,
            subject=f"weight of {name}",
            difference=f"is not bit by bit that of rank {source}",
            cause="copies of a tied or replicated weight receive different sums of gradients or different updates",
        )
        for name, source, is_other in zip(names, first.tolist(), differs.tolist(), strict=True)
        if is_other
    ][:_MOST_NAMED]


def _digest(tensor: Tensor) -> int:
    content = tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little", signed=True)


def check_overlap(verification: Verification) -> Findings:
    """Runs the configured layout with members of groups next to each other and one after the other."""
    trial = next(trial for trial in verification.trials if trial.name == CONFIGURED)
    steps: dict[str, list[StepValues]] = {}
    is_exact = False
    for pairing in ("overlapped", "sequential"):
        config = replace(trial.config, schedule=replace(trial.config.schedule, pairing=pairing))
        with opened_learner(verification, config) as learner:
            is_exact = keeps_sums(learner.replica.schedule, has_mtp=config.model.mtp_depth > 0)
            loader = loader_of(config)
            steps[pairing] = [run_step(learner, config, loader, step).on_host() for step in range(COMPARED_STEPS)]
    tolerance = 0.0 if is_exact else tolerance_of(trial.config)
    failures = []
    for step, (one, other) in enumerate(zip(steps["overlapped"], steps["sequential"], strict=True), 1):
        reduced = replace(other, gradients=other.reduced)
        differing = list(rank_differences(one, reduced, loss_names(trial.config), tolerance))
        differing += tensor_differences("gradient", one.gradients, other.gradients, tolerance)
        where = f"in step {step} if groups overlap, in {trial}"
        cause = "a lane reads a tensor before another one has written it, or frees it too early"
        failures += [one.failure(dist.get_rank(), where, cause) for one in differing[:_MOST_NAMED]]
        if failures:
            break
    how = "bit by bit" if is_exact else f"within {tolerance:g}, as the order of additions differs"
    return Findings(summary=f"overlapped groups equal sequential ones {how}", failures=failures, tolerance=tolerance)


def keeps_sums(schedule: Schedule, *, has_mtp: bool) -> bool:
    """Returns whether overlapping leaves the order of all additions as it is.

    It does not if a B is next to another backward of its stage, which would reorder weight gradients, or if two
    backwards of a group add to the embedding, which the last stage of a model with MTP modules reads too.
    """
    embedding = {0, schedule.num_stages - 1} if has_mtp else {0}
    for group in (group for groups in schedule.ranks for group in groups if len(group) > 1):
        backwards = [op for op in group if op.kind is not Op.FORWARD]
        full = {op.stage for op in backwards if op.kind is Op.BACKWARD}
        stages = [op.stage for op in backwards]
        num_added = sum(op.stage in embedding and op.kind is not Op.BACKWARD_WEIGHT for op in backwards)
        if num_added > 1 or any(stages.count(stage) > 1 for stage in full):
            return False
    return True
