"""Samples with the network that is trained, in its place or with a whole copy, or with loaded weights.

Shape legend: N tensors of the model, H bytes of a hash.
"""

import hashlib
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import exchange_reports, gather_present
from comm.config import AllToAllDispatchConfig, DispatchConfig, LocalDispatchConfig
from comm.dispatch.build import Fp8Dispatcher
from comm.dispatch.local import LocalDispatcher
from comm.dispatch.process_group import ExchangeGroup, Observers
from comm.groups import start, stop
from comm.layout import Layout
from comm.protocol import Dispatcher
from comm.transfers import DECODING_KINDS, PipelineTransport
from comm.watchdog.membership import STORE_FILE_VARIABLE
from dualpipe.builder import build_schedule, decode
from dualpipe.ir import Message, Schedule, linked_pairs
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import Execution, execute, open_clock
from dualpipe.runtime.pairing import sequential
from dualpipe.runtime.program import Lane, PipelineStage, Program
from dualpipe.validate import validate
from infer.cohorts import CohortSizes
from infer.config import GenerateError, Statistics, check, sum_statistics
from infer.engines.local import LocalEngine
from infer.engines.pipelined import PipelinedEngine
from infer.engines.rounds import PipelinePlace, RoundFormat
from infer.expert_moves import loaded_placement, place_experts, route_shared_experts
from infer.placement import Placement
from infer.protocol import Engine, NumberedPrompt, Request, Rollouts, Sample
from model.config import Computing, products_of
from model.hf.reader import HfReader
from model.transformer import Transformer, named_tensors, whole
from train.checkpoint.sources import CheckpointReader, is_hf_folder, open_source, source_folder
from train.config import BatchConfig, InferenceConfig, PrecisionConfig
from train.core.replica import Replica, open_replica
from train.core.world import PipelineLinks, ReplicaConfig, World, build_model, held_experts, message_key, open_world

ValueT = TypeVar("ValueT")


