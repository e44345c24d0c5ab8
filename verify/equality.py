"""Compares small runs on all ranks with the whole model, and overlapped runs with sequential ones."""

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import broadcast_first, gather_present
from comm.layout import Layout
from data.loader import Loader
from dualpipe.ir import Op, Schedule
from model.objective import LossSums
from model.transformer import BIAS, named_tensors
from train.config import TrainConfig
from train.core.guard import NORM, Guard
from train.core.learner import Learner
from train.core.step import NO_SPIKES, rates_of, train_step
from train.tasks.registry import open_task
from verify.causes import Evidence, Share, explain
from verify.checks import Failure, Findings, Verification
from verify.layouts import CONFIGURED, OPTIMIZER, Trial
from verify.runs import PlainRun, PlainRuns, ScheduleDiffersError, loader_of, loss_names, opened_learner
from verify.steps import (
    Difference,
    PlainModel,
    StepValues,
    by_released_name,
    rank_differences,
    ratio_of,
    relative_error,
    run_step,
    start_biases,
    tensor_differences,
)

COMPARED_STEPS = 2
_TOLERANCES = {"float64": 1e-10, "float32": 1e-4, "bf16": 5e-2}
"""Largest error of a tensor over its largest value, by precision."""
_UPDATE_DELAY_SECONDS = 0.1
_MOST_NAMED = 4  # tensors of a failed trial that are reported
_MOST_SUMMED = 64  # ranks whose parts of a wrong sum are compared
_LIKE_TOLERANCE = 0.02  # of a gradient that is compared with another rank's
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
        try:
            failures = comparison.run()
            has_failed = bool(gather_present(failures or None))
        except ScheduleDiffersError as differing:
            failures = differing.failures
            has_failed = True
        num_run += 1
        if trial.config.precision == verification.trials[0].config.precision:
            largest = max(largest, comparison.largest_error)
        copies += comparison.copies
        if has_failed or gather_present(copies or None):
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
        """Runs the trial until a step differs, and returns this rank's failures. All ranks call it."""
        config = self._trial.config
        with opened_learner(self._verification, config) as learner:
            start_biases(learner.replica.model)
            held = {name: tensor.cpu() for name, tensor in named_tensors(learner.replica.model).items()}
            by_rank = self._gather(list(self._weights(held, self._plain.initial)))
            if by_rank:
                return self._explain(Evidence(trial=self._trial, step=0, totals=(), by_rank=by_rank))
            before = self._plain.initial
            for step, expected in enumerate(self._plain.steps[:COMPARED_STEPS]):
                values = run_step(learner, config, self._loader, step).on_host()
                totals = list(self._totals(values, expected))
                own = list(rank_differences(values, expected, loss_names(config), self._tolerance))
                own = [one for one in own if one.kind != "weight"]
                own += self._weights(values.weights, expected.weights, before)
                by_rank = self._gather(own)
                self.copies = differing_copies(values.weights, expected.weights)
                if totals or by_rank:
                    return self._explain(self._evidence(step, values, totals, by_rank))
                before = expected.weights
        by_rank = self._gather(list(self._run_on())) if self._trial.name == OPTIMIZER else {}
        return self._explain(Evidence(trial=self._trial, step=COMPARED_STEPS, totals=(), by_rank=by_rank))

    def _run_on(self) -> Iterator[Difference]:
        """Runs the steps as training does, with late updates, and yields weights and averages that differ."""
        config = self._trial.config
        with opened_learner(self._verification, config) as learner:
            start_biases(learner.replica.model)
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

    def _weights(
        self, values: Mapping[str, Tensor], expected: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
    ) -> Iterator[Difference]:
        """Yields weights that differ; their ratio is that of the changes in the step."""
        for one in tensor_differences("weight", values, expected, self._tolerance):
            ratio = None
            if before is not None and one.name in expected:
                start = before[one.name]
                ratio = ratio_of(values[one.name] - start, expected[one.name] - start, _CHANGE_TOLERANCE)
            yield replace(one, ratio=ratio)

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
        yield from tensor_differences("gradient", sums, expected.gradients, self._tolerance)

    def _reduce(self, values: Tensor) -> Tensor:
        values = values.to(self._verification.device if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(values)
        return values.cpu()  # host sync

    def _gather(self, own: list[Difference]) -> dict[int, list[Difference]]:
        """Returns the first differences of each rank that has some."""
        worst = sorted(own, key=lambda one: -one.error)[:_MOST_NAMED] if own else []
        kinds = {one.kind for one in own}
        chosen = [one for one in own if one in worst or one.kind in kinds.difference(each.kind for each in worst)]
        return dict(gather_present((self._rank, chosen) if own else None))

    def _explain(self, evidence: Evidence) -> list[Failure]:
        failures = explain(evidence)
        return [one for one in failures if one.rank == self._rank or (one.rank is None and self._rank == 0)]

    def _evidence(
        self, step: int, values: StepValues, totals: list[Difference], by_rank: dict[int, list[Difference]]
    ) -> Evidence:
        named = sorted(totals, key=lambda one: -one.error)[:_MOST_NAMED]
        holders: dict[str, list[int]] = {}
        held = gather_present((self._rank, [one.name for one in named if one.name in values.gradients]))
        for rank, names in held:
            for name in names:
                holders.setdefault(name, []).append(rank)
        mesh = self._trial.config.parallelism
        is_separable = mesh.pipeline == 1 and mesh.context == 1 and not step
        parts = _Parts(self._trial.config, self._verification.device, self._loader) if is_separable else None
        wrong = [one for found in by_rank.values() for one in found if one.kind == "reduced gradient"]
        return Evidence(
            trial=self._trial,
            step=step + 1,
            totals=totals,
            by_rank=by_rank,
            shares=() if parts is None or not named else parts.compare([one.name for one in named], values),
            sums=self._sums(wrong[0].name, values) if wrong and not totals else {},
            count_ratios={} if parts is None else parts.count_ratios(),
            holders=holders,
        )

    def _sums(self, name: str, values: StepValues) -> dict[int, str]:
        """Finds the group of ranks over which each rank's wrong sum of a gradient was computed, if one fits."""
        mesh = self._trial.config.parallelism
        if mesh.world_size > _MOST_SUMMED:
            return {}
        layout = Layout(mesh, self._verification.config.cluster.ranks_per_node)
        parts = dict(gather_present((self._rank, values.gradients[name]) if name in values.gradients else None))
        found = None
        groups = {
            "its own part alone": (self._rank,),
            "the expert group": layout.expert_group(self._rank),
            "the context group": layout.context_group(self._rank),
            "the ranks with the same experts": layout.expert_data_group(self._rank, mirrored=False),
            "the ranks of the stage": layout.stage_group(self._rank, mirrored=False),
            "the ranks of the stage and its mirror": layout.stage_group(self._rank, mirrored=True),
        }
        for group, ranks in groups.items() if name in values.reduced else ():
            total = sum((parts[rank] for rank in ranks if rank in parts), torch.zeros(()))
            if found is None and relative_error(values.reduced[name], total) <= self._tolerance:
                found = f"the gradient is summed over ranks {list(ranks)} ({group}) instead of all that hold the weight"
        return dict(gather_present(None if found is None else (self._rank, found)))


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


class _Parts:
    """What the sequences of each data index contribute to the first step, computed by the whole model."""

    def __init__(self, config: TrainConfig, device: torch.device, loader: Loader) -> None:
        self._config = config
        self._device = device
        task = open_task(config.task, config.model, config.batch)
        size = config.batch.global_sequences // config.parallelism.data
        self._batches = [
            task.read(loader.batch(0, first, size), device) for first in range(0, config.batch.global_sequences, size)
        ]
        self._counts = torch.stack([task.count(batch) for batch in self._batches])
        self._names = task.names

    def count_ratios(self) -> dict[int, dict[str, float]]:
        """Returns the job's number of targets over that of each rank, by loss."""
        ratios = self._counts.sum(0) / self._counts
        return {rank: dict(zip(self._names, row.tolist(), strict=True)) for rank, row in enumerate(ratios)}

    def compare(self, names: Sequence[str], values: StepValues) -> list[Share]:
        """Returns the parts of some gradients that differ from the expected ones. All ranks call it."""
        parts = broadcast_first(self._gradients(names) if dist.get_rank() == 0 else None)
        assert parts is not None
        rank = dist.get_rank()
        expert = self._config.parallelism.expert
        own: list[Share] = []
        for name in names:
            if name not in values.gradients:
                continue
            value = values.gradients[name]
            # Rows of a whole expert group reach an expert.
            width = expert if ".experts." in name else 1
            groups = [parts[name][start : start + width] for start in range(0, len(parts[name]), width)]
            wanted = [torch.stack(group).sum(0) for group in groups]
            error = relative_error(value, wanted[rank // width])
            tolerance = tolerance_of(self._config)
            if error <= tolerance:
                continue
            # The number of targets, and so the weights of the losses, may differ too.
            like = [other for other, part in enumerate(wanted) if ratio_of(value, part, _LIKE_TOLERANCE)]
            ratio = ratio_of(value, wanted[rank // width], 10 * tolerance)
            like_rank = like[0] * width if like and rank // width not in like else None
            own.append(Share(rank=rank, name=name, error=error, ratio=ratio, like_rank=like_rank))
        return [share for shares in gather_present(own or None) for share in shares]

    def _gradients(self, names: Sequence[str]) -> dict[str, list[Tensor]]:
        config = self._config
        rates = rates_of(config.task, config.optim, config.batch_sizes, 0)
        task = open_task(config.task, config.model, config.batch)
        objective = task.objective(self._counts.sum(0), rates)
        found: dict[str, list[Tensor]] = {name: [] for name in names}
        model = PlainModel(config, 0, self._device).model
        for batch in self._batches:
            model.zero_grad()
            model.loss(batch, objective, LossSums(task.names)).backward()
            gradients = by_released_name(model, lambda parameter: parameter.grad)
            for name in names:
                found[name].append(gradients[name].cpu())
        return found


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
            start_biases(learner.replica.model)
            loader = loader_of(config)
            steps[pairing] = [run_step(learner, config, loader, step).on_host() for step in range(COMPARED_STEPS)]
    tolerance = 0.0 if is_exact else tolerance_of(trial.config)
    failures = []
    for step, (one, other) in enumerate(zip(steps["overlapped"], steps["sequential"], strict=True), 1):
        reduced = replace(other, gradients=other.reduced)
        differing = list(rank_differences(one, reduced, loss_names(trial.config), tolerance))
        differing += tensor_differences("gradient", one.gradients, other.gradients, tolerance)
        failures += [
            Failure(
                rank=dist.get_rank(),
                subject=f"{difference.kind} of {difference.name}",
                difference=f"differs by {difference.error:.3g} in step {step} if groups overlap, in {trial}",
                cause="a lane reads a tensor before another one has written it, or frees it too early",
            )
            for difference in differing[:_MOST_NAMED]
        ]
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
