"""The rank under every size of the global batch: schedules and programs differ, all else is the one rank's."""

from collections.abc import Mapping
from dataclasses import replace

from data.batch_sizes import BatchSizes
from dualpipe.ir import Schedule, ScheduleError
from train.assemble import Assembly, compile_programs
from train.config import sized_config
from train.schedule.links import linked_pairs


class SizedAssemblies:
    """For each step the assembly whose programs run its number of micro-batches.

    They share model, gradients, optimiser, links and exchange; what differs is made once, at the start.
    """

    def __init__(self, assembly: Assembly, ramp: Mapping[int, Schedule]) -> None:
        """Compiles what the ramp needs.

        Args:
            assembly: for the size at the end.
            ramp: a schedule by the size, in sequences, that other steps have; none without a ramp.

        Raises:
            ScheduleError: a schedule does not hold, or places stages or messages elsewhere than the assembly's.
        """
        self._sizes: BatchSizes = assembly.config.batch_sizes
        self.last = assembly
        self._sized = {sequences: _sized(assembly, sequences, schedule) for sequences, schedule in ramp.items()}
        assert set(self._sizes.sizes) <= {*self._sized, assembly.config.batch.global_sequences}

    def of_step(self, step: int) -> Assembly:
        """The one for a step (from 0)."""
        return self._sized.get(self._sizes.sequences(step), self.last)


def _sized(assembly: Assembly, sequences: int, schedule: Schedule) -> Assembly:
    whole = assembly.schedule
    if schedule.placement != whole.placement or not set(linked_pairs(schedule)) <= set(linked_pairs(whole)):
        raise ScheduleError(
            f"batch.ramp: every size must have its stages where {whole.num_micro_batches} micro-batches have "
            f"them, {schedule.num_micro_batches} have them elsewhere"
        )
    config = sized_config(assembly.config, sequences)
    assert schedule.num_micro_batches == config.num_micro_batches
    rank = assembly.layout.pipeline_index(assembly.groups.rank)
    train_program, forward_program = compile_programs(config, schedule, rank, assembly.stages)
    return replace(
        assembly, config=config, schedule=schedule, train_program=train_program, forward_program=forward_program
    )
