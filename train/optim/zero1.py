"""Implements AdamW by DeepSpeed's ZeRO stage 1 without its engine; the pipeline computes gradients.

Float32 master weights and moments are sharded over the ranks that hold the same parameters: mirror x data, for routed
experts those with the same ones, for an embedding that MTP modules share the ranks of both stages.
"""

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from model.linear import GradientStore
from train.optim.adamw import (
    MOMENTS,
    ParameterGroups,
    Slice,
    Unit,
    build_adamw,
    moments_of,
    spread_step,
    sum_of_squares,
)
from train.optim.learning_rate import OptimConfig

_EXPERTS = "routed_experts"


class Zero1AdamW:
    """The AdamW of one unit with sharded state. All ranks with the unit create and call it."""

    def __init__(self, unit: Unit, store: GradientStore, config: OptimConfig) -> None:
        self._groups = unit.groups
        self._parameters = unit.parameters
        self._store = store
        self._replicas = unit.replicas
        self._optimizer = _build(unit, config)
        # The pipeline accumulates gradients itself. DeepSpeed's hooks would consume those of each micro-batch.
        for hook in self._optimizer._grad_acc_hooks:
            hook.remove()
        self._optimizer._grad_acc_hooks = []

    def reduce(self) -> Tensor:
        """Sums the gradients over replicas and keeps this rank's shard; returns as `ReplicatedAdamW.reduce`."""
        optimizer = self._optimizer
        # DeepSpeed divides every sum, also that of experts, by the size of the dense group. The store holds parts of a
        # sum, so this factor undoes the division.
        scale = dist.get_world_size(self._replicas.dense)
        for parameter in self._parameters:
            # `detach` creates another tensor object, because DeepSpeed makes its gradients point into its buckets.
            gradient = self._store.gradient(parameter).mul_(scale).detach()
            if optimizer.use_grad_accum_attribute:
                parameter.grad_accum = gradient  # type: ignore[attr-defined]
            else:
                parameter.grad = gradient
        optimizer.set_gradient_accumulation_boundary(True)
        optimizer.reduce_gradients(pipeline_parallel=True)
        squares = torch.zeros((), dtype=torch.float64, device=self._parameters[0].device)
        for parts in optimizer.averaged_gradients.values():
            for part in parts:  # exactly one rank of the job owns each element; padding is zero
                squares += sum_of_squares(part)
        return squares

    def update(self, learning_rate: float, norm: float) -> None:
        """Clips the summed gradients, updates the weights, and gathers those that other ranks updated."""
        for options in self._optimizer.param_groups:
            options["lr"] = learning_rate
        self._optimizer.global_norm = norm
        self._optimizer.step()
        self._clear()

    def discard(self) -> None:
        """Discards the gradients in the way that DeepSpeed does after an overflow."""
        optimizer = self._optimizer
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        self._clear()

    def _clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        for parameter in self._parameters:
            parameter.grad_accum = None  # type: ignore[attr-defined]

    def state(self) -> dict[str, Slice | Tensor]:
        """Returns this rank's slices of master weights and moments, and the step count, not copies.

        Float32 weights equal their master copies, which are left out: a checkpoint does not depend on sharding.
        """
        named: dict[str, Slice | Tensor] = {}
        for index, master in enumerate(self._masters):
            moments = moments_of(self._optimizer.optimizer, master)
            named["step"] = moments["step"]
            owned = {key: moments[key] for key in MOMENTS}
            if not self._are_weights_masters:
                owned["master"] = master.detach()
            for name, first, run in self._runs(index):
                for key, values in owned.items():
                    named[f"{name}.{key}"] = self._groups.place(name, first, values[run])
        return named

    @property
    def _masters(self) -> list[Tensor]:
        """This rank's flat shard of each parameter group."""
        return self._optimizer.single_partition_of_fp32_groups  # type: ignore[no-any-return]

    @property
    def _are_weights_masters(self) -> bool:
        return all(parameter.dtype == torch.float32 for parameter in self._parameters)

    def _runs(self, index: int) -> Iterator[tuple[str, int, slice]]:
        """Yields each parameter in a group's shard: name, first element, place, as DeepSpeed has them."""
        optimizer = self._optimizer
        size = self._masters[index].numel()
        start = dist.get_rank(optimizer.real_dp_process_group[index]) * size
        names = {id(parameter): name for name, parameter in self._groups.all().items()}
        places = zip(optimizer.round_robin_bit16_groups[index], optimizer.round_robin_bit16_offsets[index], strict=True)
        for parameter, offset in places:
            first = max(offset, start)
            end = min(offset + parameter.numel(), start + size)
            if first < end:
                yield names[id(parameter)], first - offset, slice(first - start, end - start)

    def loaded(self, num_steps: Tensor) -> None:
        """Copies the loaded step count to all groups, and the master copies to the weights."""
        spread_step(self._optimizer.optimizer, self._masters, num_steps)
        if self._are_weights_masters:
            self.follow_weights()
            return
        self._optimizer.update_lp_params()
        for index in range(len(self._optimizer.bit16_groups)):
            self._optimizer._update_model_bit16_weights(index)

    def follow_weights(self) -> None:
        """Copies the weights to this rank's master copies."""
        self._optimizer.refresh_fp32_params()


