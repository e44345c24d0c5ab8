"""AdamW for all kinds of sharding, and with the whole state on every rank."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from kernels.adamw import adamw_bf16_moments, compute_coefficients
from model.linear import GradientStore
from train.checkpoint.state import Slice
from train.optim.learning_rate import OptimConfig
from train.optim.parameters import Unit

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bf16MomentsAdamW(torch.optim.Optimizer):
    """The AdamW optimizer for float32 weights with bf16 moments: 4 bytes of state per weight instead of 8.

    Arithmetic is in float32. Moments are rounded to nearest even (arXiv:2412.19437, section 3.3.3). With beta2 near 1
    the second moment would be biased, because its changes are smaller than bf16's resolution, so
    `launch.config.rules` refuses such a beta2.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimConfig) -> None:
        defaults = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
        super().__init__(groups, {**defaults, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient."""
        assert closure is None, "gradients already exist"
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, group)

    def moments(self, parameter: Tensor) -> dict[str, Tensor]:
        """Returns the state of a weight, not a copy: `step` on the host, `exp_avg` and `exp_avg_sq` in bf16."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # A step count on the device would need a host sync.
            state["step"] = torch.zeros(())
            for name in MOMENTS:
                state[name] = torch.zeros_like(parameter, dtype=torch.bfloat16, memory_format=torch.contiguous_format)
        return state

    def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        moments = self.moments(parameter)
        moments["step"] += 1
        update = compute_coefficients(
            int(moments["step"]),
            learning_rate=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
        )
        adamw_bf16_moments(parameter, parameter.grad, moments["exp_avg"], moments["exp_avg_sq"], update)


def build_adamw(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    """Builds the AdamW that `config.moments` selects, for groups of parameters in torch's form."""
    if config.moments == "bf16":
        return Bf16MomentsAdamW(groups, config)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter | Tensor) -> dict[str, Tensor]:
    """Returns the step count and moments of a parameter, not copies. Creates them before the first step."""
    if isinstance(optimizer, Bf16MomentsAdamW):
        return optimizer.moments(parameter)
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return state


def spread_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], num_steps: Tensor) -> None:
    """Sets the step count, a scalar that may be one of the optimizer's own, of all parameters."""
    for parameter in parameters:
        moments_of(optimizer, parameter)["step"].copy_(num_steps)


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
        """Sums gradients over replicas, in place, and returns the sum of their squares, float64.

        Summed over all ranks, it counts each element once.
        """
        groups = self._groups
        squares = torch.zeros((), dtype=torch.float64, device=next(iter(groups.all().values())).device)
        dense = groups.matrices | groups.vectors
        for parameters, group in ((dense, self._replicas.dense), (groups.experts, self._replicas.experts)):
            gradients = [self._store.gradient(parameter) for parameter in parameters.values()]
            _sum_over(gradients, group)
            for gradient in gradients:
                squares += torch.linalg.vector_norm(gradient, dtype=torch.float64).square() / dist.get_world_size(group)
        return squares

    def update(self, learning_rate: float, norm: float) -> None:
        """Clips the summed gradients and updates the weights."""
        scale = min(1.0, self._clip_norm / (norm + 1e-6))
        for parameter in self._groups.all().values():
            parameter.grad = self._store.gradient(parameter).mul_(scale).to(parameter.dtype)
        for group_options in self._optimizer.param_groups:
            group_options["lr"] = learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def discard(self) -> None:
        """Does nothing: all gradients are in the store."""

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns the step count and the moments by parameter name, not copies."""
        named: dict[str, Slice | Tensor] = {}
        for name, parameter in self._groups.all().items():
            moments = moments_of(self._optimizer, parameter)
            named["step"] = moments["step"]
            for key in MOMENTS:
                named[f"{name}.{key}"] = self._groups.place(name, 0, moments[key].view(-1))
        return named

    def loaded(self, num_steps: Tensor) -> None:
        """Copies the loaded step count to all parameters."""
        spread_step(self._optimizer, list(self._groups.all().values()), num_steps)

    def follow_weights(self) -> None:
        """Does nothing: weights are their own master copies."""


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
