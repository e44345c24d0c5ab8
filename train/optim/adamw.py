"""Groups a rank's parameters by process group and stage, and updates them by AdamW."""

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import ProcessGroup, get_process_group_ranks

from comm.groups import Groups
from dualpipe.ir import Schedule
from dualpipe.runtime.program import first_use_order, reduction_order
from kernels.adamw import adamw_bf16_moments, compute_coefficients
from model.block import RoutedExperts
from model.linear import GradientStore
from model.stage import Stage
from model.transformer import Transformer
from train.optim.learning_rate import OptimConfig

EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True, eq=False)
class Slice:
    """One rank's consecutive elements of a flat tensor, from `offset`. Ranks may hold the same."""

    whole: int
    offset: int
    local: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ReductionGroups:
    """The process groups over which gradients are summed and optimizer state is sharded.

    `dense` are the ranks with the same stages (mirror x data), `experts` those of them with the same routed experts,
    and `expert` those over which the experts of one data replica are sharded.
    """

    dense: ProcessGroup
    experts: ProcessGroup
    expert: ProcessGroup


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroups:
    """The parameters of a rank by name and group, in the same order on all replicas.

    `vectors` are norms, without weight decay. `experts` stack the routed experts `held` of `num_experts` in a layer.
    """

    matrices: dict[str, nn.Parameter]
    vectors: dict[str, nn.Parameter]
    experts: dict[str, nn.Parameter]
    held: Sequence[int]
    num_experts: int

    def all(self) -> dict[str, nn.Parameter]:
        """Returns all parameters by name."""
        return self.matrices | self.vectors | self.experts

    def only(self, names: Container[str]) -> "ParameterGroups":
        """Returns the groups without the parameters that have other names."""

        def part(named: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
            return {name: parameter for name, parameter in named.items() if name in names}

        return replace(self, matrices=part(self.matrices), vectors=part(self.vectors), experts=part(self.experts))

    def place(self, name: str, first: int, values: Tensor) -> Slice:
        """Returns flat values that begin at element `first` as a slice of the job's parameter."""
        num_elements = self.all()[name].numel()
        if name not in self.experts:
            return Slice(num_elements, first, values)
        size = num_elements // len(self.held)
        return Slice(size * self.num_experts, size * self.held[0] + first, values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Unit:
    """The parameters of one stage, or those that several stages read.

    All ranks of `replicas.dense` have a unit with the same parameters.

    `stages` are the `readers` that this rank holds. `reduction` and `first_use` are its places in orders of the job.
    """

    readers: tuple[int, ...]
    stages: tuple[int, ...]
    groups: ParameterGroups
    replicas: ReductionGroups
    reduction: tuple[int, int]
    first_use: tuple[int, int]

    def __str__(self) -> str:
        return f"stage {' and '.join(map(str, self.readers))}"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return list(self.groups.all().values())

    @property
    def ranks(self) -> list[int]:
        """Global ranks that hold the parameters, without other experts."""
        return get_process_group_ranks(self.replicas.dense)


@dataclass(frozen=True, kw_only=True, slots=True)
class StageOrders:
    """All stages, by the end of their last backward and by their first forward; equal on all ranks."""

    reduction: Sequence[int]
    first_use: Sequence[int]

    @property
    def ends(self) -> tuple[int, int]:
        """The first and the last stage."""
        return 0, len(self.reduction) - 1


def units_of(model: Transformer, stages: Mapping[int, Stage], schedule: Schedule, groups: Groups) -> list[Unit]:
    """Splits the parameters of a rank's stages into units in the order of their reductions."""
    return split_into_units(
        group_parameters(model),
        ReductionGroups(dense=groups.stage, experts=groups.expert_data, expert=groups.expert),
        {number: stage.parameters() for number, stage in stages.items()},
        StageOrders(reduction=reduction_order(schedule), first_use=first_use_order(schedule)),
        None if groups.embedding is groups.stage else groups.embedding,
    )


def split_into_units(
    groups: ParameterGroups,
    replicas: ReductionGroups,
    stages: Mapping[int, Iterable[nn.Parameter]],
    orders: StageOrders,
    embedding: ProcessGroup | None = None,
) -> list[Unit]:
    """Splits a rank's parameters by their stages, into units in the order of their reductions.

    Ranks that share several units have them in the same order.

    `embedding` are all ranks that hold the embedding, if MTP modules on ranks with other stages hold a copy.
    """
    users: dict[int, list[int]] = {}
    for stage in sorted(stages):
        for key in {id(parameter) for parameter in stages[stage]}:
            users.setdefault(key, []).append(stage)
    parts: dict[tuple[int, ...], list[str]] = {}
    for name, parameter in groups.all().items():
        readers = orders.ends if embedding is not None and name == EMBEDDING else tuple(users[id(parameter)])
        parts.setdefault(readers, []).append(name)
    units = []
    for readers, names in parts.items():
        over = replicas if embedding is None or EMBEDDING not in names else replace(replicas, dense=embedding)
        units.append(
            Unit(
                readers=readers,
                stages=tuple(stage for stage in readers if stage in stages),
                groups=groups.only(names),
                replicas=over,
                reduction=(max(map(orders.reduction.index, readers)), len(readers)),
                first_use=(min(map(orders.first_use.index, readers)), len(readers)),
            )
        )
    return sorted(units, key=lambda unit: unit.reduction)


def group_parameters(model: Transformer) -> ParameterGroups:
    """Sorts a model's parameters into groups."""
    stacks = {path: module for path, module in model.named_modules() if isinstance(module, RoutedExperts)}
    routed = {
        f"{path}.{name}": parameter for path, module in stacks.items() for name, parameter in module.named_parameters()
    }
    dense = {name: parameter for name, parameter in model.named_parameters() if name not in routed}
    return ParameterGroups(
        matrices={name: parameter for name, parameter in dense.items() if parameter.ndim > 1},
        vectors={name: parameter for name, parameter in dense.items() if parameter.ndim == 1},
        experts=routed,
        held=next((module.experts for module in stacks.values()), range(0)),
        num_experts=model.config.num_routed_experts,
    )


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
    """Builds the AdamW that `config` selects, for groups of parameters in torch's form."""
    if config.moments == "bf16":
        return Bf16MomentsAdamW(groups, config)
    if config.offload is True:
        return _build_cpu_adam(groups, config)
    return torch.optim.AdamW(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def load_cpu_adam() -> str:
    """Loads DeepSpeed's CPU Adam, which its first use compiles; returns why that fails, or nothing."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    try:
        CPUAdamBuilder().load(verbose=False)
    except Exception as error:  # of the compiler, ninja or the loader
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no reason'}"
    return ""


def _build_cpu_adam(groups: Sequence[dict[str, Any]], config: OptimConfig) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    class UncorrectedAdam(DeepSpeedCPUAdam):  # type: ignore[misc]
        """DeepSpeed's CPU Adam with the bias corrections in the rate, eps and decay of each call.

        Its own corrections are multiplied up from call to call in float32, so a resumed run would differ.
        """

        @torch.no_grad()
        def step(self, closure: Callable[[], float] | None = None) -> None:
            """Updates every weight that has a gradient; all are on the host."""
            assert closure is None, "gradients already exist"
            for group in self.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._step(parameter, group)

        def _step(self, parameter: Tensor, group: dict[str, Any]) -> None:
            assert parameter.grad is not None
            state = self.state[parameter]
            state["step"] += 1
            by = compute_coefficients(
                int(state["step"]),
                learning_rate=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
            # rate m / (sqrt(v) / sqrt(c2) + eps) / c1 = rate sqrt(c2) / c1 m / (sqrt(v) + eps sqrt(c2))
            rate = -by.move / by.correct_root
            decay = group["lr"] * group["weight_decay"] / rate if rate else 0.0
            rates = (rate, *group["betas"], group["eps"] / by.correct_root, decay, False)
            values = (parameter, parameter.grad, state["exp_avg"], state["exp_avg_sq"])
            self.ds_opt_adam.adam_update(self.opt_id, 1, *rates, *values)

    return UncorrectedAdam(
        groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, adamw_mode=True
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
        self._bucket_elements = config.bucket_elements
        options: list[dict[str, Any]] = [
            {"params": [*groups.matrices.values(), *groups.experts.values()], "weight_decay": config.weight_decay},
            {"params": list(groups.vectors.values()), "weight_decay": 0.0},
        ]
        self._optimizer = build_adamw([group for group in options if group["params"]], config)

    def reduce(self) -> Tensor:
        """Sums gradients over replicas, in place, and returns the sum of their squares, float64.

        Summed over all ranks, it counts each element once.
        """
        groups = self._groups
        squares = torch.zeros((), dtype=torch.float64, device=next(iter(groups.all().values())).device)
        dense = groups.matrices | groups.vectors
        for parameters, group in ((dense, self._replicas.dense), (groups.experts, self._replicas.experts)):
            gradients = [self._store.gradient(parameter) for parameter in parameters.values()]
            if dist.get_world_size(group) > 1:
                in_buckets(gradients, self._bucket_elements, partial(dist.all_reduce, group=group))
            for gradient in gradients:
                squares += sum_of_squares(gradient) / dist.get_world_size(group)
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


_SQUARED_NUMBERS = 2**24


def sum_of_squares(values: Tensor) -> Tensor:
    """Returns the sum of squares, a float64 scalar; widens 16 million numbers at a time."""
    parts = values.detach().flatten().split(_SQUARED_NUMBERS)
    return torch.stack([torch.linalg.vector_norm(part, dtype=torch.float64) for part in parts]).square().sum()


def in_buckets(tensors: Sequence[Tensor], most_elements: int, collective: Callable[[Tensor], object]) -> None:
    """Runs a collective in place over buckets of so many elements, or of one larger tensor."""
    buckets: list[list[Tensor]] = []
    num_elements = most_elements
    for tensor in tensors:
        num_elements += tensor.numel()
        if num_elements > most_elements:
            buckets.append([])
            num_elements = tensor.numel()
        buckets[-1].append(tensor.view(-1))
    for bucket in buckets:
        flat = bucket[0] if len(bucket) == 1 else torch.cat(bucket)
        collective(flat)
        if len(bucket) > 1:
            for tensor, result in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(result)
