"""Chooses the small runs to compare with one rank.

They add one axis at a time, then the task, then follow the configured layout, then random ones. All of them use every
rank of the job, and the backend, dispatcher, recomputation and seed of the configured run. No torch here.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from math import gcd, lcm
from typing import Literal

from base.refusal import ConfigError
from comm.config import AllToAllDispatchConfig, Cut, DispatchConfig, LocalDispatchConfig, ParallelismConfig
from data.pack import PAIR, SCORE, WEIGHTS
from dualpipe.costs import Costs
from dualpipe.ir import MOST_LINK_DEPTH, ScheduleError
from dualpipe.registry import FALLBACK, SCHEDULES, ScheduleConfig
from model.config import ATTENTION_FORMS, RECOMPUTED, CutError, ModelConfig
from train.config import (
    NO_EVALUATION,
    BatchConfig,
    CheckpointingConfig,
    EmaConfig,
    PrecisionConfig,
    SamplesConfig,
    TaskConfig,
    TokenSchedule,
    TrainConfig,
    ValidationConfig,
)
from train.optim.learning_rate import ConstantRate, Duration
from train.optim.registry import AdamWConfig
from train.predict.cut import num_stages
from train.tasks.pretrain import PretrainConfig, build_pretrain
from train.tasks.registry import TASKS

CONFIGURED = "configured layout"
OPTIMIZER = "configured optimizer"
NUM_STEPS = 3
_SEQUENCES_PER_RANK = 4
_LEAST_TOKENS = 24
_LARGEST_AXIS = 8  # of experts, stages and parts of sequences in small runs
_NUM_EXPERTS = 8
_NUM_GROUPS = 4
_HIDDEN_SIZES = (32, 512, 2048, 7168)  # some dispatchers need large rows
_DRAWS_PER_SAMPLE = 50
_REFUSALS = (ConfigError, CutError, ScheduleError)

Check = Callable[[TrainConfig], None]
"""Raises a ConfigError, CutError or ScheduleError if a configuration breaks a rule."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """A small run. `axis` is what it adds to the trials before it; empty if it adds several things."""

    name: str
    axis: str
    config: TrainConfig

    def __str__(self) -> str:
        run = self.config
        mesh = run.parallelism
        task = "" if is_pretraining(run.task) else f", {run.task.kind}"
        return (
            f"{mesh.axes()} x expert {mesh.expert}, {run.schedule.kind} with {run.num_micro_batches} micro-batches, "
            f"MTP {run.model.mtp_depth}, {run.dispatch.kind}{task}"
        )


def choose_trials(config: TrainConfig, num_sampled: int, check: Check) -> list[Trial]:
    """Returns the trials of a run, in the order in which they run. Every process computes the same ones.

    Raises:
        ConfigError: no small run has the configured layout.
    """
    base = _small_run(config)
    trials = [trial for trial in _axes(base) if _is_valid(trial.config, check)]
    configured = _configured(config, base, check)
    if takes_task(config.task) and not is_pretraining(config.task):
        trials.append(Trial(name="task axis", axis="task", config=_with_task(config.task, base)))
        configured = _with_task(config.task, configured)
    trials.append(Trial(name=CONFIGURED, axis="", config=configured))
    trials.append(Trial(name=OPTIMIZER, axis="optimizer", config=_with_optimizer(config, configured)))
    generator = random.Random(f"{config.seed} {config.parallelism.axes()}")
    for _ in range(_DRAWS_PER_SAMPLE * num_sampled):
        if sum(not trial.axis for trial in trials) > num_sampled:
            break
        drawn = _draw(base, generator)
        if _is_valid(drawn, check) and drawn not in [trial.config for trial in trials]:
            trials.append(Trial(name=f"sampled layout {len(trials)}", axis="", config=drawn))
    return trials


def is_pretraining(task: TaskConfig) -> bool:
    """Returns whether a task is next-token prediction on documents, under any name."""
    return TASKS.get(task.kind).build is build_pretrain


def takes_task(task: TaskConfig) -> bool:
    """Returns whether small runs can take a task: they have the values of tokens that it reads."""
    return {WEIGHTS, PAIR, SCORE}.issuperset(TASKS.get(task.kind).values)


def _is_valid(config: TrainConfig, check: Check) -> bool:
    try:
        check(config)
    except _REFUSALS:
        return False
    return True


def _small_run(config: TrainConfig) -> TrainConfig:
    """Returns the run with a small model, batch and task; its layout has only a data axis."""
    world = config.parallelism.world_size
    on_cpu = config.cluster.device == "cpu"
    # FP8 products are not exact enough to be compared, so such a run is verified in bf16.
    kind: Literal["float64", "float32", "bf16"] = "float64"
    if not on_cpu:
        kind = "bf16" if config.precision.kind == "fp8" else config.precision.kind
    unit = lcm(2 * config.parallelism.context, 2 * _LARGEST_AXIS)
    length = unit * -(-_LEAST_TOKENS // unit)
    sequences = _SEQUENCES_PER_RANK * world
    # The run's values may amplify rounding.
    optim = replace(
        config.optim,
        learning_rate=1e-2,
        schedule=ConstantRate(kind="constant", warmup=Duration(amount=1, unit="steps")),
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.1,
        clip_norm=1.0,
        sharding="zero1" if kind == "bf16" else "replicated",
        moments="float32",
    )
    if isinstance(optim, AdamWConfig) and kind != "bf16":
        optim = replace(optim, offload=False)
    return replace(
        config,
        resume=None,
        init_from=None,
        parallelism=ParallelismConfig(pipeline=1, data=world, expert=1),
        model=_small_model(config.model, length),
        task=PretrainConfig(
            kind="pretrain",
            steps=NUM_STEPS,
            mtp_loss_weight=TokenSchedule.constant(0.3),
            balance_loss_weight=0.01,
            bias_update_rate=TokenSchedule.constant(0.05),
        ),
        batch=BatchConfig(
            sequence_length_tokens=length,
            global_sequences=sequences,
            ramp=None,
            micro_sequences=2,
            document_mask=config.batch.document_mask,
        ),
        validation=ValidationConfig(every_steps=0, sequences=0),
        checkpointing=CheckpointingConfig(every_steps=0, keep=None),
        samples=SamplesConfig(prompt="", held_out=0, tokens=0, temperature=0.0),
        rollout=None,
        reward=None,
        optim=optim,
        ema=EmaConfig(decay=None),
        precision=PrecisionConfig(kind=kind),
        schedule=ScheduleConfig(kind="1f1b", chunks=None, pairing="overlapped"),
        costs=Costs(forward=1.0, backward_input=1.0, backward_weight=1.0, exchange=1.0, latency=0.0),
        memory_cap=None,
        evaluation=NO_EVALUATION,
    )


def _small_model(model: ModelConfig, length: int) -> ModelConfig:
    """Returns a small model with the form of attention, its choices, rotation and router of the run."""
    form = ATTENTION_FORMS.get(model.attention)
    configured = {key: getattr(model, key) for key in form.small}
    # Numbers are sizes. Others are choices: true, false, a name or None.
    choices = {key: value for key, value in configured.items() if value is None or isinstance(value, bool | str)}
    return form.config(
        vocab_size=320,
        hidden_size=_HIDDEN_SIZES[0],
        num_layers=3,
        num_dense_layers=1,
        dense_intermediate_size=48,
        num_heads=2,
        num_routed_experts=_NUM_EXPERTS,
        num_shared_experts=1,
        num_experts_per_token=3,  # tokens take unequal numbers from their groups
        expert_intermediate_size=16,
        num_expert_groups=_NUM_GROUPS,
        num_limited_groups=2,
        routed_scaling_factor=2.5,
        norm_eps=1e-6,
        rope_theta=model.rope_theta,
        rope_scaling=model.rope_scaling,
        max_position_tokens=max(64, length),
        mtp_depth=1,
        mtp_hidden="post_norm",
        initializer_range=0.1,
        head="tokens",
        router=model.router,
        attention=model.attention,
        **{**form.small, **choices},
    )


def _axes(base: TrainConfig) -> tuple[Trial, ...]:
    """Returns runs that each add one axis to one rank, or to a run before."""
    world = base.parallelism.world_size
    size = gcd(world, _LARGEST_AXIS)
    alone = replace(base, model=replace(base.model, mtp_depth=0))
    whole = replace(alone.batch, micro_sequences=_SEQUENCES_PER_RANK)
    experts = ParallelismConfig(pipeline=1, data=world, expert=size)
    context = ParallelismConfig(pipeline=1, data=world // size, expert=1, context=size)
    rungs = (
        ("data", world, replace(alone, batch=whole)),
        ("micro-batch", 2, alone),
        ("expert", size, replace(alone, parallelism=experts, dispatch=_exchange(base, size))),
        ("MTP", 2, replace(alone, model=base.model)),
        ("pipeline", size, _staged(alone, size, 1, 1, "1f1b")),
        ("directions", size, _staged(alone, size, 1, 1, "dualpipe")),
        ("slices", size, _sliced(_staged(alone, size, 1, 1, "1f1b"))),
        ("context", size, replace(alone, parallelism=context)),
    )
    parts = () if ATTENTION_FORMS.get(base.model.attention).takes_parts else ("slices", "context")
    chosen = [rung for rung in rungs if rung[1] > 1 and rung[0] not in parts]
    return tuple(Trial(name=f"{axis} axis", axis=axis, config=run) for axis, _, run in chosen)


def _sliced(run: TrainConfig) -> TrainConfig:
    # With three, two later slices add to the gradient of the first one's keys and values.
    return replace(run, schedule=replace(run.schedule, slices=3))


def _with_optimizer(config: TrainConfig, run: TrainConfig) -> TrainConfig:
    """Returns a small run with the configured optimizer and average, in float32 instead of float64."""
    names = ["sharding", "moments", "bucket_elements", *(["offload"] if isinstance(run.optim, AdamWConfig) else [])]
    # A larger epsilon keeps the sign of a rounded gradient near zero from deciding an update.
    optim = replace(run.optim, eps=1e-4, **{name: getattr(config.optim, name) for name in names})
    # An average with the run's decay would hardly change in two steps.
    ema = EmaConfig(decay=None if config.ema.decay is None else 0.7)
    precision = PrecisionConfig(kind="float32") if run.precision.kind == "float64" else run.precision
    return replace(run, optim=optim, ema=ema, precision=precision)


def _with_task(task: TaskConfig, run: TrainConfig) -> TrainConfig:
    """Returns a small run with the configured task, whose losses have the weights of other small runs."""
    same = {field.name: getattr(run.task, field.name) for field in fields(TaskConfig) if field.name != "kind"}
    head = TASKS.get(task.kind).head
    depth = run.model.mtp_depth if head == "tokens" else 0
    return replace(run, task=replace(task, **same), model=replace(run.model, head=head, mtp_depth=depth))


def _exchange(config: TrainConfig, expert: int) -> DispatchConfig:
    """Returns the run's dispatcher, or one that works with this number of expert ranks."""
    if expert == 1:
        return config.dispatch.without_copies()
    if config.dispatch.kind != "local":
        return config.dispatch
    return AllToAllDispatchConfig(kind="all_to_all", payload="full", max_nodes=4, node_cap="verify")


