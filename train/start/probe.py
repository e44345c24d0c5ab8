"""Measures how long the model's parts take on this job's ranks, before a schedule is chosen."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, fields
from statistics import mean, median

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from comm.context_group import open_context
from comm.dispatch.build import DispatcherParts, build_dispatcher, open_lane
from comm.dispatch.process_group import Observers
from comm.dispatch.traffic import Traffic
from comm.groups import exchange_kernels, join_one
from comm.layout import Layout, context_partition, expert_partition, pipeline_partition
from comm.protocol import ContextGroup, Dispatcher
from comm.watchdog.collective_log import CollectiveLog
from model.linear import GradientStore
from model.objective import LossSums
from model.objectives.pairs import head_objective
from model.stage import Stage, StageRun, block_lanes
from model.transformer import Part
from train.config import TrainConfig
from train.core.learner import random_batch
from train.core.world import ReplicaConfig, build_model, held_experts, weight_dtype
from train.predict.layer_times import LayerTimes, PartTimes, part_times

_RUNS = 3
_HOPS = 15


def measure(config: TrainConfig, layout: Layout, device: torch.device) -> LayerTimes:
    """Runs a few random micro-batches through the first and last layer, both ends and MTP modules.

    They have the run's shape. All ranks call it at the same point and receive the same times. Computation is the mean
    over ranks of each rank's median, exchange the mean of each rank's minimum. The layers, process groups and lane
    exist only during the call. The run's random state does not change.
    """
    timeout = config.cluster.timeout_seconds
    kernels = exchange_kernels(config.cluster.communication_sms)
    experts = join_one(expert_partition(layout), timeout, kernels)
    pipeline = join_one(pipeline_partition(layout), timeout)
    shared = join_one(context_partition(layout), timeout) if layout.parallelism.context > 1 else None
    lane = open_lane(device)
    observers = Observers(Traffic(), CollectiveLog())
    network = ReplicaConfig.of_run(config)
    exchange = DispatcherParts(
        num_experts=config.model.num_routed_experts,
        layout=layout,
        group=experts,
        lane=lane,
        observers=observers,
        timeout_seconds=timeout,
        tokens=network.tokens,
        kernels=kernels,
    )
    dispatcher = build_dispatcher(network.dispatch, exchange)
    latency = _link_latency(config, layout, pipeline, device)
    parts = _Parts(config, layout, dispatcher, device, open_context(shared, layout, observers))
    with parts.model.weights_unchanged():
        for _ in range(_RUNS):
            parts.run()
    measured = parts.times(latency)
    agreed = _average_over_ranks(measured, device)
    lane.close()
    dispatcher.close()
    for group in (experts, pipeline, shared):
        if group is not None:
            dist.destroy_process_group(group)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return agreed


class _Parts:
    """The measured parts as two stages: embedding and first layer, last layer and heads."""

    def __init__(
        self,
        config: TrainConfig,
        layout: Layout,
        dispatcher: Dispatcher,
        device: torch.device,
        context: ContextGroup,
    ) -> None:
        shape = config.model
        last = config.model.num_layers - 1
        mtp_modules = range(shape.num_layers, shape.num_layers + shape.mtp_depth)
        experts = held_experts(shape, layout.parallelism.expert, layout.expert_index(dist.get_rank()))
        part = Part(layers=tuple({0, last, *mtp_modules}), experts=experts, embedding=True, head=True)
        self.model = model = build_model(ReplicaConfig.of_run(config), dispatcher, part, device, context)
        self._shape = shape
        self._device = device
        tokens = (config.batch.micro_sequences, config.rank_sequence_tokens)
        self._batch = random_batch(config.model, tokens, device)
        self._stages = (
            Stage(model, range(1), first=True, last=False),
            Stage(model, range(last, last + 1), first=False, last=True),
        )
        self._store = GradientStore(model.parameters())
        # Keys: stage, pass (forward, backward, weight) and phase.
        self._seconds: dict[tuple[int, str, int], list[float]] = defaultdict(list)

    def run(self) -> None:
        """Runs forward and backward of one micro-batch, one phase at a time."""
        objective, names = head_objective(self._shape, 1 / self._batch.targets_BT[0].numel())
        sums = LossSums(names)
        start, end = (stage.start(self._batch, objective, sums, self._store) for stage in self._stages)
        self._forward(0, start)
        end.set_input(start.output())
        self._forward(1, end)
        self._backward(1, end)
        start.set_output_gradient(end.input_gradient())
        self._backward(0, start)

    def times(self, latency: float) -> LayerTimes:
        """Returns the times of the parts. The median of three runs ignores the first, which includes warm-up."""
        has_dense = self._shape.num_dense_layers > 0
        has_moe = self._shape.num_dense_layers < self._shape.num_layers
        first, last = (len(stage.lanes) for stage in self._stages)
        head = len(block_lanes(is_dense=not has_moe))
        return LayerTimes(
            dense=self._part(0, range(1, first)) if has_dense else PartTimes(),
            moe=self._part(1, range(head)) if has_moe else PartTimes(),
            embedding=self._part(0, range(1)),
            head=self._part(1, range(head, head + 1)),
            mtp=self._part(1, range(head + 1, last)),
            latency_seconds=latency,
        )

    def _part(self, stage: int, phases: range) -> PartTimes:
        lanes = self._stages[stage].lanes
        computed = [phase for phase in phases if lanes[phase] == "compute"]
        exchanged = [phase for phase in phases if lanes[phase] == "comm"]

        def total(way: str, chosen: list[int], of: Callable[[list[float]], float]) -> float:
            return sum(of(self._seconds[stage, way, phase]) for phase in chosen)

        # An exchange also waits for ranks that arrive later, so its minimum is the best estimate.
        return PartTimes(
            forward=total("forward", computed, median),
            backward_input=total("backward", computed, median),
            backward_weight=total("weight", computed, median),
            forward_exchange=total("forward", exchanged, min),
            backward_exchange=total("backward", exchanged, min),
        )

    def _forward(self, stage: int, run: StageRun) -> None:
        for phase, lane in enumerate(self._stages[stage].lanes):
            with self._timed(stage, "forward", phase):
                run.forward(phase)
                if lane == "comm":
                    run.wait()

    def _backward(self, stage: int, run: StageRun) -> None:
        lanes = self._stages[stage].lanes
        for phase in reversed(range(len(lanes))):
            with self._timed(stage, "backward", phase):
                run.backward(phase)
                if lanes[phase] == "comm":
                    run.wait()
            if lanes[phase] == "compute":
                with self._timed(stage, "weight", phase):
                    run.weight(phase)

    @contextmanager
    def _timed(self, stage: int, way: str, phase: int) -> Iterator[None]:
        started = _now(self._device)
        yield
        self._seconds[stage, way, phase].append(_now(self._device) - started)


def _link_latency(config: TrainConfig, layout: Layout, group: ProcessGroup, device: torch.device) -> float:
    """Returns half the round-trip time of an activation, averaged over partners; 0 without any."""
    index = layout.pipeline_index(dist.get_rank())
    members = layout.pipeline_group(dist.get_rank())
    shape = (config.batch.micro_sequences, config.rank_sequence_tokens, config.model.hidden_size)
    # gloo sends only from host memory.
    link_device = device if dist.get_backend(group) == "nccl" else torch.device("cpu")
    ball = torch.zeros(shape, dtype=weight_dtype(config.precision), device=link_device)
    latencies = []
    for partner, sends_first in _partners(index, len(members)):
        latencies.append(_ping_pong(ball, members[partner], group, sends_first=sends_first))
    return mean(latencies) if latencies else 0.0


def _partners(index: int, num_ranks: int) -> Iterator[tuple[int, bool]]:
    """Yields the linked ranks, and whether this one sends first, in an order without deadlocks.

    Neighbors, and the first and the last rank: with several chunks, messages go from the last rank to the first.
    """
    for parity in (0, 1):
        sends_first = index % 2 == parity
        partner = index + 1 if sends_first else index - 1
        if partner in range(num_ranks):
            yield partner, sends_first
    if num_ranks > 2 and index in (0, num_ranks - 1):
        yield num_ranks - 1 - index, index > 0


def _ping_pong(ball: Tensor, other: int, group: ProcessGroup, *, sends_first: bool) -> float:
    """Returns the median seconds of one way, without the first round trip, which sets up the connection."""
    seconds = []
    for _ in range(1 + _HOPS):
        started = _now(ball.device)
        if sends_first:
            dist.send(ball, other, group=group)
        dist.recv(ball, other, group=group)
        if not sends_first:
            dist.send(ball, other, group=group)
        seconds.append((_now(ball.device) - started) / 2)
    return median(seconds[1:])


def _average_over_ranks(mine: LayerTimes, device: torch.device) -> LayerTimes:
    """Returns the mean over all ranks. Rank 0 broadcasts it, so that it is bitwise equal on all ranks."""
    parts = (mine.dense, mine.moe, mine.embedding, mine.head, mine.mtp)
    numbers = torch.tensor(
        [*(seconds for part in parts for seconds in astuple(part)), mine.latency_seconds],
        dtype=torch.float64,
        device=device,
    )
    dist.all_reduce(numbers)
    dist.broadcast(numbers, src=0)
    *seconds, latency = (numbers / dist.get_world_size()).tolist()
    size = len(fields(PartTimes))
    dense, moe, embedding, head, mtp = (part_times(seconds[at : at + size]) for at in range(0, len(seconds), size))
    return LayerTimes(dense=dense, moe=moe, embedding=embedding, head=head, mtp=mtp, latency_seconds=latency)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
