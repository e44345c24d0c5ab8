"""Defines all layouts of a run on a number of ranks. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from math import ceil, gcd

from comm.config import Cut, DispatchConfig, ParallelismConfig
from data.batch_sizes import BatchSizes
from dualpipe.config import ScheduleConfig
from dualpipe.registry import SCHEDULES
from model.config import LAYER, RECOMPUTED, Recomputed, all_recomputed
from train.config import Precision, TrainConfig
from train.config.errors import ConfigError
from train.tasks.registry import TASKS

MOST_RANKS = 2**20
_MOST_LAYOUTS = 3_000_000
LEAST_SHARED_TOKENS = 4096
"""Tokens of a sequence that a rank of a suggested context group holds at least: a sequence of pre-training."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RankSetting:
    """Everything that a layout chooses, except its schedule.

    Attributes:
        pipeline: pipeline ranks.
        data: groups of ranks that read different sequences.
        context: ranks that share each sequence.
        expert: ranks that share the experts of a layer.
        micro_sequences: sequences of a micro-batch.
        precision: type of weights and activations.
        recompute: parts of the model that the backward recomputes.
        dispatch: how rows are sent to experts.
    """

    pipeline: int
    data: int
    context: int
    expert: int
    micro_sequences: int
    precision: Precision
    recompute: tuple[Recomputed, ...]
    dispatch: DispatchConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchSpace:
    """All layouts that a search compares.

    Attributes:
        config: of the run; its layout is replaced.
        ranks: number of ranks of every layout.
        schedules: one for each kind, with its pairing.
        precisions: types of weights and activations.
        recomputes: sets of recomputed parts, for precisions that allow a choice.
        dispatches: how rows are sent to experts.
    """

    config: TrainConfig
    ranks: int
    schedules: tuple[ScheduleConfig, ...]
    precisions: tuple[Precision, ...]
    recomputes: tuple[tuple[Recomputed, ...], ...]
    dispatches: tuple[DispatchConfig, ...]

    def is_like_run(self, setting: RankSetting) -> bool:
        """Returns whether a setting differs from the run's own only in the number of data-parallel ranks."""
        run, mesh = self.config, self.config.parallelism
        layout = (setting.pipeline, setting.context, setting.expert, setting.micro_sequences)
        return (
            layout == (mesh.pipeline, mesh.context, mesh.expert, run.batch.micro_sequences)
            and setting.precision == run.precision
            and setting.dispatch == run.dispatch
            and all_recomputed(setting.recompute) == all_recomputed(run.recompute)
        )

    def settings(self) -> Iterator[RankSetting]:
        """Yields all settings of ranks, the smallest pipelines first.

        Raises:
            ConfigError: there are too many.
        """
        for mesh in self._meshes():
            for micro_sequences in self.micro_batch_sizes(mesh.data, mesh.context):
                for precision in self.precisions:
                    for recompute in self._recomputes_of(precision):
                        for dispatch in self.dispatches:
                            yield RankSetting(
                                pipeline=mesh.pipeline,
                                data=mesh.data,
                                context=mesh.context,
                                expert=mesh.expert,
                                micro_sequences=micro_sequences,
                                precision=precision,
                                recompute=recompute,
                                dispatch=dispatch,
                            )

    def schedules_of(self, pipeline: int) -> tuple[ScheduleConfig, ...]:
        """Returns every kind of schedule with each number of chunks for which there are enough layers."""
        found = []
        for schedule in self.schedules:
            for place, chunks in enumerate(SCHEDULES.get(schedule.kind).chunk_choices(None)):
                # A kind with too few layers for its smallest number of chunks is kept, so that the rules reject it.
                if place == 0 or pipeline * chunks <= self.config.model.num_layers:
                    found.append(replace(schedule, chunks=chunks))
        return tuple(found)

    def layout_config(self, setting: RankSetting, schedule: ScheduleConfig) -> TrainConfig:
        """Returns the configuration of a layout, with the cut of the run if that is a word.

        Args:
            schedule: kind, chunks and pairing.
        """
        config = self.config
        cut = Cut("even") if config.parallelism.cut.kind == "even" else Cut("auto")
        mesh = ParallelismConfig(
            pipeline=setting.pipeline, data=setting.data, expert=setting.expert, cut=cut, context=setting.context
        )
        return replace(
            config,
            parallelism=mesh,
            batch=replace(config.batch, micro_sequences=setting.micro_sequences),
            precision=setting.precision,
            recompute=setting.recompute,
            dispatch=setting.dispatch,
            schedule=schedule,
        )

    def micro_batch_sizes(self, data: int, context: int) -> tuple[int, ...]:
        """Returns the sequences of a micro-batch that divide a data rank's share of the batch.

        Ranks that share sequences take one, or as many as the run: with more, fewer ranks could share each of them.

        Args:
            data: groups of ranks that read different sequences. If they do not divide the batch, the result is 1, which
                rules reject.
            context: ranks that share each sequence.
        """
        share, rest = divmod(self.config.batch.global_sequences, data)
        sizes = (1,) if rest else divisors(share)
        own = self.config.batch.micro_sequences
        return sizes if context == 1 else tuple(size for size in sizes if size in (1, own))

    def check_size(self) -> None:
        """Rejects a search that would take too long.

        Raises:
            ConfigError: names the key, the rule and the value.
        """
        batch, kinds = self.config.batch, len(self.schedules)
        count = 0
        for mesh in self._meshes():
            sizes = len(self.micro_batch_sizes(mesh.data, mesh.context))
            choices = sum(len(self._recomputes_of(precision)) for precision in self.precisions)
            count += sizes * len(self.dispatches) * kinds * choices
        if count > _MOST_LAYOUTS:
            raise ConfigError(
                f"batch.global_sequences: a search may have at most {_MOST_LAYOUTS:,} layouts, is "
                f"{batch.global_sequences} with about {count:,} layouts for ranks={self.ranks}; nearest valid: a batch "
                f"with fewer divisors"
            )

    def _meshes(self) -> Iterator[ParallelismConfig]:
        """Yields the sizes of all axes, the smallest pipelines and context groups first."""
        for pipeline in self._pipelines():
            stage_ranks = self.ranks // pipeline
            for context in context_sizes(self.config):
                if stage_ranks % context == 0:
                    for expert in self._expert_sizes(stage_ranks):
                        yield ParallelismConfig(
                            pipeline=pipeline, data=stage_ranks // context, expert=expert, context=context
                        )

    def _recomputes_of(self, precision: Precision) -> tuple[tuple[Recomputed, ...], ...]:
        """Returns the sets of recomputed parts for a precision. FP8 recomputes all but `layer` in any case."""
        if precision.kind != "fp8":
            return self.recomputes
        return tuple(each for each in self.recomputes if all_recomputed(each).issuperset(RECOMPUTED)) or (RECOMPUTED,)

    def _pipelines(self) -> tuple[int, ...]:
        """Returns the lengths of pipelines, up to the first one that has more ranks than the model has layers."""
        layers = self.config.model.num_layers
        found = [length for length in range(1, min(layers, self.ranks) + 1) if self.ranks % length == 0]
        longer = (length for length in range(layers + 1, min(2 * layers, self.ranks) + 1) if self.ranks % length == 0)
        return (*found, *list(longer)[:1])

    def _expert_sizes(self, stage_ranks: int) -> tuple[int, ...]:
        """Returns the sizes of expert groups that are within a node or fill whole nodes."""
        node = self.config.cluster.ranks_per_node
        return tuple(
            size
            for size in divisors(gcd(stage_ranks, self.config.model.num_routed_experts))
            if size % node == 0 or node % size == 0 or self.ranks <= node
        )


