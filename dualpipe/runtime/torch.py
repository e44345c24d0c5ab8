"""Runs training schedules, also of two directions, over the stages of `torch.distributed.pipelining`.

`DualPipeStep` has the `step` and `eval` of torch's schedules, for the modules of any trainer. torch's own runtime finds
stages by number and cannot hold two directions, so this one has its own loop. Each direction numbers its stages from 0,
so `PipelineStage` is used unchanged.

Undocumented names of torch in use (2.12 and 2.13): of `PipelineScheduleMulti` `_step_microbatches` (overridden),
`_initialize_stages`, `_check_inputs`, `_n_microbatches`, `_has_backward`, `_loss_fn`; of `PipelineStage`
`forward_one_chunk`, `backward_one_chunk`, `backward_weight_one_chunk`, `get_fwd_recv_ops`, `get_bwd_recv_ops`,
`get_fwd_send_ops`, `get_bwd_send_ops`, `set_local_fwd_input`, `set_local_bwd_input`, `get_local_bwd_output`, `chunks`,
`perform_reduce_grad`, `stage_index_to_group_rank`, `args_recv_info`, `grad_recv_info`.
"""

import copy
import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from inspect import signature
from typing import Any, Protocol

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import PipelineScheduleMulti
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dualpipe.ir import (
    Link,
    Message,
    Op,
    Operation,
    Schedule,
    ScheduleError,
    Value,
    from_json,
    made_by,
    message_of,
    needed_by,
    to_json,
)
from dualpipe.passes import forward_only, order_members
from dualpipe.runtime.torch_checks import StageKey, check_module, check_stages, check_torch_version, watch_modules
from dualpipe.validate import validate_passes


class _Built(Protocol):
    """Result of `dualpipe.build`."""

    @property
    def schedule(self) -> Schedule: ...


@dataclass(frozen=True, slots=True)
class Member:
    """Operation of a group that runs as one. Its inputs have arrived; its messages leave after the group.

    Attributes:
        op: kind, direction, stage, and micro-batch within the direction.
        stage: torch's stage, with the module as `stage.submod`.
        run: computes the operation.
    """

    op: Operation
    stage: PipelineStage
    run: Callable[[], None]


def in_threads(members: Sequence[Member]) -> None:
    """Runs the members of a group at once, each in a thread. On a GPU each needs its own stream."""
    with ThreadPoolExecutor(len(members)) as pool:
        list(pool.map(lambda member: member.run(), members))


class Kept(torch.autograd.Function):
    """Identity for a tensor that later slices read. Its backward adds their gradients."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, late: list[Tensor]) -> Tensor:
        """Returns the value. Later slices append their gradients for it to `late`."""
        ctx.late = late
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Returns the gradient of this slice plus those of later ones."""
        return sum(ctx.late, gradients[0]), None


