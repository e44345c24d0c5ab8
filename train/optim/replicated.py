"""Implements AdamW with the whole optimizer state on every rank."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.gradients import GradientStore
from train.checkpoint.state import Slice
from train.optim.adamw import MOMENTS, build_adamw, moments_of, spread_step
from train.optim.config import OptimConfig
from train.optim.parameters import Unit


class ReplicatedAdamW:
    """The AdamW optimizer of one unit, for float32 and float64 weights, which are their own master copies."""

    def __init__(self, unit: Unit, store: GradientStore, config: OptimConfig) -> None:
        self._groups = groups = unit.groups
        self._replicas = unit.replicas
        self._store = store
        self._clip_norm = config.clip_norm
        options: list[dict[str, Any]] = [
            {"params": [*groups.matrices.values(), *groups.experts.values()], "weight_decay": config.weight_decay},
            {"params": list(groups.vectors.values()), "weight_decay": 0.0},
        ]
        self._optimizer = build_adamw([each for each in options if each["params"]], config)

    def reduce(self) -> Tensor:
        """Sums the gradients in the store over replicas, in place; see `UnitOptimizer.reduce`."""
        shared, routed = self._parameters()
        squares = torch.zeros((), dtype=torch.float64, device=[*shared, *routed][0].device)
        for parameters, group in ((shared, self._replicas.dense), (routed, self._replicas.experts)):
            gradients = [self._store.gradient(parameter) for parameter in parameters]
            _sum_over(gradients, group)
            for gradient in gradients:
                squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / dist.get_world_size(group)
        return squares

    def update(self, learning_rate: float, norm: float) -> None:
        """Clips the summed gradients and updates the weights."""
        scale = min(1.0, self._clip_norm / (norm + 1e-6))
        shared, routed = self._parameters()
        for parameter in (*shared, *routed):
            parameter.grad = self._store.gradient(parameter).mul_(scale).to(parameter.dtype)
        for group_options in self._optimizer.param_groups:
            group_options["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Does nothing, because all gradients are in the store."""

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns the step count and the moments by parameter name, not copies.

        They exist before the first step.
        """
        named: dict[str, Slice | Tensor] = {}
        for name, parameter in self._groups.all().items():
            moments = moments_of(self._optimizer, parameter)
            named["step"] = moments["step"]
            for key in MOMENTS:
                named[f"{name}.{key}"] = self._groups.place(name, 0, moments[key].view(-1))
        return named

    def loaded(self, num_steps: Tensor) -> None:
        """Copies the loaded step count to all parameters. Weights are their own master copies."""
        spread_step(self._optimizer, list(self._groups.all().values()), num_steps)

    def follow_weights(self) -> None:
        """Does nothing, because weights are their own master copies."""

    def _parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Returns the parameters that all ranks of a stage hold, and the routed experts."""
        groups = self._groups
        return [*groups.matrices.values(), *groups.vectors.values()], list(groups.experts.values())


def _sum_over(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """Sums tensors of one type over a group with one all-reduce, in place."""
    if not tensors or dist.get_world_size(group) == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat, group=group)
    offset = 0
    for tensor in tensors:
        tensor.copy_(flat[offset : offset + tensor.numel()].view_as(tensor))
        offset += tensor.numel()