def _staged(
    base: TrainConfig, pipeline: int, context: int, expert: int, kind: str, chunks: int | None = None
) -> TrainConfig:
    """Returns a run with stages, and at least one layer in each."""
    world = base.parallelism.world_size
    mesh = ParallelismConfig(
        pipeline=pipeline, data=world // pipeline // context, expert=expert, cut=Cut("even"), context=context
    )
    stages = num_stages(base.model, pipeline, kind, chunks)
    return replace(
        base,
        parallelism=mesh,
        schedule=replace(base.schedule, kind=kind, chunks=chunks),
        model=replace(base.model, num_layers=max(base.model.num_layers, stages)),
    )


def _configured(config: TrainConfig, base: TrainConfig, check: Check) -> TrainConfig:
    """Returns a small run with the layout, schedule and dispatcher of the configured one."""
    mesh = config.parallelism
    kind = FALLBACK if config.schedule.kind == "auto" else config.schedule.kind
    run = _staged(base, mesh.pipeline, mesh.context, mesh.expert, kind, config.schedule.chunks)
    # As many micro-batches as the schedule needs, with one or two sequences each.
    run = replace(run, schedule=replace(config.schedule, kind=kind))
    problem: ValueError | None = None
    nodes = -(-mesh.expert // config.cluster.ranks_per_node)
    experts = lcm(_NUM_EXPERTS, mesh.expert)
    for hidden in _HIDDEN_SIZES:
        for groups in dict.fromkeys((_NUM_GROUPS, nodes, 1)):
            for factor in (1, 2, 4):
                model = replace(
                    run.model,
                    hidden_size=hidden,
                    num_routed_experts=experts,
                    num_expert_groups=groups,
                    num_limited_groups=min(2, groups),
                )
                batch = replace(run.batch, micro_sequences=1, global_sequences=factor * base.batch.global_sequences)
                tried = replace(run, model=model, batch=batch)
                try:
                    check(tried)
                    return tried
                except _REFUSALS as error:
                    problem = problem or error
    raise ConfigError(f"verification: no small run has the configured layout: {problem}") from problem


def _draw(base: TrainConfig, generator: random.Random) -> TrainConfig:
    """Returns a random layout with a random schedule, which may break a rule."""
    world = base.parallelism.world_size
    pipeline = generator.choice(_axis_sizes(world))
    context = generator.choice(_axis_sizes(world // pipeline))
    expert = generator.choice([size for size in _axis_sizes(world // pipeline) if _NUM_EXPERTS % size == 0])
    kind = generator.choice(sorted(SCHEDULES.names()))
    chunks = generator.choice([None, *SCHEDULES.get(kind).chunks[:2]])
    run = _staged(base, pipeline, context, expert, kind, chunks)
    slices = generator.choice((1, 2)) if SCHEDULES.get(kind).takes_slices else 1
    schedule = replace(run.schedule, pairing=generator.choice(("overlapped", "sequential")), slices=slices)
    if pipeline == 1:
        schedule = replace(base.schedule, pairing=schedule.pairing)
    dispatch = _exchange(base, expert)
    if expert == 1 and generator.random() < 0.3:
        dispatch = LocalDispatchConfig(kind="local", payload="full")
    drawn = replace(
        run,
        dispatch=dispatch,
        batch=replace(base.batch, micro_sequences=generator.choice((1, 2))),
        model=replace(run.model, mtp_depth=generator.choice((0, 1, 2))),
        recompute=tuple(sorted(generator.sample(RECOMPUTED, generator.randrange(len(RECOMPUTED) + 1)))),
        seed=generator.randrange(2**31),
    )
    depth = 1 + drawn.seed % MOST_LINK_DEPTH
    slice_by: Literal["work", "length"] = "length" if schedule.slices > 1 and drawn.seed % 2 else "work"
    return replace(drawn, schedule=replace(schedule, link_depth=depth, slice_by=slice_by))


def _axis_sizes(ranks: int) -> list[int]:
    return [size for size in range(1, min(ranks, _LARGEST_AXIS) + 1) if ranks % size == 0]
