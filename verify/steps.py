"""Runs steps of a learner and of the whole model in one process, and compares their values.

The whole model runs under ordinary autograd and torch's own optimizer and clipping. Both name tensors as a checkpoint
does.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.protocol import Dispatcher
from data.config import BatchSizes
from data.loader import Loader
from model.block import RoutedExperts
from model.objective import BALANCE, LossSums, MicroBatch, Objective
from model.objectives.pairs import REFERENCE
from model.objectives.policy import TokenLogProbs
from model.transformer import Transformer, initialize_weights, named_tensors, routers
from train.config import TrainConfig
from train.core.learner import Learner
from train.core.step import accumulate, rates_of, update_router_bias
from train.core.world import weight_dtype
from train.optim.adamw import MOMENTS, group_parameters
from train.optim.matrices import stack_of
from train.optim.registry import OPTIMIZERS, is_updated_whole
from train.tasks.registry import TASKS, open_task
from verify.checks import Failure

TINY = 1e-30  # least size of the largest expected value by which differences are divided
_LEAST_LOSS_ERROR = 1e-12


@dataclass(slots=True)
class StepValues:
    """The values of one step on one rank or of the whole model, with tensors by released name.

    Attributes:
        losses: the mean of each loss over the job, and their weighted total.
        gradients: what this rank contributed; the sum over ranks is the gradient of the batch.
        reduced: gradients after the sum over ranks; empty if the optimizer shards them.
        weights: weights and router biases after the update.
    """

    losses: list[float]
    norm: float
    gradients: dict[str, Tensor]
    reduced: dict[str, Tensor]
    weights: dict[str, Tensor]

    def on_host(self) -> "StepValues":
        """Returns the values with all tensors on the host."""
        tensors = [
            {name: tensor.cpu() for name, tensor in named.items()}  # host sync
            for named in (self.gradients, self.reduced, self.weights)
        ]
        return StepValues(self.losses, self.norm, *tensors)


def run_step(learner: Learner, config: TrainConfig, loader: Loader, step: int) -> StepValues:
    """Runs a step on all ranks and returns the values of this one. All ranks call it."""
    model = learner.replica.model
    rates = rates_of(config.task, config.optim, loader.sizes, step)
    losses = accumulate(learner, config.task, learner.hook.prepare(loader, step), rates).losses
    learner.hook.finish()
    gradients = by_released_name(model, learner.store.gradient)
    norm = learner.optimizer.norm()
    # Sums that only owners have are not compared.
    keeps_sums = config.optim.sharding == "replicated" and OPTIMIZERS.get(config.optim.kind).matrices is None
    reduced = by_released_name(model, learner.store.gradient) if keeps_sums else {}
    learner.optimizer.update(rates.learning_rate)
    update_router_bias(learner.replica, rates.bias_update)
    weights = {name: tensor.clone() for name, tensor in named_tensors(learner.replica.model).items()}
    learner.comparison.refresh(learner.replica, step + 1)
    return StepValues([*losses.by_name.values(), losses.total], norm, gradients, reduced, weights)


def start_biases(model: Transformer, starved: int = 0) -> None:
    """Makes the first `starved` experts of each layer never chosen; the others start a little apart."""
    for layer, router in routers(model).items():
        bias = torch.linspace(-0.05, 0.05, len(router.e_score_correction_bias)) * (1 + layer % 3)
        bias[:starved] = -10.0
        router.e_score_correction_bias.copy_(bias)


def by_released_name(model: Transformer, value_of: Callable[[nn.Parameter], Tensor | None]) -> dict[str, Tensor]:
    """Returns a copy of each parameter's value, such as its gradient, by its released name."""

    def take(parameter: nn.Parameter) -> Tensor:
        value = value_of(parameter)
        return torch.zeros_like(parameter) if value is None else value.clone()

    named: dict[str, Tensor] = {}
    for path, module in model.named_modules():
        if not isinstance(module, RoutedExperts):
            named |= {f"{path}.{name}": take(weight) for name, weight in module.named_parameters(recurse=False)}
            continue
        gate_up = take(module.gate_up_proj)
        down = take(module.down_proj)
        half = gate_up.shape[1] // 2
        for index, expert in enumerate(module.experts):
            named[f"{path}.{expert}.gate_proj.weight"] = gate_up[index, :half]
            named[f"{path}.{expert}.up_proj.weight"] = gate_up[index, half:]
            named[f"{path}.{expert}.down_proj.weight"] = down[index]
    return named


