"""A run's configuration: read from plain values, written back, and checked across its parts. No torch here."""

import re
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_type_hints

from data.config import DataConfig
from data.prepare import check_config
from data.registry import DATA_SOURCES
from dualpipe.generate.cache import schedules_folder
from dualpipe.ir import ScheduleError
from dualpipe.registry import SCHEDULES, build, check_size
from launch.config.dispatch_rules import check_exchange
from launch.config.memory_rules import check_memory
from launch.config.model_choice import expand_model
from launch.config.model_rules import check_experts, check_model
from launch.config.optim_rules import check_optim
from launch.config.profile_rules import check_profile
from launch.config.ramp_rules import check_ramp
from launch.config.tokenizer_choice import expand_tokenizer
from launch.ranks.environment import apply_rank_environment
from model.config import RECOMPUTED, CutError, cut_layers
from train.checkpoint.initial_weights import check_initial
from train.checkpoint.locate import AUTO, looks_whole, newest_whole
from train.checkpoint.manifest import check_manifest, read_step
from train.checkpoint.sources import is_hf_folder
from train.checkpoint.verify import find_resumed, verify
from train.config import TrainConfig
from train.config.decode import decode, encode
from train.config.errors import ConfigError, divisors, multiples
from train.schedule.costs import nominal_costs

_MOMENTS = Literal["auto", "float32", "bf16"]


def read_config(values: Mapping[str, Any]) -> TrainConfig:
    """Plain values, as `conf/train.yaml` and a run's `config.yaml` hold them, to a configuration.

    Raises:
        ConfigError: an unknown or missing key, a value of another type.
        CheckpointError, HfError: the model or the tokenizer is that of weights which cannot be read.
    """
    model = values.get("model")
    if isinstance(model, Mapping):
        values = {**values, "model": expand_model(model, values.get("init_from"), values.get("init_mtp"))}
    plugins = values.get("plugins")
    if isinstance(plugins, list | tuple) and all(isinstance(path, str) for path in plugins):
        # Ranks and later runs may have another working folder.
        values = {**values, "plugins": [str(Path(path).expanduser().resolve()) for path in plugins]}
    data = values.get("data")
    if isinstance(data, Mapping):
        # On the command line the source's keys stand next to data's other keys: `data=files data.paths=[a,b]`.
        own = {field.name for _, entry in DATA_SOURCES.items() for field in fields(entry.config)}
        source = {key: data[key] for key in data if key in own}
        others = {key: value for key, value in data.items() if key not in own}
        if "tokenizer" in others:
            others["tokenizer"] = expand_tokenizer(others["tokenizer"], values.get("init_from"), _resumed(values))
        hint = get_type_hints(DataConfig, include_extras=True)["source"]
        values = {**values, "data": {**others, "source": decode(hint, source, "data")}}
    return decode(TrainConfig, _with_moments(values))


def _resumed(values: Mapping[str, Any]) -> object:
    """What `resume` names; of `auto`, the checkpoint that there is already, or None."""
    out_dir = values.get("out_dir")
    if values.get("resume") != AUTO or not isinstance(out_dir, str) or not out_dir:
        return values.get("resume") if values.get("resume") != AUTO else None
    folder = newest_whole(Path(out_dir).expanduser(), check=looks_whole)
    return None if folder is None else str(folder)


