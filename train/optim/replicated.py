"""Implements AdamW with the whole optimizer state on every rank."""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from model.gradients import GradientStore
from train.checkpoint.state import Slice
from train.optim.adamw import MOMENTS, build_adamw, moments_of, spread_step
from train.optim.config import OptimConfig
from train.optim.parameters import ParameterGroups, ReductionGroups


class ReplicatedAdamW:
    """The AdamW optimizer for float32 and float64 weights, which are their own master copies."""

    def __init__(
        self, groups: ParameterGroups, store: GradientStore, replicas: ReductionGroups, config: OptimConfig
    ) -> None:
        self._groups = groups
        self._store = store
        self._replicas = replicas
        self._clip_norm = config.clip_norm
        decayed: list[nn.Parameter] = [
            *groups.matrices.values(),
            *groups.embedding.values(),
            *groups.experts.values(),
        ]
        options: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": list(groups.vectors.values()), "weight_decay": 0.0},
        ]
        self._optimizer = build_adamw(options, config)
        self._norm = 0.0

    def reduce(self) -> float:
        """Sums the gradients in the store over replicas, in place, and returns their global norm."""
        parts = self._parts()
        squares = torch.zeros((), dtype=torch.float64, device=parts[0][0][0].device)
        for parameters, group in parts:
            gradients = [self._store.gradient(parameter) for parameter in parameters]
            _sum_over(gradients, group)
            for gradient in gradients:
                squares += gradient.double().square().sum() / dist.get_world_size(group)
        dist.all_reduce(squares, group=self._replicas.world)
        self._norm = float(squares.sqrt())  # host sync
        return self._norm

    def update(self, learning_rate: float) -> None:
        """Clips the summed gradients, updates the weights, and clears the store."""
        scale = min(1.0, self._clip_norm / (self._norm + 1e-6))
        for parameter in self._groups.all().values():
            parameter.grad = self._store.gradient(parameter).mul_(scale).to(parameter.dtype)
        for group_options in self._optimizer.param_groups:
            group_options["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._store.clear()

    def discard(self) -> None:
        """Discards the gradients."""
        self._store.clear()

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

    def loaded(self) -> None:
        """Copies the loaded step count to all parameters. Weights are their own master copies."""
        spread_step(self._optimizer, list(self._groups.all().values()))

    def follow_weights(self) -> None:
        """Does nothing, because weights are their own master copies."""

    def _parts(self) -> list[tuple[list[nn.Parameter], dist.ProcessGroup]]:
        """Returns the parameters by the process group whose ranks hold them. The first part is not empty."""
        groups, replicas = self._groups, self._replicas
        return [
            ([*groups.matrices.values(), *groups.vectors.values()], replicas.dense),
            (list(groups.embedding.values()), replicas.embedding),
            (list(groups.experts.values()), replicas.experts),
        ]


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