def _build(unit: Unit, config: OptimConfig) -> Any:
    import deepspeed
    from deepspeed.utils import logger
    from deepspeed.utils.timer import NoopTimer

    logger.setLevel(logging.ERROR)
    # DeepSpeed still calls a collective that torch renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    # Compiling DeepSpeed's shared-memory collectives with g++ takes a minute. Results are the same without them.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist.get_backend(), dist_init_required=False, verbose=False)

    groups = unit.groups
    replicas = unit.replicas
    bucket = min(config.bucket_elements, sum(parameter.numel() for parameter in groups.all().values()))
    bucket += bucket % 2  # DeepSpeed needs an even size
    return _global_norm_optimizer()(
        build_adamw(_parameter_options(groups, config.weight_decay), config),
        {parameter: name for name, parameter in groups.all().items()},
        timers=NoopTimer(),
        optimizer_params={},
        dp_process_group=replicas.dense,
        expert_parallel_group={_EXPERTS: replicas.expert},
        expert_data_parallel_group={_EXPERTS: replicas.experts},
        has_moe_layers=bool(groups.experts),
        partition_grads=False,
        overlap_comm=False,
        contiguous_gradients=True,
        reduce_scatter=True,
        use_multi_rank_bucket_allreduce=False,  # a sum goes to the rank that keeps it, half the bytes of an all-reduce
        clip_grad=config.clip_norm,
        communication_data_type=torch.float32,
        gradient_accumulation_dtype=torch.float32,
        check_grad_overflow=False,
        reduce_bucket_size=bucket,
        allgather_bucket_size=bucket,
        verbose=False,
    )


def _global_norm_optimizer() -> Any:
    """Returns DeepSpeed's optimizer class with the gradient norm over all ranks of the job."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    class GlobalNorm(DeepSpeedZeroOptimizer):  # type: ignore[misc]
        """DeepSpeed's optimizer with a given norm; its own hangs if stages have different groups."""

        global_norm: float

        def scaled_global_norm(self, norm_type: int = 2) -> Tensor:
            # The guard has refused a norm that is not finite. DeepSpeed would silently skip such a step, or take it if
            # weights are bf16.
            assert norm_type == 2
            return torch.tensor(self.global_norm, dtype=torch.float32, device=self.device)

    return GlobalNorm


def _parameter_options(groups: ParameterGroups, weight_decay: float) -> list[dict[str, Any]]:
    """Returns AdamW's parameter groups, with the attributes by which DeepSpeed recognizes routed experts."""
    for parameter in groups.experts.values():
        parameter.allreduce = False  # type: ignore[attr-defined]
        parameter.group_name = _EXPERTS  # type: ignore[attr-defined]
    options: list[dict[str, Any]] = [
        {"params": list(groups.matrices.values()), "weight_decay": weight_decay, "name": "matrices"},
        {"params": list(groups.vectors.values()), "weight_decay": 0.0, "name": "vectors"},
        {"params": list(groups.experts.values()), "weight_decay": weight_decay, "moe": True, "name": _EXPERTS},
    ]
    return [group for group in options if group["params"]]
