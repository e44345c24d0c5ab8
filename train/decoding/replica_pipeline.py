"""Decodes with a replica where its weights are: programs, links and agreements between ranks."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from comm.agreement import exchange_reports, gather_present
from dualpipe.decode import decode
from dualpipe.ir import Placement
from dualpipe.runtime.clock import open_clock
from dualpipe.runtime.compile import compile_rank
from dualpipe.runtime.execute import Execution, execute
from dualpipe.runtime.pairing import sequential
from dualpipe.runtime.program import Program
from dualpipe.runtime.protocols import Lane, PipelineStage
from dualpipe.transfers import Message
from dualpipe.validate import validate
from infer.engines.pipelined.plan import RoundFormat
from model.transformer import Transformer
from train.decoding.links import DecodeLinks, open_decode_links
from train.replica import Replica

ValueT = TypeVar("ValueT")


class ReplicaPipeline:
    """A replica as a pipeline that decodes (see `infer.engines.pipelined.pipeline.DecodePipeline`).

    No weight moves: the links carry plans, hidden states and token ids, and the replica's dispatcher exchanges rows.
    """

    def __init__(self, replica: Replica) -> None:
        """Opens the links. All ranks of the job call it at the same point.

        Args:
            replica: the network; its weights may change between calls of an engine.
        """
        self._replica = replica
        self._programs: dict[tuple[int, int], Program] = {}
        smallest = decode(self.placement, 1, 2)
        self._links: DecodeLinks = open_decode_links(replica.world, replica.observers, smallest)

    @property
    def replica(self) -> Replica:
        """The network."""
        return self._replica

    @property
    def placement(self) -> Placement:
        """The pipeline rank of each stage, for each direction."""
        return self._replica.schedule.placement

    @property
    def rank(self) -> int:
        """This rank within its pipeline."""
        return self._replica.world.pipeline_index

    @property
    def data_index(self) -> int:
        """Index of this pipeline along the data axis."""
        return self._replica.world.data_index

    @property
    def num_data(self) -> int:
        """Number of pipelines."""
        return self._replica.world.layout.parallelism.data

    @property
    def shares_experts(self) -> bool:
        """Whether several pipelines hold the experts of a layer together."""
        return self._replica.world.layout.parallelism.expert > 1

    @property
    def cut(self) -> tuple[range, ...]:
        """Layers of each stage."""
        return self._replica.cut

    @property
    def model(self) -> Transformer:
        """This rank's part of the model, after all updates of its weights are complete."""
        return self._replica.model

    def hand_over(
        self, form: RoundFormat, rounds: Mapping[int, Sequence[Tensor]], num_cohorts: int
    ) -> dict[tuple[int, int], Tensor]:
        """Implements `DecodePipeline.hand_over`."""
        self._links.form = form
        found: dict[tuple[int, int], Tensor] = {}
        arriving: list[tuple[int, int]] = []
        for direction, row in enumerate(self.placement):
            for cohort in range(num_cohorts):
                if row[-1] == row[0] == self.rank:
                    found[direction, cohort] = rounds[direction][cohort]
                elif row[-1] == self.rank:
                    self._links.send(self._token_message(direction, cohort, num_cohorts), rounds[direction][cohort])
                elif row[0] == self.rank:
                    arriving.append((direction, cohort))
        for direction, cohort in arriving:
            message = self._token_message(direction, cohort, num_cohorts)
            found[direction, cohort] = self._links.post_receive(message).wait()
        self._links.flush()
        return found

    def run(
        self, form: RoundFormat, stages: Mapping[int, PipelineStage], num_cohorts: int, num_rounds: int
    ) -> Execution:
        """Implements `DecodePipeline.run`."""
        self._links.form = form
        program = self._programs.get((num_cohorts, num_rounds))
        if program is None:
            program = self._programs[num_cohorts, num_rounds] = compile_decode_program(
                self._replica, num_cohorts, num_rounds
            )
        with self._replica.network.weights_unchanged():
            return execute(program, stages, self._links, open_clock(self._replica.world.device))

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all ranks. All ranks call it."""
        world = self._replica.world
        return int(world.reduce(torch.tensor(number), "rounds of decoding", dist.ReduceOp.MAX))

    def gather(self, value: ValueT | None) -> list[ValueT]:
        """Implements `DecodePipeline.gather`."""
        world = self._replica.world
        with world.log.collective("world", world.groups.world, "results of decoding"):
            return gather_present(value, world.groups.world)

    def first_report(self, text: str) -> str:
        """Implements `DecodePipeline.first_report`."""
        world = self._replica.world
        with world.log.collective("world", world.groups.world, "failure of decoding"):
            return exchange_reports(text or None, world.groups.world).first_text

    def close(self) -> None:
        """Closes the links. All ranks call it at the same point."""
        self._links.close()

    def _token_message(self, direction: int, cohort: int, num_cohorts: int) -> Message:
        """Returns the message with a cohort's tokens for the first round of a program."""
        row = self.placement[direction]
        return Message("tokens", direction, len(row) - 1, cohort - num_cohorts, row[-1], row[0])


def compile_decode_program(replica: Replica, num_cohorts: int, num_rounds: int) -> Program:
    """Compiles a replica's program that decodes with the placement of its schedule."""
    schedule = decode(replica.schedule.placement, num_cohorts, num_rounds)
    validate(schedule, forward_only=True)
    lanes: dict[int, tuple[Lane, ...]] = dict.fromkeys(replica.stages, ("compute",))
    return compile_rank(schedule, replica.world.pipeline_index, lanes, sequential)