def local_dispatcher(config: TrainConfig) -> Dispatcher:
    """Returns a dispatcher with all experts in this process. It quantizes rows if the run does."""
    dispatcher: Dispatcher = LocalDispatcher(config.model.num_routed_experts)
    return Fp8Dispatcher(dispatcher) if config.dispatch.payload == "fp8" else dispatcher


class PlainModel:
    """The whole model of a run in one process, with its optimizer and its task's reference."""

    def __init__(self, config: TrainConfig, starved: int = 0, device: torch.device | None = None) -> None:
        """Builds the model with the run's initial weights; `starved` as for `start_biases`."""
        with device or torch.device("cpu"):
            self.model = Transformer(config.model, local_dispatcher(config), weight_dtype(config.precision))
        initialize_weights(self.model, config.seed)
        start_biases(self.model, starved)
        has_reference = TASKS.get(config.task.kind).has_reference(config.task)
        self._reference = deepcopy(self.model) if has_reference else None
        groups = group_parameters(self.model)
        self._config = config
        self._rule = OPTIMIZERS.get(config.optim.kind).matrices
        matrices = groups.matrices | groups.experts
        whole = {name for name in matrices if self._rule is not None and is_updated_whole(name)}
        self._whole = {name: matrices[name] for name in whole}
        self._buffers: dict[str, dict[str, Tensor]] = {name: {} for name in whole}
        self._optimizer = torch.optim.AdamW(
            [
                {
                    "params": [matrices[name] for name in matrices.keys() - whole],
                    "weight_decay": config.optim.weight_decay,
                },
                {"params": list(groups.vectors.values()), "weight_decay": 0.0},
            ],
            betas=(config.optim.beta1, config.optim.beta2),
            eps=config.optim.eps,
        )

    @torch.no_grad()
    def compared(self, batch: MicroBatch) -> MicroBatch:
        """Returns a micro-batch with its targets' log-probabilities under the reference, if the task has one.

        They are bit by bit those of equal weights in training, as counts of pairs with a positive margin need.
        """
        if self._reference is None:
            return batch
        sums = LossSums((BALANCE,), {})
        self._reference.loss(batch, TokenLogProbs(), sums)
        assert sums.log_probs is not None
        return replace(batch, extras={**batch.extras, REFERENCE: sums.log_probs[0, 0]})

    def step(
        self,
        batches: Sequence[MicroBatch],
        sizes: BatchSizes,
        step: int,
        adapt: Callable[[Objective], Objective] = lambda objective: objective,
    ) -> StepValues:
        """Runs a step of the micro-batches; `adapt` may complete the task's objective."""
        config = self._config
        rates = rates_of(config.task, config.optim, sizes, step)
        task = open_task(config.task, config.model, config.batch)
        counts = torch.stack([task.count(batch) for batch in batches]).sum(0)
        objective = adapt(task.objective(counts, rates))
        sums = LossSums(task.names)
        for batch in batches:
            self.model.loss(self.compared(batch), objective, sums).backward()
        gradients = by_released_name(self.model, lambda parameter: parameter.grad)
        norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.optim.clip_norm))
        for options in self._optimizer.param_groups:
            options["lr"] = rates.learning_rate
        self._optimizer.step()
        if config.optim.moments == "bf16":
            for state in self._optimizer.state.values():
                for name in MOMENTS:
                    state[name].copy_(state[name].bfloat16())
        self._update_matrices(rates.learning_rate)
        self.model.zero_grad()
        for router in routers(self.model).values():
            router.update_bias(router.load, rates.bias_update)
            router.load.zero_()
        interval = TASKS.get(config.task.kind).reference_interval(config.task)
        if self._reference is not None and interval is not None and (step + 1) % interval == 0:
            self._reference = deepcopy(self.model)
        means = dict(zip(task.names, (sums.settle() / counts).tolist(), strict=True))
        weights = {name: tensor.clone() for name, tensor in named_tensors(self.model).items()}
        return StepValues([*means.values(), task.total(means, rates)], norm, gradients, gradients, weights)

    @torch.no_grad()
    def _update_matrices(self, learning_rate: float) -> None:
        """Updates what the optimizer's rule for matrices updates, each weight with all its matrices at once."""
        optim = self._config.optim
        for name, weight in self._whole.items():
            assert self._rule is not None, name
            assert weight.grad is not None, name
            weights = weight.view(stack_of(name, tuple(weight.shape)))
            gradients = weight.grad.view(weights.shape).to(torch.promote_types(weight.dtype, torch.float32))
            dtype = torch.bfloat16 if optim.moments == "bf16" else gradients.dtype
            buffers = self._buffers[name]
            for key in self._rule.buffers:
                buffers.setdefault(key, torch.zeros_like(gradients, dtype=dtype))
            move = self._rule.update(weights, gradients, buffers, optim)
            weights.mul_(1 - learning_rate * optim.weight_decay).sub_(move, alpha=learning_rate)