class ReplicaPipeline:
    """A replica as a pipeline that decodes (see `infer.engines.pipelined.pipeline.DecodePipeline`).

    No weight moves: the links carry plans, hidden states and token ids, and the replica's dispatcher exchanges rows.
    """

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        world = replica.world
        self.place = PipelinePlace(
            placement=replica.schedule.placement,
            rank=world.pipeline_index,
            data_index=world.data_index,
            num_data=world.layout.parallelism.data,
            shares_experts=world.layout.parallelism.expert > 1,
            cut=replica.cut,
        )
        self._programs: dict[tuple[int, int], Program] = {}
        self._placement: Placement | None = None  # of the experts; None before they are placed
        smallest = decode(self.place.placement, 1, 2)
        self._links = open_decode_links(replica.world, replica.observers, smallest)

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, after all updates of its weights are complete."""
        return self.replica.model

    def hand_over(
        self, form: RoundFormat, rounds: Mapping[int, Sequence[Tensor]], num_cohorts: int
    ) -> dict[tuple[int, int], Tensor]:
        """Implements `DecodePipeline.hand_over`."""
        self._links.form = form
        first_rounds: dict[tuple[int, int], Tensor] = {}
        arriving: list[tuple[int, int]] = []
        for direction, row in enumerate(self.place.placement):
            for cohort in range(num_cohorts):
                if row[-1] == row[0] == self.place.rank:
                    first_rounds[direction, cohort] = rounds[direction][cohort]
                elif row[-1] == self.place.rank:
                    self._links.send(self._token_message(direction, cohort, num_cohorts), rounds[direction][cohort])
                elif row[0] == self.place.rank:
                    arriving.append((direction, cohort))
        for direction, cohort in arriving:
            message = self._token_message(direction, cohort, num_cohorts)
            first_rounds[direction, cohort] = self._links.post_receive(message).wait()
        self._links.flush()
        return first_rounds

    def run(
        self, form: RoundFormat, stages: Mapping[int, PipelineStage], num_cohorts: int, num_rounds: int
    ) -> Execution:
        """Implements `DecodePipeline.run`."""
        self._links.form = form
        program = self._programs.get((num_cohorts, num_rounds))
        if program is None:
            program = self._programs[num_cohorts, num_rounds] = compile_decode_program(
                self.replica, num_cohorts, num_rounds
            )
        with self.replica.network.weights_unchanged():
            return execute(program, stages, self._links, open_clock(self.replica.world.device))

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all ranks. All ranks call it."""
        world = self.replica.world
        return int(world.reduce(torch.tensor(number), "rounds of decoding", dist.ReduceOp.MAX))

    def gather(self, value: ValueT | None) -> list[ValueT]:
        """Implements `DecodePipeline.gather`."""
        world = self.replica.world
        with world.log.collective("world", world.groups.world, "results of decoding"):
            return gather_present(value, world.groups.world)

    def first_report(self, text: str) -> str:
        """Implements `DecodePipeline.first_report`."""
        world = self.replica.world
        with world.log.collective("world", world.groups.world, "failure of decoding"):
            return exchange_reports(text or None, world.groups.world).first_text

    def place_experts(self, placement: Placement) -> None:
        """Moves the weights of experts to the slots of a placement. All ranks call it between two passes."""
        world = self.replica.world
        group = ExchangeGroup("expert", world.groups.expert, world.layout, self.replica.observers)

        def exchange(rows_NB: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
            return world.lane.submit(lambda: group.start(rows_NB, sent, received, "experts", None).wait()).wait()

        config = self.replica.config
        before = self._placement
        num_ranks = placement.shape.num_ranks
        num_shared = placement.shape.num_experts - config.model.num_routed_experts
        if before is None:
            held = [held_experts(config.model, num_ranks, index) for index in range(num_ranks)]
            before = loaded_placement(config.model, held, placement.shape)
            if num_shared:
                route_shared_experts(self.model)
        place_experts(self.replica.model, before, placement, group.index, exchange)
        self._placement = placement
        if self.model.dispatcher.num_local_experts != placement.num_local_slots:
            self.replica.dispatcher.close()
            tokens = replace(config.tokens, num_choices=config.model.num_experts_per_token + num_shared)
            dispatcher = world.open_dispatcher(
                config.dispatch, placement.shape.num_slots, self.replica.observers, tokens
            )
            self.replica = replace(self.replica, dispatcher=dispatcher)
            self.model.dispatcher = dispatcher

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._links.close()

    def _token_message(self, direction: int, cohort: int, num_cohorts: int) -> Message:
        """Returns the message with a cohort's tokens for the first round of a program."""
        row = self.place.placement[direction]
        return Message("tokens", direction, len(row) - 1, cohort - num_cohorts, row[-1], row[0])


def compile_decode_program(replica: Replica, num_cohorts: int, num_rounds: int) -> Program:
    """Compiles a replica's program that decodes with the placement of its schedule."""
    schedule = decode(replica.schedule.placement, num_cohorts, num_rounds)
    validate(schedule, forward_only=True)
    lanes: dict[int, tuple[Lane, ...]] = dict.fromkeys(replica.stages, ("compute",))
    return compile_rank(schedule, replica.world.pipeline_index, lanes, sequential)


class DecodeLinks(PipelineLinks):
    """The pipeline transport for the interpreter of a program that decodes.

    A message is a plan of fixed size, and then the rows that the plan announces. A receive starts when the rank waits
    for it, because the size of the rows is known only then. A sender never waits.
    """

    form: RoundFormat | None = None

    def post_receive(self, message: Message, /) -> "_LateReceive":
        """Returns a receive that starts when it is waited for."""
        assert self.form is not None
        return _LateReceive(self._transport, message, self.form)

    def send(self, message: Message, tensor: Tensor, /) -> None:
        """Sends a packed value without waiting, and counts its bytes."""
        assert self.form is not None
        across = self._nodes[message.source] != self._nodes[message.destination]
        self._traffic.add_message(tensor.nbytes, across_nodes=across)
        head = tensor[: self.form.plan_bytes]
        rows = tensor[self.form.plan_bytes :]
        self._transport.send(message_key(message), head)
        if len(rows):
            self._transport.send(message_key(message), rows)


class _LateReceive:
    def __init__(self, transport: PipelineTransport, message: Message, form: RoundFormat) -> None:
        self._transport = transport
        self._message = message
        self._form = form

    def wait(self) -> Tensor:
        """Receives the plan, then the rows, and returns both as one packed value."""
        key = message_key(self._message)
        form = self._form
        head = self._transport.post_receive(key, [form.plan_bytes], torch.uint8).wait()
        size = form.num_payload_bytes(self._message.kind, head)
        if not size:
            return head
        return torch.cat((head, self._transport.post_receive(key, [size], torch.uint8).wait()))


def open_decode_links(world: World, observers: Observers, schedule: Schedule) -> DecodeLinks:
    """Opens this rank's links for programs that decode. All ranks of the job call it at the same point."""
    layout = world.layout
    log = observers.log
    pairs = linked_pairs(schedule)
    seconds = world.timeout_seconds
    transport = PipelineTransport(layout, pairs, world.device, seconds, log, DECODING_KINDS)
    nodes = [layout.node_of(member) for member in layout.pipeline_group(world.rank)]
    return DecodeLinks(transport, nodes, observers.traffic, (), torch.uint8)


@contextmanager
def open_pipeline(config: InferenceConfig) -> Iterator[ReplicaPipeline]:
    """Joins the job, loads this rank's part of the weights, and leaves the job at the end.

    Every rank calls it, and calls the same collectives inside.
    """
    store_file = os.environ.get(STORE_FILE_VARIABLE)
    world_size = config.parallelism.world_size
    store = dist.FileStore(store_file, world_size) if store_file else None  # type: ignore[attr-defined]
    device = start(config.cluster, store)
    # The schedule only defines the placement; twice as many micro-batches as ranks are valid for every kind.
    schedule = build_schedule(config.kind, config.parallelism.pipeline, 2 * config.parallelism.pipeline)
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    world = open_world(layout, schedule, config.model.mtp_depth, config.cluster, device)
    replica = open_replica(world, _replica_config(config), schedule, config.cut)
    _open_weights(config).fill(named_tensors(replica.model))
    pipeline = ReplicaPipeline(replica)
    yield pipeline
    dist.barrier(group=world.groups.world)
    pipeline.close()
    pipeline.replica.close()
    world.close()
    stop()


def _open_weights(config: InferenceConfig) -> HfReader | CheckpointReader:
    if is_hf_folder(config.ckpt):
        return open_source(config.ckpt, "ckpt", drop_mtp=config.model.mtp_depth == 0)
    return CheckpointReader(Path(source_folder(config.ckpt, "ckpt")), "ckpt", config.weights)


def _replica_config(config: InferenceConfig) -> ReplicaConfig:
    model = config.model
    products = products_of(config.dtype)
    dispatch: DispatchConfig = LocalDispatchConfig(kind="local", payload="full")
    if (ranks := config.parallelism.expert) > 1:
        unlimited = AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=ranks, node_cap="verify")
        dispatch = config.dispatch or unlimited
    return ReplicaConfig(
        model=model,
        computing=Computing(products=products),
        precision=PrecisionConfig(kind=config.dtype if config.dtype in ("float64", "float32") else "bf16"),
        dispatch=dispatch,
        tokens=config.dispatch_site.tokens,
        # Sizes of training, which is not run.
        batch=BatchConfig(
            sequence_length_tokens=1, global_sequences=1, ramp=None, micro_sequences=1, document_mask=False
        ),
        pairing="sequential",
        seed=None,
    )


