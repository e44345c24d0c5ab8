"""Defines all layouts of a run on a number of ranks. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, product
from math import ceil, gcd

from comm.config import Cut, DispatchConfig, ParallelismConfig
from data.config import BatchSizes
from dualpipe.registry import SCHEDULES, ScheduleConfig
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
    """Everything that a layout chooses, except its schedule. The fields are named as the keys of a run."""

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
    """All layouts that a search compares."""

    config: TrainConfig
    ranks: int
    schedules: tuple[ScheduleConfig, ...]
    precisions: tuple[Precision, ...]
    recomputes: tuple[tuple[Recomputed, ...], ...]
    dispatches: tuple[DispatchConfig, ...]

    def is_like_run(self, setting: RankSetting) -> bool:
        """Returns whether a setting differs from the run's own only in the number of data-parallel ranks."""
        run = self.config
        mesh = self.config.parallelism
        layout = (setting.pipeline, setting.context, setting.expert, setting.micro_sequences)
        return (
            layout == (mesh.pipeline, mesh.context, mesh.expert, run.batch.micro_sequences)
            and setting.precision == run.precision
            and setting.dispatch == run.dispatch
            and all_recomputed(setting.recompute) == all_recomputed(run.recompute)
        )

    def settings(self) -> Iterator[RankSetting]:
        """Yields all settings of ranks, the smallest pipelines first."""
        self._check_size()
        for mesh in self._meshes():
            sizes = self._micro_batch_sizes(mesh)
            choices = [(kind, again) for kind in self.precisions for again in self._recomputes_of(kind)]
            for micro_sequences, (precision, recompute), dispatch in product(sizes, choices, self.dispatches):
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
        schedules = []
        for schedule in self.schedules:
            first, *others = SCHEDULES.get(schedule.kind).chunk_choices(None)
            # A kind with too few layers for its smallest number of chunks is kept, so that the rules reject it.
            enough = [chunks for chunks in others if pipeline * chunks <= self.config.model.num_layers]
            schedules += [replace(schedule, chunks=chunks) for chunks in (first, *enough)]
        return tuple(schedules)

    def layout_config(self, setting: RankSetting, schedule: ScheduleConfig) -> TrainConfig:
        """Returns the configuration of a layout, with an even cut if the run has one, or an automatic one."""
        is_even = self.config.parallelism.cut.kind == "even"
        mesh = ParallelismConfig(
            pipeline=setting.pipeline,
            data=setting.data,
            expert=setting.expert,
            cut=Cut("even" if is_even else "auto"),
            context=setting.context,
        )
        return replace(
            self.config,
            parallelism=mesh,
            batch=replace(self.config.batch, micro_sequences=setting.micro_sequences),
            precision=setting.precision,
            recompute=setting.recompute,
            dispatch=setting.dispatch,
            schedule=schedule,
        )

    def _micro_batch_sizes(self, mesh: ParallelismConfig) -> tuple[int, ...]:
        """Returns the sequences of a micro-batch that divide a data rank's share of the batch.

        Ranks that share sequences take one, or as many as the run: with more, fewer ranks could share each of them. If
        the ranks do not divide the batch, the result is 1, which rules reject.
        """
        share, rest = divmod(self.config.batch.global_sequences, mesh.data)
        sizes = (1,) if rest else divisors(share)
        own = self.config.batch.micro_sequences
        return sizes if mesh.context == 1 else tuple(size for size in sizes if size in (1, own))

    def _check_size(self) -> None:
        choices = len(self.dispatches) * sum(len(self._recomputes_of(precision)) for precision in self.precisions)
        count = sum(len(self._micro_batch_sizes(mesh)) for mesh in self._meshes()) * choices * len(self.schedules)
        if count > _MOST_LAYOUTS:
            raise ConfigError(
                f"batch.global_sequences: a search may have at most {_MOST_LAYOUTS:,} layouts, is "
                f"{self.config.batch.global_sequences} with about {count:,} layouts for ranks={self.ranks}; nearest "
                "valid: a batch with fewer divisors"
            )

    def _meshes(self) -> Iterator[ParallelismConfig]:
        """Yields the sizes of all axes, the smallest pipelines and context groups first."""
        layers = self.config.model.num_layers
        node = self.config.cluster.ranks_per_node
        pipelines = [length for length in divisors(self.ranks) if length <= layers]
        # The first pipeline with more ranks than layers is kept, so that the rules reject it.
        longer = [length for length in divisors(self.ranks) if layers < length <= 2 * layers][:1]
        for pipeline, context in product((*pipelines, *longer), context_sizes(self.config)):
            stage_ranks = self.ranks // pipeline
            if stage_ranks % context:
                continue
            for expert in divisors(gcd(stage_ranks, self.config.model.num_routed_experts)):
                # Expert groups are within a node or fill whole nodes.
                if expert % node == 0 or node % expert == 0 or self.ranks <= node:
                    yield ParallelismConfig(
                        pipeline=pipeline, data=stage_ranks // context, expert=expert, context=context
                    )

    def _recomputes_of(self, precision: Precision) -> tuple[tuple[Recomputed, ...], ...]:
        """Returns the sets of recomputed parts for a precision. FP8 recomputes all but `layer` in any case."""
        if precision.kind != "fp8":
            return self.recomputes
        return tuple(each for each in self.recomputes if all_recomputed(each).issuperset(RECOMPUTED)) or (RECOMPUTED,)


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
    lengths = range(1, min(config.model.num_layers, ranks) + 1)
    contexts = context_sizes(config)
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
    """Returns the divisors of a number that is at least 1, ascending."""
    small = [size for size in range(1, int(number**0.5) + 1) if number % size == 0]
    return tuple(sorted({*small, *(number // size for size in small)}))