class _Unviewed(torch.autograd.Function):
    """Identity with a result that is no view, since torch's I detaches outputs in place."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


class DualPipeStep(PipelineScheduleMulti):
    """Step of a trainer: `step(batch, target=..., losses=[])` on every rank; `eval` runs forwards only.

    All ranks pass the whole batch. Direction 0 takes its first micro-batches, direction 1 the others. Ranks with a last
    stage have the losses of its direction. Gradients are those of the mean loss, as torch's schedules scale them.

    With slices, micro-batch `k * slices + i` is slice i of sequence k. The module of a stage then takes the keyword
    `past`: a tuple of the tensors that earlier slices of the sequence kept, the oldest first. Its forward sets `kept`
    to a list of pairs for this slice: the result of `Kept.apply(tensor, late)`, and that list `late`, empty at first.
    """

    def __init__(
        self,
        schedule: _Built | Schedule | str,
        stages: Mapping[StageKey, nn.Module | PipelineStage],
        loss_fn: Callable[..., Tensor],
        *,
        device: torch.device | str = "cpu",
        group: distributed.ProcessGroup | None = None,
        overlap: Callable[[Sequence[Member]], None] | None = None,
        sum_mirrors: bool = True,
        **options: Any,
    ) -> None:
        """Proves the schedule on the first rank, and prepares stages and links. A collective call.

        Args:
            schedule: result of `build`, its `schedule`, or its JSON; the same on all ranks.
            stages: module for each (direction, stage) of `schedule.stages_of(rank)`, or a `PipelineStage` with example
                inputs and outputs, which saves torch's first extra forward and backward. Both copies of a stage must
                have equal weights (`broadcast_copies`). A rank that holds both passes the same module twice.
            loss_fn: as in torch's schedules, of an output and a target.
            device: of the modules.
            group: ranks of the pipeline; None for all.
            overlap: runs a group of several operations at once, such as `in_threads`; None: in turn. If a rank has one
                module for both directions, threads must not add to its gradients at the same time.
            sum_mirrors: whether a step ends with `sum_mirror_gradients`; False to accumulate over steps first.
            options: those of torch's schedules, such as `scale_grads`.

        Raises:
            ScheduleError: if the schedule is invalid or differs between ranks, or torch cannot split the backward of a
                module into I and W.
        """
        check_torch_version()
        order = _order_of(schedule)
        self._rank, size = distributed.get_rank(group), distributed.get_world_size(group)
        _prove(order, group, self._rank, size, stages)
        held = order.stages_of(self._rank)
        self._slices = order.slices
        self._past: dict[tuple[StageKey, int], list[Tensor]] = {}
        # The order was proven with its slices. From here on, each slice is a micro-batch.
        self._order = replace(order, slices=1)
        self._overlap, self._sums_mirrors = overlap, sum_mirrors
        self._prepared: bool | None = None
        self._is_watched = False
        self._splits = _splits(order, self._rank)
        make_stage = partial(PipelineStage, num_stages=order.num_stages, device=torch.device(device), group=group)
        self._stages_held: dict[StageKey, PipelineStage] = {}
        for key in held:
            stage = stages[key]
            if not isinstance(stage, PipelineStage):
                stage = make_stage(stage, key[1])
            self._stages_held[key] = stage
        super().__init__([*self._stages_held.values()], order.num_micro_batches, loss_fn, **options)
        for (direction, _), stage in self._stages_held.items():
            stage.stage_index_to_group_rank = dict(enumerate(order.placement[direction]))
        for module in {id(stage.submod): stage.submod for stage in self._stages_held.values()}.values():
            module.register_forward_hook(lambda module, args, out: tree_map_only(Tensor, _Unviewed.apply, out))
        programs = {True: self._order.ranks[self._rank], False: forward_only(self._order).ranks[self._rank]}
        self._programs = {trains: [*map(order_members, groups)] for trains, groups in programs.items()}
        self._posts = {trains: self._place_receives(groups) for trains, groups in self._programs.items()}
        # A group for each kind and way along the ranks: on NCCL, each link of the proof has a FIFO to itself.
        ranks = distributed.get_process_group_ranks(group or distributed.group.WORLD)
        is_part = len(ranks) < distributed.get_world_size()
        self._links = {
            (kind, goes_up): distributed.new_group(ranks, use_local_synchronization=is_part)
            for kind in ("activation", "gradient")
            for goes_up in (True, False)
        }

    def _message(self, op: Operation, value_of: Callable[[Operation, int], Value | None]) -> Message | None:
        value = value_of(op, self._order.num_stages)
        return None if value is None else message_of(self._order, value)

    def _place_receives(self, groups: Sequence[Sequence[Operation]]) -> list[list[Operation]]:
        """Returns operations with inputs to receive before each group: one early, as the proof assumes."""
        posts: list[list[Operation]] = [[] for _ in groups]
        needed_at: dict[Link, list[int]] = defaultdict(list)
        for index, op in ((index, op) for index, group in enumerate(groups) for op in group):
            if message := self._message(op, needed_by):
                needed = needed_at[message.link]
                needed.append(index)
                earliest = needed[-self._order.link_depth] if len(needed) >= self._order.link_depth else 0
                posts[max(0, min(index - 1, earliest))].append(op)
        return posts

    def _step_microbatches(
        self,
        arg_mbs: Any = None,
        kwarg_mbs: Any = None,
        target_mbs: Any = None,
        losses: Any = None,
        return_outputs: bool = True,  # noqa: FBT001, FBT002
        loss_kwargs: Any = None,
    ) -> None:
        """Runs this rank's groups. torch's `step` and `eval` call it with the cut batch."""
        batch = arg_mbs, kwarg_mbs, target_mbs, losses
        is_first = self._has_backward and self._splits and not self._is_watched
        self._is_watched |= is_first
        with watch_modules(self._stages_held) if is_first else nullcontext():
            self._run_groups(*batch, return_outputs, loss_kwargs)
        self._past.clear()
        if self._has_backward:
            for stage in {id(stage.submod): stage for stage in self._stages_held.values()}.values():
                stage.perform_reduce_grad(self._n_microbatches if self.scale_grads else 1)
            if self._sums_mirrors:
                self.sum_mirror_gradients()

    def _run_groups(self, *batch: Any) -> None:
        """Runs this rank's groups with their transfers."""
        arg_mbs, kwarg_mbs, target_mbs, losses, return_outputs, loss_kwargs = batch
        trains = self._has_backward
        args, kwargs = self._check_inputs(arg_mbs, kwarg_mbs, target_mbs, losses)
        self._prepare(args[0], kwargs[0], target_mbs[0] if target_mbs else None, loss_kwargs)
        self._values: dict[int, Tensor] = {}
        self._left: dict[StageKey, int] = {key: int(stage.chunks or 0) for key, stage in self._stages_held.items()}
        self._keeps_outputs = return_outputs
        run = partial(self._run, args, kwargs, target_mbs, loss_kwargs or {})
        received: dict[Operation, list[Any]] = {}
        sent: list[Any] = []
        for group, posts in zip(self._programs[trains], self._posts[trains], strict=True):
            received |= {op: self._transfer(op, needed_by) for op in posts}
            for work in [work for op in group for work in received.pop(op, ())]:
                work.wait()
            members = [Member(op, self._stages_held[op[1:3]], partial(run, op)) for op in group]
            is_one = self._overlap is not None and len(members) > 1
            if self._overlap is not None and is_one:
                self._overlap(members)
            for member in members:
                if not is_one:
                    member.run()
                # Messages of a link leave in the order of the members, which is the proven one.
                sent = [work for work in sent if not work.is_completed()] + self._transfer(member.op, made_by)
        for work in sent:
            work.wait()
        if losses is not None:
            losses[:] = [self._values[index].detach() for index in sorted(self._values)]

    def _prepare(self, *example: Any) -> None:
        """Has torch infer shapes, then gives each stage the micro-batches of its direction."""
        if self._prepared == self._has_backward:
            return
        self._prepared = self._has_backward
        whole, self._n_microbatches = self._n_microbatches, 1
        # It takes the target in 2.12, and also loss_kwargs in 2.13.
        self._initialize_stages(*example[: len(signature(self._initialize_stages).parameters)])
        self._n_microbatches = whole
        for (direction, _), stage in self._stages_held.items():
            stage.chunks = len(self._order.micro_batches_of(direction))
            for table in filter(None, (stage.args_recv_info, stage.grad_recv_info)):
                table.update({m: tuple(map(copy.copy, table[0])) for m in range(stage.chunks)})
                for infos in table.values():
                    _allocate(infos, is_whole=False)

    def _transfer(self, op: Operation, value_of: Callable[[Operation, int], Value | None]) -> list[Any]:
        """Starts to receive what an operation needs, or to send what it made. Returns the pending transfers."""
        message = self._message(op, value_of)
        if message is None:
            return []
        stage, m, is_forward = self._stages_held[op[1:3]], op.micro_batch, op.kind is Op.FORWARD
        link = self._links[message.kind, message.source < message.destination]
        if value_of is made_by:
            ops = stage.get_fwd_send_ops(m) if is_forward else stage.get_bwd_send_ops(m)
            return [distributed.isend(each.tensor, group=link, group_dst=message.destination) for each in ops]
        _allocate((stage.args_recv_info if is_forward else stage.grad_recv_info)[m], is_whole=True)
        ops = stage.get_fwd_recv_ops(m) if is_forward else stage.get_bwd_recv_ops(m)
        return [distributed.irecv(each.tensor, group=link, group_src=message.source) for each in ops]

    def _run(self, args: Any, kwargs: Any, targets: Any, loss_kwargs: Any, op: Operation) -> None:
        """Computes one operation. Its result goes to the next stage if this rank holds that too."""
        stage, m = self._stages_held[op[1:3]], op.micro_batch
        index = m + op.direction * len(self._order.micro_batches_of(0))
        if op.kind is Op.FORWARD:
            keywords = kwargs[index]
            if self._slices > 1:
                keywords = keywords | {"past": tuple(self._past_of(op))}
            output = stage.forward_one_chunk(m, args[index], keywords, save_forward_output=self._keeps_outputs)
            _allocate(stage.args_recv_info[m], is_whole=False)
            if self._slices > 1:
                self._keep(op, stage.submod)
            if stage.is_last and self._loss_fn and targets:
                self._values[index] = self._loss_fn(output, targets[index], **loss_kwargs)
            elif neighbor := self._stages_held.get((op.direction, op.stage + 1)):
                neighbor.set_local_fwd_input(output, m)
            return
        # torch's I of a first stage does nothing and its W everything. The order proven for slices is that of I.
        if self._slices > 1 and op.stage == 0 and op.kind is not Op.BACKWARD:
            if op.kind is Op.BACKWARD_WEIGHT:
                return
            op = op.with_kind(Op.BACKWARD)
        self._left[op[1:3]] -= op.kind is not Op.BACKWARD_INPUT
        is_end = not self._left[op[1:3]]
        if op.kind is Op.BACKWARD_WEIGHT:
            stage.backward_weight_one_chunk(m, last_backward=is_end)
            return
        loss = self._values.get(index) if stage.is_last else None
        stage.backward_one_chunk(m, loss=loss, full_backward=op.kind is Op.BACKWARD, last_backward=is_end)
        _allocate(stage.grad_recv_info[m], is_whole=False)
        if neighbor := self._stages_held.get((op.direction, op.stage - 1)):
            neighbor.set_local_bwd_input(stage.get_local_bwd_output(m), m)

    def _past_of(self, op: Operation) -> list[Tensor]:
        """Returns what earlier slices of the sequence kept in this stage."""
        key = op[1:3], op.micro_batch // self._slices
        if op.micro_batch % self._slices == 0:
            self._past[key] = []
        return self._past[key]

    def _keep(self, op: Operation, module: Any) -> None:
        """Stores leaves for what the module kept. Their gradients go to the module's lists."""
        for value, late in module.kept:
            leaf = value.detach().requires_grad_()
            # torch adds to gradients in place, so that the list needs a copy.
            leaf.register_hook(lambda gradient, late=late: late.append(gradient.clone()))
            self._past[op[1:3], op.micro_batch // self._slices].append(leaf)

    def sum_mirror_gradients(self) -> None:
        """Sums the gradients of both copies of each stage.

        Both ranks add the same two numbers, so copies stay equal. A step does it unless `sum_mirrors` is False. It must
        then be called once, after the last step that accumulates, since a second call would sum again.
        """
        for direction, stage, peer in self._mirrored():
            module = self._stages_held[direction, stage].submod
            weights = [weight for weight in module.parameters() if weight.requires_grad]
            for weight in weights:
                weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            shards = [_local(weight.grad) for weight in weights]
            ours = torch.cat([shard.flatten() for shard in shards])
            theirs = torch.empty_like(ours)
            sent: Any = distributed.isend(ours, group=self._links["gradient", self._rank < peer], group_dst=peer)
            distributed.recv(theirs, group=self._links["gradient", peer < self._rank], group_src=peer)
            sent.wait()
            for shard, part in zip(shards, (ours + theirs).split([shard.numel() for shard in shards]), strict=True):
                shard.copy_(part.view_as(shard))

    def broadcast_copies(self) -> None:
        """Gives direction 1's copy of each stage the parameters and buffers of direction 0's."""
        for direction, stage, peer in self._mirrored():
            module = self._stages_held[direction, stage].submod
            link = self._links["activation", (self._rank < peer) == (direction == 0)]
            for tensor in (*module.parameters(), *module.buffers()):
                if direction == 0:
                    distributed.send(_local(tensor.data).contiguous(), group=link, group_dst=peer)
                else:
                    received = torch.empty_like(_local(tensor.data), memory_format=torch.contiguous_format)
                    distributed.recv(received, group=link, group_src=peer)
                    _local(tensor.data).copy_(received)

    def counted_parameters(self) -> Iterator[nn.Parameter]:
        """Yields parameters so that all ranks together yield each stage once, for norms of a model."""
        for (direction, _), stage in self._stages_held.items():
            if direction == 0:
                yield from stage.submod.parameters()

    def gradient_norm(self) -> Tensor:
        """Returns the norm of the whole model's gradient, each stage once. A collective call."""
        weights = [weight for weight in self.counted_parameters() if weight.grad is not None]
        squares = [_whole_square(weight.grad) for weight in weights]
        stage = next(iter(self._stages_held.values()))
        total = torch.stack(squares).sum() if squares else torch.zeros((), dtype=torch.float64, device=stage.device)
        distributed.all_reduce(total, group=stage.group)
        return total.sqrt()

    def _mirrored(self) -> Iterator[tuple[int, int, int]]:
        """Yields direction, stage and the other copy's rank, for stages with a copy elsewhere."""
        for stage, (holder, mirror) in enumerate(zip(self._order.placement[0], self._order.placement[-1], strict=True)):
            if holder != mirror and self._rank in (holder, mirror):
                yield (1, stage, holder) if self._rank == mirror else (0, stage, mirror)


def _local(tensor: Any) -> Tensor:
    """Returns this rank's shard of a tensor that FSDP has cut, or the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole_square(gradient: Any) -> Tensor:
    """Returns the sum of squares in float64, over all shards."""
    square = _local(gradient).double().square().sum()
    if isinstance(gradient, DTensor):
        for dimension, placement in enumerate(gradient.placements):
            if placement.is_shard():
                distributed.all_reduce(square, group=gradient.device_mesh.get_group(dimension))
    return square


def _allocate(infos: Any, *, is_whole: bool) -> None:
    """Gives inputs a buffer, or one element seen as one: torch keeps one for every micro-batch."""
    for info in infos:
        old = getattr(info, "buffer", None)
        if old is not None:
            new = old.new_empty(old.shape) if is_whole else old.new_empty(()).expand(old.shape)
            info.buffer = new.requires_grad_(old.requires_grad)


def _order_of(schedule: _Built | Schedule | str) -> Schedule:
    """Returns the order. Rejects what no training step over torch's stages runs."""
    order = from_json(schedule) if isinstance(schedule, str) else getattr(schedule, "schedule", schedule)
    if not isinstance(order, Schedule):
        raise ScheduleError(
            f"schedule: must be a schedule or its JSON, is {type(schedule).__name__}; nearest: build(...)"
        )
    if order.has_offload or order.cohorts is not None:
        what = "one that decodes" if order.cohorts is not None else "one with offload"
        raise ScheduleError(
            f"schedule: must train without offload, as torch's stages do, is {what}; nearest: build(...)"
        )
    return order


def _splits(order: Schedule, rank: int) -> bool:
    """Returns whether a rank runs I and W apart."""
    return any(op.kind is Op.BACKWARD_WEIGHT for group in order.ranks[rank] for op in group)


def _prove(
    order: Schedule, group: distributed.ProcessGroup | None, rank: int, size: int, stages: Mapping[StageKey, Any]
) -> None:
    """Validates the order on the first rank, compares all ranks' with it, and checks their stages.

    Raises an error on all ranks, so that none waits for one that has refused.
    """
    if order.num_ranks != size:
        raise ScheduleError(
            f"schedule: must have the group's {size} ranks, has {order.num_ranks}; nearest: ranks={size}"
        )
    digest = hashlib.sha256(to_json(order).encode()).hexdigest()
    problem = place = ""
    try:
        if rank == 0:
            validate_passes(order)
        place = f" (rank {rank})"
        held = order.stages_of(rank)
        check_stages(held, stages)
        for key in held if _splits(order, rank) else ():
            check_module(getattr(stages[key], "submod", stages[key]), key)
    except ScheduleError as error:
        problem = f"{error}{place}"
    found: list[Any] = [None] * size
    distributed.all_gather_object(found, (digest, problem), group=group)
    for other, (theirs, text) in enumerate(found):
        if theirs != found[0][0]:
            raise ScheduleError(
                f"schedule: must be equal on all ranks, differs on rank {other}; nearest: the JSON of rank 0's"
            )
        if text:
            raise ScheduleError(text)