def _with_moments(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """`optim.moments=auto` as the recipe of the precision has it."""
    optim, precision = values.get("optim"), values.get("precision")
    if not isinstance(optim, Mapping) or "moments" not in optim:
        return values
    # Here, where `auto` still is one of the choices that an error names.
    if decode(_MOMENTS, optim["moments"], "optim.moments") != "auto":  # type: ignore[arg-type]
        return values
    is_fp8 = isinstance(precision, Mapping) and precision.get("kind") == "fp8"
    return {**values, "optim": {**optim, "moments": "bf16" if is_fp8 else "float32"}}


def write_config(config: TrainConfig) -> dict[str, Any]:
    """The plain values that `read_config` reads."""
    values: dict[str, Any] = encode(config)
    data = values["data"]
    values["data"] = {**data.pop("source"), **data}
    return values


def check(config: TrainConfig) -> None:
    """Refuses a configuration that no run can follow, before any process starts.

    Raises:
        ConfigError: a rule of this module.
        CutError: fewer layers than pipeline stages.
        ScheduleError: ranks or micro-batches that the schedule cannot take.
        DataError: text that is missing or empty, and what else `data` refuses of its settings.
        CheckpointError: `resume` names no checkpoint, one that is not whole, or one of another model.
        CheckpointError, HfError: `init_from` names no weights, or those of another model.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        raise ConfigError(f"name: must be letters, digits, '.', '_' and '-', as it names a folder, is {config.name!r}")
    _check_rules(config)
    check_memory(config, _check_rules)
    _check_data(config)
    if not _check_resume(config):
        _check_start(config)


def _check_rules(config: TrainConfig) -> None:
    """Applies the rules that read nothing but the configuration itself."""
    _check_batch(config)
    _check_schedule(config)
    check_ramp(config)
    _check_ranks(config)
    check_model(config.model)
    check_experts(config.model, config.parallelism.expert)
    check_exchange(config)
    check_optim(config)
    check_profile(config)


def _check_resume(config: TrainConfig) -> bool:
    """Whether the run goes on by itself from what is there, so that it does not start from anything else."""
    if config.resume == AUTO:
        if not config.out_dir:
            raise ConfigError(
                "resume: auto looks for checkpoints in out_dir, which is empty; nearest valid: out_dir=outputs/"
                f"{config.name}, or resume=null"
            )
        folder = newest_whole(Path(config.out_dir).expanduser(), check=looks_whole)
        if folder is not None:
            # A run that was done but for its end has no step left, and need not be refused.
            steps = max(config.task.steps, read_step(folder) + 1)
            check_manifest(folder, replace(config, task=replace(config.task, steps=steps)))
        return folder is not None
    if config.resume is not None:
        # Files and their sizes alone: what they hold, all ranks read together.
        check_manifest(find_resumed(config.resume, partial(verify, hashes=False)).folder, config)
    return False


def _check_start(config: TrainConfig) -> None:
    if config.init_from is None:
        return
    if config.resume not in (None, AUTO):
        raise ConfigError(
            f"init_from: must be null beside resume={config.resume}, which brings its own weights, "
            f"is {config.init_from!r}; nearest valid: init_from=null"
        )
    if not is_hf_folder(config.init_from):
        # The list of a checkpoint's tensors needs torch, which takes settings from the environment when imported.
        apply_rank_environment(config.cluster)
    check_initial(config)


def _check_ranks(config: TrainConfig) -> None:
    cluster, parallelism, world = config.cluster, config.parallelism, config.parallelism.world_size
    if parallelism.data % parallelism.expert:
        raise ConfigError(
            f"parallelism.expert: must divide parallelism.data={parallelism.data}, is {parallelism.expert}; "
            f"nearest valid: {divisors(parallelism.data, parallelism.expert)}"
        )
    if world > cluster.ranks_per_node and world % cluster.ranks_per_node:
        raise ConfigError(
            f"cluster.ranks_per_node: must divide the {world} ranks (parallelism.pipeline x parallelism.data), "
            f"is {cluster.ranks_per_node}; nearest valid: {divisors(world, cluster.ranks_per_node)}"
        )
    if config.attention in ("flash_attention", "flex") and cluster.device != "cuda":
        raise ConfigError(
            f"attention: {config.attention} needs cluster.device=cuda, is {config.attention} with "
            f"cluster.device={cluster.device}; nearest valid: auto or sdpa"
        )
    if config.attention == "flash_attention" and config.precision.kind not in ("bf16", "fp8"):
        raise ConfigError(
            f"attention: flash_attention needs precision=bf16 or fp8, is flash_attention with "
            f"precision={config.precision.kind}; nearest valid: auto or sdpa"
        )
    if len(set(config.recompute)) < len(config.recompute):
        raise ConfigError(
            f"recompute: must name each at most once, is [{','.join(config.recompute)}]; "
            f"nearest valid: [{','.join(dict.fromkeys(config.recompute))}]"
        )
    if config.precision.kind == "fp8" and set(config.recompute) != set(RECOMPUTED):
        raise ConfigError(
            f"recompute: precision=fp8 keeps the inputs of linear maps and computes all else anew, "
            f"is [{','.join(config.recompute)}]; nearest valid: [{','.join(RECOMPUTED)}]"
        )
    if cluster.backend == "nccl" and cluster.device != "cuda":
        raise ConfigError(
            f"cluster.backend: nccl needs cluster.device=cuda, is nccl with cluster.device={cluster.device}; "
            f"nearest valid: gloo"
        )


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
    if batch.sequence_length_tokens <= model.mtp_depth:
        raise ConfigError(
            f"batch.sequence_length_tokens: must be above model.mtp_depth={model.mtp_depth}, "
            f"is {batch.sequence_length_tokens}; nearest valid: {model.mtp_depth + 1}"
        )
    if validation.sequences % batch.global_sequences:
        raise ConfigError(
            f"validation.sequences: must be 0 or a multiple of "
            f"batch.global_sequences={batch.global_sequences}, as a pass runs that many, "
            f"is {validation.sequences}; "
            f"nearest valid: {multiples(validation.sequences, batch.global_sequences)}"
        )


def _check_schedule(config: TrainConfig) -> None:
    """Refuses a schedule that the run cannot follow; where any will do, a run that can follow none."""
    candidates = tuple(kind for kind, spec in SCHEDULES.items() if spec.may_be_chosen)
    kinds = candidates if config.schedule.kind == "auto" else (config.schedule.kind,)
    problems: list[ValueError] = []
    for kind in kinds:
        try:
            _check_kind(config, kind)
        except (ScheduleError, CutError, ConfigError) as problem:
            problems.append(problem)
    if len(problems) == len(kinds):
        raise problems[0]


def _check_kind(config: TrainConfig, kind: str) -> None:
    pipeline, depth = config.parallelism.pipeline, config.model.mtp_depth
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
        unit = f"; a micro-batch of all is parallelism.data x batch.micro_sequences = {share} sequences"
        raise ScheduleError(f"{error}{unit if str(error).startswith(key) else ''}") from error
    spec = SCHEDULES.get(kind)
    stages = spec.num_stages(pipeline)
    cut_layers(config.model.num_layers, stages, depth, stages_per_rank=spec.stages_per_rank(pipeline))
    if depth and not spec.joins_ends(pipeline):
        raise ConfigError(
            f"model.mtp_depth: must be 0 under schedule={kind} with parallelism.pipeline={pipeline}, "
            f"as embedding and head sit on different ranks, is {depth}; "
            f"nearest valid: model.mtp_depth=0, or schedule=dualpipe_split"
        )
    if config.memory_cap is not None:
        costs = nominal_costs(config, stages)
        build(
            kind, pipeline, config.num_micro_batches, costs, config.memory_cap, schedules_folder(config.data.cache_dir)
        )


def _check_data(config: TrainConfig) -> None:
    tokens, model = check_config(config.data), config.model.vocab_size
    if tokens <= model:
        return
    if config.data.tokenizer is None:
        raise ConfigError(
            f"data.tokenizer_vocab_size: must be at most model.vocab_size={model}, is {tokens}; nearest valid: {model}"
        )
    raise ConfigError(
        f"data.tokenizer: must have at most model.vocab_size={model} tokens, {config.data.tokenizer} has {tokens}; "
        f"nearest valid: model.vocab_size={tokens}, or data.tokenizer=null, which trains one"
    )