def context_sizes(config: TrainConfig) -> tuple[int, ...]:
    """Returns the sizes of context groups that a layout may have, ascending.

    They are powers of two that leave a rank at least `LEAST_SHARED_TOKENS` of each sequence, and the run's own size.
    """
    length = config.batch.sequence_length_tokens
    sizes = {1, config.parallelism.context}
    if TASKS.get(config.task.kind).splits_sequences:
        powers = (2**power for power in range(1, 21))
        sizes |= {size for size in powers if length % (2 * size) == 0 and length // size >= LEAST_SHARED_TOKENS}
    return tuple(sorted(sizes))


def recompute_sets() -> tuple[tuple[Recomputed, ...], ...]:
    """Returns all sets of recomputed parts, the largest first: `layer`, then its cheap parts."""
    sizes = range(len(RECOMPUTED), -1, -1)
    return ((LAYER,), *(chosen for size in sizes for chosen in combinations(RECOMPUTED, size)))


def adapted_run(config: TrainConfig, ranks: int) -> TrainConfig:
    """Returns a run whose batch can be divided among some layouts of this many ranks.

    That is the run itself if possible. Otherwise its batch becomes the smallest multiple of the ranks that is not
    below it, without a ramp, in as many steps as process the same tokens.
    """
    batch = config.batch
    lengths, contexts = range(1, min(config.model.num_layers, ranks) + 1), context_sizes(config)
    meshes = ((length, context) for length in lengths for context in contexts if ranks % (length * context) == 0)
    if any(batch.global_sequences % (ranks // (length * context)) == 0 for length, context in meshes):
        return config
    sequences = ceil(batch.global_sequences / ranks) * ranks
    step = BatchSizes(sequences, batch.sequence_length_tokens, None).tokens_before(1)
    steps = ceil(config.batch_sizes.tokens_before(config.task.steps) / step)
    validation = ceil(config.validation.sequences / sequences) * sequences
    return replace(
        config,
        batch=replace(batch, global_sequences=sequences, ramp=None, micro_sequences=1),
        task=replace(config.task, steps=steps),
        validation=replace(config.validation, sequences=validation),
    )


def divisors(number: int) -> tuple[int, ...]:
    """Returns the divisors of a number, ascending.

    Args:
        number: at least 1.
    """
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))
