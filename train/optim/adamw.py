"""Builds AdamW for all kinds of sharding: torch's own, or one that keeps its moments in bf16."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kernels.adamw import adamw_bf16_moments, compute_coefficients
from train.optim.config import OptimConfig

MOMENTS = ("exp_avg", "exp_avg_sq")


class Bf16MomentsAdamW(torch.optim.Optimizer):
    """The AdamW optimizer for float32 weights with bf16 moments: 4 bytes of state per weight instead of 8.

    Arithmetic is in float32. Moments are rounded to nearest even when they are stored (arXiv:2412.19437, section
    3.3.3). With beta2 = 0.95, rounding changes updates by 0.4 %, less than stochastic rounding does. With beta2 near 1
    the second moment would be biased, because its changes are smaller than bf16's resolution.
    `launch.config.model_rules` refuses such a beta2.
    """

    def __init__(self, groups: Sequence[dict[str, Any]], config: OptimConfig) -> None:
        defaults = {"lr": config.learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
        super().__init__(groups, {**defaults, "weight_decay": config.weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Updates every weight that has a gradient.

        A closure is not supported, because gradients already exist.
        """
        assert closure is None
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
    """Builds the AdamW that `config.moments` selects.

    Args:
        groups: parameter groups with their weight decay, in the form of torch's optimizers.
    """
    if config.moments == "bf16":
        return Bf16MomentsAdamW(groups, config)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def moments_of(optimizer: torch.optim.Optimizer, parameter: nn.Parameter | Tensor) -> dict[str, Tensor]:
    """Returns the step count and moments of a parameter, not copies.

    They are created before the first step.
    """
    if isinstance(optimizer, Bf16MomentsAdamW):
        return optimizer.moments(parameter)
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), device=parameter.device)
        state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
    return state


def spread_step(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], num_steps: Tensor) -> None:
    """Sets the step count of all parameters, which have been updated equally often.

    Args:
        parameters: all that the optimizer updates.
        num_steps: the count, a scalar; it may be one of the optimizer's own.
    """
    for parameter in parameters:
        moments_of(optimizer, parameter)["step"].copy_(num_steps)
