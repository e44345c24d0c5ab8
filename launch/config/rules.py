"""Rules between the keys of a run's configuration, except model and optimizer rules. Reads no files."""

import re

from data.batch_sizes import BatchRamp, ramp_sizes
from dualpipe.build import build
from dualpipe.generate.cache import schedules_folder
from dualpipe.ir import ScheduleError
from dualpipe.registry import candidates, check_size, check_slices
from launch.config.dispatch_rules import check_exchange
from launch.config.errors import check_all
from launch.config.model_rules import check_attention, check_expert_ranks, check_experts, check_model, check_optim
from launch.config.rollout_rules import check_rollouts
from model.config import RECOMPUTED, CutError, all_recomputed
from train.config import TrainConfig
from train.config.errors import ConfigError, divisors, multiples
from train.memory.fitted_cut import fitted_cut
from train.planner.scaling import communication_share
from train.schedule.cut import run_cut, run_placement, with_cut
from train.schedule.nominal import nominal_costs
from train.schedule.ramp import sized_run
from train.tasks.registry import TASKS

_RAMP = "batch.ramp"


def check_name(config: TrainConfig) -> None:
    """Rejects a name that is not valid as a folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise ConfigError(
            "name: must contain only letters, digits, '.', '_' and '-', because it names a folder, is "
            f"{config.name!r}; "
            f"nearest valid: {re.sub(r'[^A-Za-z0-9._-]+', '-', config.name).lstrip('._-') or 'run'}"
        )


def check_rules(config: TrainConfig) -> None:
    """Rejects an invalid configuration by its values, with all broken rules in one message."""
    check_all(config, _check_sizes, _check_profile, check_rollouts, TASKS.get(config.task.kind).check)


def _check_sizes(config: TrainConfig) -> None:
    """Rejects sizes of model, batch and layout; the first error, as the rules build upon each other."""
    _check_batch(config)
    check_model(config.model)
    _check_task(config)
    _check_schedule(config)
    _check_ramp(config)
    _check_ranks(config)
    check_experts(config.model, config.parallelism.expert)
    check_exchange(config)
    check_optim(config)


def _check_batch(config: TrainConfig) -> None:
    batch, validation, model = config.batch, config.validation, config.model
    share = config.parallelism.data * batch.micro_sequences
    if batch.global_sequences % share:
        raise ConfigError(
            f"batch.global_sequences: must be divisible by parallelism.data x batch.micro_sequences "
            f"= {share}, is {batch.global_sequences}; "
            f"nearest valid: {multiples(batch.global_sequences, share)}"
        )
    if batch.sequence_length_tokens > model.max_position_tokens:
        raise ConfigError(
            f"batch.sequence_length_tokens: must be at most model.max_position_tokens={model.max_position_tokens}, "
            f"is {batch.sequence_length_tokens}; nearest valid: {model.max_position_tokens}"
        )
    parts = 2 * config.parallelism.context
    if config.parallelism.context > 1 and batch.sequence_length_tokens % parts:
        raise ConfigError(
            f"batch.sequence_length_tokens: must be divisible by 2 x parallelism.context = {parts}, because each of "
            f"the ranks that share a sequence holds two equal parts of it, is {batch.sequence_length_tokens}; "
            f"nearest valid: {multiples(batch.sequence_length_tokens, parts)}"
        )
    if batch.sequence_length_tokens <= model.mtp_depth:
        raise ConfigError(
            f"batch.sequence_length_tokens: must be above model.mtp_depth={model.mtp_depth}, "
            f"is {batch.sequence_length_tokens}; nearest valid: {model.mtp_depth + 1}"
        )
    if validation.sequences % batch.global_sequences:
        raise ConfigError(
            f"validation.sequences: must be 0 or a multiple of "
            f"batch.global_sequences={batch.global_sequences}, because validation runs whole batches, "
            f"is {validation.sequences}; "
            f"nearest valid: {multiples(validation.sequences, batch.global_sequences)}"
        )


def _check_task(config: TrainConfig) -> None:
    """Rejects an output head that does not fit the task."""
    kind, model, spec = config.task.kind, config.model, TASKS.get(config.task.kind)
    if model.head != spec.head:
        raise ConfigError(
            f"model.head: must be {spec.head} with task={kind}, is {model.head}; nearest valid: {spec.head}"
        )
    context = config.parallelism.context
    if context > 1 and not spec.splits_sequences:
        raise ConfigError(
            f"parallelism.context: must be 1 with task={kind}, because its loss reads whole sequences on one rank, "
            f"is {context}; nearest valid: 1, or a task whose loss is of single tokens: {_splitting_tasks()}"
        )
    if model.head == "score" and model.mtp_depth:
        raise ConfigError(
            f"model.mtp_depth: must be 0 with model.head=score, as MTP modules predict tokens, is {model.mtp_depth}; "
            f"nearest valid: 0"
        )


def _check_schedule(config: TrainConfig) -> None:
    """Rejects a schedule that does not fit the run. With `auto`, rejects a run that no schedule fits."""
    if config.costs.offload is not None and config.memory_cap is None:
        raise ConfigError(
            f"costs.offload: must be null without memory_cap, because activations are offloaded only to keep a cap, "
            f"is {config.costs.offload:g}; nearest valid: null, or memory_cap={config.parallelism.pipeline}"
        )
    _check_slices(config)
    kinds = tuple(candidates()) if config.schedule.kind == "auto" else (config.schedule.kind,)
    problems: list[ValueError] = []
    for kind in kinds:
        try:
            _check_kind(config, kind)
        except (ScheduleError, CutError, ConfigError) as problem:
            problems.append(problem)
    if len(problems) == len(kinds):
        raise problems[0]


def _check_slices(config: TrainConfig) -> None:
    """Rejects slices of sequences under a schedule, a task or a layout that needs whole sequences."""
    slices, length, kind = config.schedule.slices, config.batch.sequence_length_tokens, config.task.kind
    check_slices(config.schedule.kind, config.num_micro_batches, slices)
    if slices == 1:
        return
    if not TASKS.get(kind).splits_sequences:
        raise ConfigError(
            f"schedule.slices: must be 1 with task={kind}, because its loss reads whole sequences, is {slices}; "
            f"nearest valid: 1, or a task whose loss is of single tokens: {_splitting_tasks()}"
        )
    if config.parallelism.context > 1:
        raise ConfigError(
            f"schedule.slices: must be 1 with parallelism.context={config.parallelism.context}, because sequences are "
            f"cut over ranks or over time, is {slices}; nearest valid: 1, or parallelism.context=1"
        )
    if slices > length:
        raise ConfigError(
            f"schedule.slices: must be at most batch.sequence_length_tokens={length}, is {slices}; "
            f"nearest valid: {length}"
        )


def _splitting_tasks() -> str:
    return ", ".join(name for name, spec in TASKS.items() if spec.splits_sequences)


def _check_kind(config: TrainConfig, kind: str) -> None:
    pipeline = config.parallelism.pipeline
    key, share = "batch.global_sequences", config.parallelism.data * config.batch.micro_sequences
    try:
        check_size(
            kind,
            pipeline,
            config.num_micro_batches,
            ranks_key="parallelism.pipeline",
            micro_batches_key=key,
        )
    except ScheduleError as error:
        unit = f"; one micro-batch over all data ranks is parallelism.data x batch.micro_sequences = {share} sequences"
        raise ScheduleError(f"{error}{unit if str(error).startswith(key) else ''}") from error
    run_cut(config, run_placement(config, kind))
    if config.memory_cap is not None:
        costs = nominal_costs(with_cut(config, fitted_cut(config, kind)), kind)
        build(
            kind, pipeline, config.num_micro_batches, costs, config.memory_cap, schedules_folder(config.data.cache_dir)
        )


def _check_ramp(config: TrainConfig) -> None:
    """Rejects a batch ramp with a size that does not fit the ranks, the micro-batches or the schedule."""
    ramp, last = config.batch.ramp, config.batch.global_sequences
    if ramp is None:
        return
    if not 2 <= ramp.num_sizes <= last:
        raise ConfigError(
            f"{_RAMP}.num_sizes: must be at least 2 and at most batch.global_sequences={last}, which is the last size, "
            f"is {ramp.num_sizes}; nearest valid: {2 if ramp.num_sizes < 2 else last}, or {_RAMP}=null"
        )
    if ramp.start_sequences >= last:
        raise ConfigError(
            f"{_RAMP}.start_sequences: must be below batch.global_sequences={last}, is {ramp.start_sequences}; "
            f"nearest valid: {last - 1}, or {_RAMP}=null"
        )
    _check_ramp_sizes(config, ramp)


def _check_ramp_sizes(config: TrainConfig, ramp: BatchRamp) -> None:
    batch = config.batch
    share = config.parallelism.data * batch.micro_sequences
    for size in ramp_sizes(batch.global_sequences, ramp):
        if size % share:
            raise ConfigError(
                f"{_RAMP}: every size must be divisible by parallelism.data x batch.micro_sequences = {share}, "
                f"one is {size}; nearest valid: start_sequences={multiples(ramp.start_sequences, share)}, and a growth "
                f"of (num_sizes - 1) x {share} or a multiple of it"
            )
        try:
            sized_run(config, size)
        except ScheduleError as error:
            raise ConfigError(f"{error}; a size of {size} sequences has {size // share} micro-batches") from error


def _check_ranks(config: TrainConfig) -> None:
    cluster, parallelism, world = config.cluster, config.parallelism, config.parallelism.world_size
    check_expert_ranks(parallelism)
    if world > cluster.ranks_per_node and world % cluster.ranks_per_node:
        raise ConfigError(
            f"cluster.ranks_per_node: must divide the {world} ranks (parallelism.{parallelism.axes('=')}), "
            f"is {cluster.ranks_per_node}; nearest valid: {divisors(world, cluster.ranks_per_node)}"
        )
    check_attention(config)
    if cluster.communication_sms is not None and cluster.num_sms is not None:
        communication_share("cluster", cluster.communication_sms, cluster.num_sms)
    if len(set(config.recompute)) < len(config.recompute):
        raise ConfigError(
            f"recompute: must name each at most once, is [{','.join(config.recompute)}]; "
            f"nearest valid: [{','.join(dict.fromkeys(config.recompute))}]"
        )
    if config.precision.kind == "fp8" and not all_recomputed(config.recompute).issuperset(RECOMPUTED):
        raise ConfigError(
            f"recompute: must name all parts with precision=fp8, which stores only the inputs of linear layers, "
            f"is [{','.join(config.recompute)}]; nearest valid: [{','.join(RECOMPUTED)}]"
        )
    if cluster.backend == "nccl" and cluster.device != "cuda":
        raise ConfigError(
            f"cluster.backend: nccl needs cluster.device=cuda, is nccl with cluster.device={cluster.device}; "
            f"nearest valid: gloo"
        )


def _check_profile(config: TrainConfig) -> None:
    """Rejects steps and ranks of the profile that the run does not have."""
    steps, world = config.task.steps, config.parallelism.world_size
    for key, least, most, chosen in (
        ("profile.steps", 1, steps, config.profile.steps),
        ("profile.ranks", 0, world - 1, config.profile.ranks),
    ):
        for number in chosen:
            if not least <= number <= most:
                nearest = min(max(number, least), most)
                raise ConfigError(
                    f"{key}: each must be from {least} to {most}, one is {number}; nearest valid: {nearest}"
                )
        if len(set(chosen)) < len(chosen):
            once = ",".join(map(str, dict.fromkeys(chosen)))
            raise ConfigError(
                f"{key}: must name each at most once, is [{','.join(map(str, chosen))}]; nearest valid: [{once}]"
            )