Kind = Literal[
    "initial weight",
    "gradient",
    "whole gradient",
    "reduced gradient",
    "gradient norm",
    "weight",
    "loss",
    "late weight",
    "average",
]
"""Kinds of values. A gradient is one rank's part, and a whole one the sum of all parts."""

KINDS: tuple[Kind, ...] = get_args(Kind)
"""In the order of a step, as later values follow from earlier ones. A loss comes late: only its report may be wrong."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """A value that differs from that of the whole model.

    `error` is the largest difference over the largest expected value, and `ratio` the value over the expected one if
    all elements agree on it.
    """

    kind: Kind
    name: str
    error: float
    ratio: float | None

    def failure(self, rank: int | None, where: str, cause: str) -> Failure:
        """Returns a failure of a rank, or of all ranks."""
        changed = "its update" if self.kind == "weight" else "it"
        factor = "" if self.ratio is None else f", {changed} is {self.ratio:.6g} times the expected value"
        difference = f"differs by {self.error:.3g} {where}{factor}"
        return Failure(rank=rank, subject=f"{self.kind} of {self.name}", difference=difference, cause=cause)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Returns the largest difference over the largest expected value."""
    expected = expected.double()
    return float((value.double() - expected).abs().max() / expected.abs().max().clamp_min(TINY))


def ratio_of(value: Tensor, expected: Tensor, tolerance: float) -> float | None:
    """Returns the factor by which a tensor differs from another one; None if none fits all elements."""
    value, expected = value.double().flatten(), expected.double().flatten()
    factor = (value @ expected) / (expected @ expected).clamp_min(TINY)
    rest = (value - factor * expected).abs().max()
    return float(factor) if rest <= tolerance * expected.abs().max() * factor.abs().clamp_min(1.0) else None


def tensor_differences(
    kind: Kind, values: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float
) -> Iterator[Difference]:
    """Yields the tensors that differ from those of the same name, or that have no expected one."""
    for name, value in values.items():
        if name not in expected:
            yield Difference(kind=kind, name=name, error=float("inf"), ratio=None)
            continue
        error = relative_error(value, expected[name])
        if not error <= tolerance:  # also if it is not a number
            ratio = ratio_of(value, expected[name], 10 * tolerance)
            yield Difference(kind=kind, name=name, error=error, ratio=ratio)


def rank_differences(
    values: StepValues, expected: StepValues, names: Iterable[str], tolerance: float
) -> Iterator[Difference]:
    """Yields what differs in a rank's step from the whole model's, except gradients before their sum.

    `names` are those of the losses.
    """
    numbers: list[tuple[Kind, str, float, float]] = [("gradient norm", "the batch", values.norm, expected.norm)]
    numbers += [
        ("loss", name, value, wanted)
        for name, value, wanted in zip([*names, "total"], values.losses, expected.losses, strict=True)
    ]
    for kind, name, value, wanted in numbers:
        error = abs(value - wanted)
        if not error <= max(tolerance * abs(wanted), _LEAST_LOSS_ERROR):
            ratio = value / wanted if wanted else None
            yield Difference(kind=kind, name=name, error=error / max(abs(wanted), TINY), ratio=ratio)
    yield from tensor_differences("reduced gradient", values.reduced, expected.gradients, tolerance)
    yield from tensor_differences("weight", values.weights, expected.weights, tolerance)
