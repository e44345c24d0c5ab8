"""Implements AdamW by DeepSpeed's ZeRO stage 1 without its engine; the pipeline computes gradients.

Float32 master weights and moments are sharded over the ranks that hold the same parameters: mirror x data, for routed
experts those with the same ones, for an embedding that MTP modules share the ranks of both stages.
"""

import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
_VECTOR = 64
"""Elements that fill vectors of every CPU, as fused AdamW rounds those behind the last whole one differently."""


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A rank's part of one parameter: views of what the optimizer step reads and writes."""

    gradient: Tensor
    master: Tensor
    weight: Tensor


class _HostBuffers:
    """Page-locked host memory for one bucket of gradients, and of weights in the model's type."""

    def __init__(self, num_elements: int, weights: Tensor) -> None:
        self._gradients = torch.empty(num_elements, dtype=torch.float32, pin_memory=weights.is_cuda)
        self._weights = torch.empty(num_elements, dtype=weights.dtype, pin_memory=weights.is_cuda)

    def copied(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """Copies gradients to the host."""
        copies = self._gradients[: sum(map(len, gradients))].split([*map(len, gradients)])
        return [copy.copy_(gradient) for copy, gradient in zip(copies, gradients, strict=True)]  # host sync

    def narrowed(self, master: Tensor) -> Tensor:
        """Rounds master weights to the model's type."""
        return self._weights[: len(master)].copy_(master)


class Zero1AdamW:
    """The AdamW of one unit with sharded state. All ranks with the unit create and call it.

    Summed gradients replace a rank's own in the store, and the update reads them there, so no copy is made. With
    `offload`, masters and moments are in host memory, and buckets of gradients and weights are copied.
    """

    def __init__(self, unit: Unit, store: GradientStore, config: OptimConfig) -> None:
        self._groups = unit.groups
        self._parameters = unit.parameters
        self._store = store
        self._replicas = unit.replicas
        self._optimizer = _build(unit, store, config)
        self._is_offloaded = bool(config.offload)
        if config.offload:
            self._move_to_host()
        # Vectors of a CPU are whole in all parts but the last, so that its bits do not depend on the size of buckets.
        most_elements = max(_VECTOR, config.bucket_elements // _VECTOR * _VECTOR)
        self._buckets = self._split(most_elements if config.offload else sys.maxsize)
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
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self._optimizer
        for options in optimizer.param_groups:
            options["lr"] = learning_rate
        total_norm = torch.tensor(norm, dtype=torch.float32, device=optimizer.device)
        host = None
        if self._is_offloaded:  # torch keeps the freed buffers for the next unit
            largest = max((sum(len(piece.master) for piece in bucket) for bucket in self._buckets), default=0)
            host = _HostBuffers(largest, self._parameters[0])
        for bucket in self._buckets:
            optimizer.unscale_and_clip_grads([piece.gradient for piece in bucket], total_norm)
            self._step(bucket, host)
        for master in self._masters:
            moments_of(optimizer.optimizer, master)["step"] += 1
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )
        self.discard()

    def _step(self, pieces: Sequence[_Piece], host: _HostBuffers | None) -> None:
        """Updates master copies and weights of some pieces."""
        gradients = [piece.gradient for piece in pieces]
        for piece, gradient in zip(pieces, host.copied(gradients) if host else gradients, strict=True):
            piece.master.grad = gradient
        self._optimizer.optimizer.step()
        for piece in pieces:
            piece.master.grad = None
            piece.weight.copy_(host.narrowed(piece.master) if host else piece.master)

    def discard(self) -> None:
        """Discards the gradients in the way that DeepSpeed does after an overflow."""
        optimizer = self._optimizer
        for gradients in (optimizer.averaged_gradients, optimizer.all_grad_tensors):
            gradients.update(dict.fromkeys(gradients))
        optimizer.zero_grad(set_to_none=True)
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

    def _move_to_host(self) -> None:
        """Moves master copies to the host, where the moments will be, too."""
        optimizer = self._optimizer
        for parameter in self._parameters:
            parameter._hp_mapping = None  # type: ignore[attr-defined]  # would keep the masters on the device
        masters = optimizer.single_partition_of_fp32_groups
        masters[:] = [master.detach().cpu() for master in masters]

    def _split(self, most_elements: int) -> list[list[_Piece]]:
        """Splits this rank's shards into buckets of at most so many elements.

        The master copies of their pieces become AdamW's parameters, and their moments are views of those of the shard.
        """
        optimizer = self._optimizer
        buckets: list[list[_Piece]] = []
        num_elements = most_elements
        for index, shard in enumerate(self._masters):
            weights = optimizer.parallel_partitioned_bit16_groups[index]
            owned = weights[dist.get_rank(optimizer.real_dp_process_group[index])]
            moments = moments_of(optimizer.optimizer, shard)
            options = optimizer.param_groups[index]
            options["params"] = []
            for name, first, run in self._runs(index):
                gradient = self._store.gradient(self._groups.all()[name]).view(-1)[first : first + run.stop - run.start]
                values = (gradient, shard.detach()[run], owned[run], *(moments[key][run] for key in MOMENTS))
                for parts in zip(*(value.split(most_elements) for value in values), strict=True):
                    piece = _Piece(*parts[:3])
                    step = torch.zeros_like(moments["step"])
                    optimizer.optimizer.state[piece.master] = {
                        "step": step,
                        **dict(zip(MOMENTS, parts[3:], strict=True)),
                    }
                    options["params"].append(piece.master)
                    num_elements += len(piece.master)
                    if num_elements > most_elements:
                        buckets.append([])
                        num_elements = len(piece.master)
                    buckets[-1].append(piece)
        return buckets

    def loaded(self, num_steps: Tensor) -> None:
        """Copies the loaded step count to all groups, and the master copies to the weights."""
        pieces = [piece.master for bucket in self._buckets for piece in bucket]
        spread_step(self._optimizer.optimizer, [*self._masters, *pieces], num_steps)
        if self._are_weights_masters:
            self.follow_weights()
            return
        self._optimizer.update_lp_params()
        for index in range(len(self._optimizer.bit16_groups)):
            self._optimizer._update_model_bit16_weights(index)

    def follow_weights(self) -> None:
        """Copies the weights to this rank's master copies."""
        self._optimizer.refresh_fp32_params()


def _build(unit: Unit, store: GradientStore, config: OptimConfig) -> Any:
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
    return _in_place_optimizer(store)(
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


def _in_place_optimizer(store: GradientStore) -> Any:
    """Returns DeepSpeed's optimizer class, which writes sums of gradients into the store."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    class InPlaceSums(DeepSpeedZeroOptimizer):  # type: ignore[misc]
        """DeepSpeed's optimizer with summed gradients as views of the store in place of a flat shard."""

        def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
            return True

        def _get_compact_grad_partition_slice(
            self, group_idx: int, partition_id: int, param_id: int, num_elements: int
        ) -> Tensor | None:
            if partition_id != dist.get_rank(self.real_dp_process_group[group_idx]):
                return None
            first = self.grad_start_offset[group_idx][partition_id][param_id]
            return store.gradient(self.param_dict[param_id]).view(-1).narrow(0, first, num_elements)

        def _build_compact_grad_partition_buffer(self, group_idx: int) -> list[Tensor | None]:
            rank = dist.get_rank(self.real_dp_process_group[group_idx])
            views = []
            for parameter in self.params_in_partition[group_idx]:
                number = self.get_param_id(parameter)
                first = self.grad_start_offset[group_idx][rank][number]
                last = self.partition_size[group_idx] - self.grad_partition_insertion_offset[group_idx][rank][number]
                size = min(parameter.numel() - first, last)
                views.append(self._get_compact_grad_partition_slice(group_idx, rank, number, size))
            return views

        @staticmethod
        def _add_to_grad_partition_buffer(output: Tensor | None, source: Tensor) -> None:
            # DeepSpeed adds to zeros. The store still holds the rank's own gradient, which the sum contains.
            if output is not None:
                output.copy_(source)

    return InPlaceSums


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
