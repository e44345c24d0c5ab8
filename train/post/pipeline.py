"""Decodes with a replica where its weights are, in a training run or with loaded weights."""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import exchange_reports, gather_present
from comm.config import AllToAllDispatchConfig, DispatchConfig, LocalDispatchConfig
from comm.dispatch.process_group import Observers
from comm.dispatch.registry import TokenSizes
from comm.groups import start, stop
from comm.layout import Layout
from comm.transfers import DECODING_KINDS, PipelineTransport
from comm.watchdog.collective_log import CollectiveLog
from comm.watchdog.membership import STORE_FILE_VARIABLE
from dualpipe.build import build, decode
from dualpipe.ir import Message, Schedule, linked_pairs
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import Execution, execute, open_clock
from dualpipe.runtime.pairing import sequential
from dualpipe.runtime.program import Lane, PipelineStage, Program
from dualpipe.validate import validate
from infer.batch import PROMPT_TOKENS
from infer.engines.rounds import PipelinePlace, RoundFormat
from model.config import Computing, products_of
from model.hf.reader import HfReader
from model.transformer import Transformer, named_tensors
from train.checkpoint.sources import CheckpointReader, is_hf_folder, open_source, source_folder
from train.config import BatchConfig, InferenceConfig, PrecisionConfig
from train.replica import Replica, open_replica
from train.world import PipelineLinks, ReplicaConfig, World, build_groups, message_key, open_world

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
    schedule = build(config.kind, config.parallelism.pipeline, 2 * config.parallelism.pipeline)
    layout = Layout(config.parallelism, config.cluster.ranks_per_node)
    seconds = config.cluster.timeout_seconds
    groups = build_groups(layout, schedule, config.model.mtp_depth, seconds)
    world = open_world(layout, groups, device, seconds, CollectiveLog())
    replica = open_replica(world, _replica_config(config), schedule, config.cut)
    _open_weights(config).fill(named_tensors(replica.model))
    pipeline = ReplicaPipeline(replica)
    yield pipeline
    dist.barrier(group=groups.world)
    pipeline.close()
    replica.close()
    world.close()
    stop()


def _open_weights(config: InferenceConfig) -> HfReader | CheckpointReader:
    if is_hf_folder(config.ckpt):
        return open_source(config.ckpt, "ckpt", drop_mtp=config.model.mtp_depth == 0)
    return CheckpointReader(Path(source_folder(config.ckpt, "ckpt")), "ckpt", config.weights)


def _replica_config(config: InferenceConfig) -> ReplicaConfig:
    model = config.model
    products = products_of(config.dtype)
    dispatch: DispatchConfig = (
        AllToAllDispatchConfig(
            kind="all_to_all", payload="full", max_nodes=config.parallelism.expert, node_cap="verify"
        )
        if config.parallelism.expert > 1
        else LocalDispatchConfig(kind="local", payload="full")
    )
    return ReplicaConfig(
        model=model,
        computing=Computing(products=products),
        precision=PrecisionConfig(kind=config.dtype if config.dtype in ("float64", "float32") else "bf16"),
        dispatch=dispatch,
        tokens=TokenSizes(
            max_tokens=PROMPT_TOKENS, hidden_size=model.hidden_size, num_choices=model.num_experts_per_token
        ),
        # Sizes of training, which is not run.
        batch=BatchConfig(
            sequence_length_tokens=1, global_sequences=1, ramp=None, micro_sequences=1, document_mask=False
        ),
        pairing="sequential",
        seed=None,
    )
