"""Holds what each process of a job has once, its links, and the part of a network that a rank holds."""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch import distributed as dist

from comm.config import ClusterConfig, DispatchConfig
from comm.dispatch.build import DispatcherParts, build_dispatcher, open_lane
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import TokenSizes
from comm.dispatch.traffic import Traffic
from comm.exits import Preemption
from comm.groups import Groups
from comm.lane import HostCopies, Lane, open_host_copies
from comm.layout import Layout
from comm.protocol import ALONE, ContextGroup, Dispatcher, SequenceParts, Work, sliced_parts
from comm.transfers import MessageKey, PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.ir import Message, Schedule, linked_pairs
from dualpipe.validate import embedding_ranks, is_mirrored
from model.config import Computing, ModelConfig
from model.size import slice_lengths
from model.stage import Stage
from model.transformer import Part, Transformer, initialize_weights
from train.config import BatchConfig, Precision, TrainConfig
from train.files.run_files import RankFiles


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """One process's view of the job. `lane` runs dispatch and combine."""

    layout: Layout
    groups: Groups
    device: torch.device
    timeout_seconds: float
    log: CollectiveLog
    lane: Lane
    host_copies: HostCopies
    preemption: Preemption = field(default_factory=Preemption)

    @property
    def rank(self) -> int:
        """This process's rank."""
        return self.groups.rank

    @property
    def ranks(self) -> range:
        """All ranks of the job."""
        return range(self.layout.world_size)

    @property
    def files(self) -> RankFiles:
        """Places of this rank's own files in a run's folder."""
        return RankFiles(self.rank, self.layout.world_size, self.layout.ranks_per_node)

    @property
    def pipeline_index(self) -> int:
        """This rank's index along the pipeline axis."""
        return self.layout.pipeline_index(self.rank)

    @property
    def data_index(self) -> int:
        """This rank's index along the data axis."""
        return self.layout.data_index(self.rank)

    @property
    def context_index(self) -> int:
        """This rank's index along the context axis."""
        return self.layout.context_index(self.rank)

    def phase(self, name: str) -> AbstractContextManager[None]:
        """Logs a phase in which all ranks take part, for example `checkpoint`."""
        return self.log.phase("world", self.ranks, name)

    def reduce(self, values: Tensor, name: str, operation: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Returns the sum, or another reduction, of a small tensor over all ranks. All ranks call it."""
        values = values.to(self.device)
        with self.log.collective("world", self.groups.world, name):
            dist.all_reduce(values, op=operation, group=self.groups.world)
        return values.cpu()  # host sync

    def reduce_parts(self, parts: Sequence[tuple[Tensor, Tensor]], name: str) -> list[tuple[Tensor, Tensor]]:
        """Returns for each part the sums of one and the maxima of another small flat tensor over all ranks.

        All parts together need one sum and one maximum, which run at the same time. All ranks call it.
        """
        sums = torch.cat([numbers.to(self.device) for numbers, _ in parts])
        maxima = torch.cat([numbers.to(self.device) for _, numbers in parts])
        with self.log.collective("world", self.groups.world, name):
            summing = dist.all_reduce(sums, group=self.groups.world, async_op=True)
            dist.all_reduce(maxima, op=dist.ReduceOp.MAX, group=self.groups.world)
            assert summing is not None
            summing.wait()
        all_sums, all_maxima = torch.cat([sums, maxima]).cpu().split([len(sums), len(maxima)])  # host sync
        of_sums = all_sums.split([len(numbers) for numbers, _ in parts])
        of_maxima = all_maxima.split([len(numbers) for _, numbers in parts])
        return list(zip(of_sums, of_maxima, strict=True))

    def open_dispatcher(
        self, config: DispatchConfig, num_experts: int, observers: Observers, tokens: TokenSizes
    ) -> Dispatcher:
        """Opens a dispatcher over this rank's expert group. All ranks call it at the same point."""
        parts = DispatcherParts(
            num_experts=num_experts,
            layout=self.layout,
            group=self.groups.expert,
            lane=self.lane,
            observers=observers,
            timeout_seconds=self.timeout_seconds,
            tokens=tokens,
            kernels=self.groups.exchange_kernels,
        )
        return build_dispatcher(config, parts)

    def observers(self) -> Observers:
        """Returns new traffic counters that share this process's log. Each replica has its own counters."""
        return Observers(Traffic(), self.log)

    def close(self) -> None:
        """Closes the lanes, after all replicas. Do not call it after an error, because peers may not respond."""
        self.host_copies.close()
        self.lane.close()


def open_world(
    layout: Layout,
    schedule: Schedule,
    mtp_depth: int,
    cluster: ClusterConfig,
    device: torch.device,
    log: CollectiveLog | None = None,
    preemption: Preemption | None = None,
) -> World:
    """Builds this process's groups for a schedule's placement, and opens its lanes. All ranks call it."""
    return World(
        layout=layout,
        groups=build_groups(layout, schedule, mtp_depth, cluster),
        device=device,
        timeout_seconds=cluster.timeout_seconds,
        log=log or CollectiveLog(),
        lane=open_lane(device),
        host_copies=open_host_copies(device),
        preemption=preemption or Preemption(),
    )


def build_groups(layout: Layout, schedule: Schedule, mtp_depth: int, cluster: ClusterConfig) -> Groups:
    """Builds this rank's process groups for a schedule's placement. All ranks call it at the same point."""
    return Groups(
        layout,
        mirrored=is_mirrored(schedule),
        timeout_seconds=cluster.timeout_seconds,
        embedding=embedding_ranks(schedule, mtp_depth),
        communication_sms=cluster.communication_sms,
    )


class PipelineLinks:
    """The pipeline transport for the interpreter. Slices of sequences differ in shape."""

    def __init__(
        self,
        transport: PipelineTransport,
        nodes: Sequence[int],
        traffic: Traffic,
        shapes: Sequence[tuple[int, ...]],
        dtype: torch.dtype,
    ) -> None:
        """Wraps a transport. Micro-batch m has the shape with the number m modulo their number."""
        self._transport = transport
        self._nodes = nodes
        self._traffic = traffic
        self._shapes = tuple(shapes)
        self._dtype = dtype

    def with_shapes(self, shapes: Sequence[tuple[int, ...]]) -> "PipelineLinks":
        """Returns the same links for hidden states of other shapes. Only one of both has messages under way."""
        return PipelineLinks(self._transport, self._nodes, self._traffic, shapes, self._dtype)

    def post_receive(self, message: Message, /) -> Work[Tensor]:
        """Allocates a buffer for a message and starts to receive it."""
        shape = self._shapes[message.micro_batch % len(self._shapes)]
        return self._transport.post_receive(message_key(message), shape, self._dtype)

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Sends a message without waiting, and counts its bytes."""
        across = self._nodes[message.source] != self._nodes[message.destination]
        self._traffic.add_message(tensor.nbytes, across_nodes=across)
        self._transport.send(message_key(message), tensor)

    def flush(self) -> None:
        """Waits until all messages have been sent."""
        self._transport.flush()

    def close(self) -> None:
        """Closes the links."""
        self._transport.close()


def message_key(message: Message) -> MessageKey:
    """Returns the transport's key of a schedule's message."""
    return MessageKey(
        kind=message.kind,
        direction=message.direction,
        stage=message.stage,
        micro_batch=message.micro_batch,
        source=message.source,
        destination=message.destination,
    )


def open_links(
    world: World, observers: Observers, schedule: Schedule, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype
) -> PipelineLinks:
    """Opens this rank's links of one replica. All ranks of the job call it at the same point."""
    layout = world.layout
    log = observers.log
    transport = PipelineTransport(layout, linked_pairs(schedule), world.device, world.timeout_seconds, log)
    nodes = [layout.node_of(member) for member in layout.pipeline_group(world.rank)]
    return PipelineLinks(transport, nodes, observers.traffic, shapes, dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplicaConfig:
    """The configuration of a replica, equal on all ranks.

    `tokens` are sizes of what a rank dispatches in a micro-batch. Without `seed`, weights are not initialized.
    """

    model: ModelConfig
    computing: Computing
    precision: Precision
    dispatch: DispatchConfig
    tokens: TokenSizes
    batch: BatchConfig
    pairing: Literal["overlapped", "sequential"]
    seed: int | None
    slice_by: Literal["work", "length"] = "work"

    @classmethod
    def of_run(cls, config: TrainConfig) -> "ReplicaConfig":
        """Returns the configuration of the network that a run trains."""
        # A model in FP8 quantizes the rows that it sends, so the dispatcher must not quantize them again.
        is_fp8 = config.precision.kind == "fp8"
        return cls(
            model=config.model,
            computing=config.computing,
            precision=config.precision,
            dispatch=replace(config.dispatch, payload="full") if is_fp8 else config.dispatch,
            tokens=config.dispatch_site.tokens,
            batch=config.batch,
            pairing=config.schedule.pairing,
            seed=config.seed,
            slice_by=config.schedule.slice_by,
        )


def sequence_parts(config: ReplicaConfig, context: int, slices: int) -> SequenceParts:
    """Returns which tokens of a sequence each rank of a context group holds of each slice."""
    lengths = slice_lengths(
        config.model,
        config.batch.sequence_length_tokens,
        slices,
        is_fp8=config.precision.kind == "fp8",
        equal=config.slice_by,
        context=context,
    )
    return sliced_parts(lengths, context)


def link_shapes(config: ReplicaConfig, parts: SequenceParts, slices: int) -> tuple[tuple[int, int, int], ...]:
    """Returns the shapes of hidden states: of each slice, or of a rank's part of sequences."""
    batch = config.batch.micro_sequences
    hidden = config.model.hidden_size
    first_parts = range(0, len(parts.held), len(parts.held) // slices)
    return tuple((batch, parts.tokens_of(index), hidden) for index in first_parts)


def build_model(
    config: ReplicaConfig,
    dispatcher: Dispatcher,
    part: Part,
    device: torch.device,
    context: ContextGroup = ALONE,
) -> Transformer:
    """Builds a part of a model on a device, with the initial weights of the seed if there is one."""
    dtype = weight_dtype(config.precision)
    with device:  # the host never holds the weights
        model = Transformer(config.model, dispatcher, dtype, part, config.computing, context=context)
    if config.seed is not None:
        initialize_weights(model, config.seed)
    return model


def build_stages(model: Transformer, held: set[int], cut: Sequence[range]) -> dict[int, Stage]:
    """Returns the stages that this rank holds, by number."""
    last = len(cut) - 1
    return {number: Stage(model, cut[number], first=number == 0, last=number == last) for number in sorted(held)}


def stage_part(model: ModelConfig, held: set[int], cut: Sequence[range], experts: range) -> Part:
    """Returns the part of a model that given stages need."""
    last = len(cut) - 1 in held
    layers = [layer for stage in sorted(held) for layer in cut[stage]]
    if last:
        layers += range(model.num_layers, model.num_layers + model.mtp_depth)
    # MTP modules read the embedding. Gradients of all its copies are summed over `Groups.embedding`.
    has_embedding = 0 in held or (last and model.mtp_depth > 0)
    return Part(layers=tuple(layers), experts=experts, embedding=has_embedding, head=last)


def held_experts(model: ModelConfig, num_parts: int, expert_index: int) -> range:
    """Returns the routed experts of every layer on a rank, by its index in a group of `num_parts` ranks.

    Ranks have equal numbers. If these do not divide the experts, neighbors have some in common, spread over all ranks.
    """
    per_rank = -(-model.num_routed_experts // num_parts)
    first = expert_index * (model.num_routed_experts - per_rank) // max(1, num_parts - 1)
    return range(first, first + per_rank)


def weight_dtype(precision: Precision) -> torch.dtype:
    """Returns the type of weights and activations."""
    return {"float64": torch.float64, "float32": torch.float32}.get(precision.kind, torch.bfloat16)