_HASH_BYTES = 32


def _drafts(replica: Replica) -> bool:
    """Returns whether MTP modules draft, which no clock decides: a resumed run samples the same bits."""
    return replica.config.model.mtp_depth > 0


class TrainingEngine(Engine, Protocol):
    """Protocol of an engine that a training run opens and closes."""

    def close(self) -> None:
        """Closes what the engine opened. All ranks call it at the same point."""
        ...


class ReplicaEngine:
    """An engine over a replica that is trained between two calls. No weight moves. Every rank has one."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._pipeline = ReplicaPipeline(replica)
        sizes = CohortSizes.within(replica.config.tokens.max_tokens)
        self._engine = PipelinedEngine(self._pipeline, speculative=_drafts(replica), sizes=sizes)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts."""
        with self._replica.model.weights_unchanged():
            rollouts = self._engine.generate(prompts, request)
        self._replica.discard_counts()
        return rollouts

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._pipeline.close()


class WholeCopy:
    """A copy of the whole model of a replica on this rank, with the types that training has."""

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy and agrees which rank sends each tensor. All ranks of the job call it."""
        world = replica.world
        config = replace(replica.config, seed=None)
        self._replica = replica
        self.received_bytes = 0
        dispatcher: Dispatcher = LocalDispatcher(config.model.num_routed_experts)
        if config.dispatch.payload == "fp8":
            dispatcher = Fp8Dispatcher(dispatcher)  # rows that stay on a rank are rounded as sent ones are
        self.model = build_model(config, dispatcher, whole(config.model), world.device).requires_grad_(
            requires_grad=False
        )
        # The first rank that holds a tensor sends it.
        tensors = named_tensors(replica.network)
        names = list(named_tensors(self.model))
        holders_N = torch.tensor([world.rank if name in tensors else len(world.ranks) for name in names])
        senders_N = world.reduce(holders_N, "holders of weights", dist.ReduceOp.MIN)
        self._senders: dict[str, int] = dict(zip(names, senders_N.tolist(), strict=True))

    def update(self) -> None:
        """Copies the present weights, one tensor at a time, and compares their hashes. All ranks call it."""
        world = self._replica.world
        tensors = named_tensors(self._replica.model)
        copies = named_tensors(self.model)
        sent_NH = torch.zeros(len(copies), _HASH_BYTES, dtype=torch.uint8)
        arrived_NH = torch.zeros_like(sent_NH)
        self.received_bytes = 0
        for number, (name, copy) in enumerate(copies.items()):
            sender = self._senders[name]
            if sender == world.rank:
                sent_NH[number] = _hash(tensors[name])
                copy.copy_(tensors[name])
            else:
                self.received_bytes += copy.nbytes
            with world.log.collective("world", world.groups.world, f"copy of {name}"):
                dist.broadcast(copy, src=sender, group=world.groups.world)
            arrived_NH[number] = _hash(copy)
        self._compare(list(copies), sent_NH, arrived_NH)

    def _compare(self, names: Sequence[str], sent_NH: Tensor, arrived_NH: Tensor) -> None:
        """Compares the hashes of this rank's copy with those of the senders. Rows of other senders are zero."""
        world = self._replica.world
        num_ranks = len(world.ranks)
        expected_NH = world.reduce(sent_NH, "hashes of weights")
        differing = (arrived_NH != expected_NH).any(dim=1).nonzero().flatten().tolist()
        none = len(names) * num_ranks
        first_here = differing[0] * num_ranks + world.rank if differing else none
        first = int(world.reduce(torch.tensor(first_here), "first weight that differs", dist.ReduceOp.MIN))
        if first < none:
            name = names[first // num_ranks]
            raise GenerateError(
                f"weights: {name} in the sampler's copy on rank {first % num_ranks} must have the bytes of rank "
                f"{self._senders[name]}, which trains it, has others"
            )


class GatheredEngine:
    """An engine that continues each prompt on one rank, with a copy of the whole model.

    Every rank has one. A rank that completes its prompts waits for the others, at most `cluster.timeout_seconds`.
    """

    def __init__(self, replica: Replica) -> None:
        """Allocates the copy. All ranks of the job call it; weights may change between calls."""
        self._world = replica.world
        self.copy = WholeCopy(replica)
        self._engine = LocalEngine(self.copy.model, speculative=_drafts(replica))

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`. Every rank returns all rollouts.

        Routes are those of the prompts that this rank continued.
        """
        check(self.copy.model.config, [prompt.tokens for prompt in prompts], request.max_new_tokens, "auto", 1)
        began = time.perf_counter()
        self.copy.update()
        sampled = Rollouts(rollouts=(), statistics=Statistics())
        problem = ""
        try:
            sampled = self._engine.generate(prompts[self._world.rank :: len(self._world.ranks)], request)
        except GenerateError as error:
            problem = str(error)
        gathered = self._gather(sampled, problem)
        by_place = {(rollout.prompt, rollout.sample): rollout for rollouts, _ in gathered for rollout in rollouts}
        statistics = sum_statistics([part for _, part in gathered], time.perf_counter() - began)
        order = [(prompt.number, sample) for prompt in prompts for sample in range(request.samples)]
        rollouts = tuple(by_place[key] for key in order)
        return Rollouts(rollouts=rollouts, statistics=statistics, routes=sampled.routes)

    def close(self) -> None:
        """Does nothing, because the engine opened no links."""

    def _gather(self, sampled: Rollouts, problem: str) -> list[tuple[tuple[Sample, ...], Statistics]]:
        """Returns the rollouts and statistics of the ranks that continued a prompt."""
        group = self._world.groups.world
        with self._world.log.collective("world", group, "rollouts of all ranks"):
            if text := exchange_reports(problem or None, group).first_text:
                raise GenerateError(text)
            return gather_present((sampled.rollouts, sampled.statistics) if sampled.rollouts else None, group)


def _hash(tensor: Tensor) -> Tensor:
    """Returns the SHA-256 of a tensor's bytes in row-major order, H."""
    content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(hashlib.sha256(content).digest()), dtype=torch.uint8)
