"""Rules for and between the keys of a run's configuration. Imports no torch, reads no files."""

import re
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from math import gcd

from base.refusal import ConfigError, broken, divisors, multiples
from comm.config import DispatchConfig, ParallelismConfig
from comm.dispatch.registry import DISPATCHERS, DispatchRequirementError, DispatchSite
from data.chat.templates import CHAT_TEMPLATES
from data.config import ramp_sizes
from data.registry import DATA_SOURCES
from dualpipe.builder import build_schedule, schedules_folder
from dualpipe.ir import ScheduleError
from dualpipe.registry import candidates, check_size, check_slices
from kernels.attention import ATTENTION, AUTO, DETERMINISTIC, AttentionKernel
from model.config import ATTENTION_FORMS, RECOMPUTED, CutError, GqaConfig, ModelConfig, YarnRope, all_recomputed
from score.scorers import JUDGE, JudgeConfig
from train.config import TrainConfig
from train.config.tasks import TASKS
from train.optim.learning_rate import RateError, check_schedule
from train.predict.cut import run_cut, run_placement, sized_run, with_cut
from train.predict.fit import fitted_cut
from train.predict.timing import communication_share, nominal_costs

_BATCH = "batch.global_sequences"
_LENGTH = "batch.sequence_length_tokens"
_RAMP = "batch.ramp"
_SLICES = "schedule.slices"


def check_name(config: TrainConfig) -> None:
    """Rejects a name that is not valid as a folder name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", config.name):
        rule = "must contain only letters, digits, '.', '_' and '-', because it names a folder"
        valid = re.sub(r"[^A-Za-z0-9._-]+", "-", config.name).lstrip("._-") or "run"
        raise broken("name", rule, repr(config.name), valid)


def check_all(config: TrainConfig, *rules: Callable[[TrainConfig], None]) -> None:
    """Checks independent rules, and reports all that are broken in one message."""
    errors: list[ValueError] = []
    for rule in rules:
        try:
            rule(config)
        except (ConfigError, CutError, ScheduleError) as error:
            errors.append(error)
    if len(errors) > 1:
        raise ConfigError(". Also ".join(map(str, errors))) from errors[0]
    if errors:
        raise errors[0]


def check_rules(config: TrainConfig) -> None:
    """Rejects an invalid configuration by its values, with all broken rules in one message."""
    check_all(config, _check_sizes, _check_profile, check_rollouts, TASKS.get(config.task.kind).check)


def _check_sizes(config: TrainConfig) -> None:
    """Rejects sizes of model, batch and layout; the first error, as the rules build upon each other."""
    for rule in _SIZE_RULES:
        rule(config)


def _check_batch(config: TrainConfig) -> None:
    batch = config.batch
    model = config.model
    sequences = config.validation.sequences
    length = batch.sequence_length_tokens
    context = config.parallelism.context
    share = _micro_batch_sequences(config)
    if batch.global_sequences % share:
        rule = f"must be divisible by parallelism.data x batch.micro_sequences = {share}"
        raise broken(_BATCH, rule, batch.global_sequences, multiples(batch.global_sequences, share))
    if length > model.max_position_tokens:
        rule = f"must be at most model.max_position_tokens={model.max_position_tokens}"
        raise broken(_LENGTH, rule, length, model.max_position_tokens)
    if context > 1 and length % (2 * context):
        rule = (
            f"must be divisible by 2 x parallelism.context = {2 * context}, because each of the ranks that share a "
            "sequence holds two equal parts of it"
        )
        raise broken(_LENGTH, rule, length, multiples(length, 2 * context))
    tensor = config.parallelism.tensor
    if (unit := gcd(model.num_heads, length // context)) % tensor:
        rule = f"must divide the model's {model.num_heads} heads and the {length // context} tokens of a context rank"
        raise broken("parallelism.tensor", rule, tensor, divisors(unit, tensor))
    if length <= model.mtp_depth:
        raise broken(_LENGTH, f"must be above model.mtp_depth={model.mtp_depth}", length, model.mtp_depth + 1)
    if sequences % batch.global_sequences:
        rule = f"must be 0 or a multiple of {_BATCH}={batch.global_sequences}, because validation runs whole batches"
        raise broken("validation.sequences", rule, sequences, multiples(sequences, batch.global_sequences))
    target, is_measured = config.validation.target_loss, sequences and config.validation.every_steps
    if target is not None and (not is_measured or config.rollout is not None):
        rule = "must be null if no loss of held-out sequences is measured before the last step"
        raise broken("validation.target_loss", rule, target, "null")


def _micro_batch_sequences(config: TrainConfig) -> int:
    """Returns the sequences of one micro-batch over all data ranks."""
    return config.parallelism.data * config.batch.micro_sequences


def _check_task(config: TrainConfig) -> None:
    kind = config.task.kind
    model = config.model
    context = config.parallelism.context
    spec = TASKS.get(kind)
    if model.head != spec.head:
        raise broken("model.head", f"must be {spec.head} with task={kind}", model.head, spec.head)
    if context > 1 and not spec.splits_sequences:
        rule = f"must be 1 with task={kind}, because its loss reads whole sequences on one rank"
        raise broken("parallelism.context", rule, context, f"1, or {_splitting_tasks()}")
    if model.head == "score" and model.mtp_depth:
        rule = "must be 0 with model.head=score, as MTP modules predict tokens"
        raise broken("model.mtp_depth", rule, model.mtp_depth, 0)


def _check_schedule(config: TrainConfig) -> None:
    """Rejects a schedule that does not fit the run. With `auto`, rejects a run that no schedule fits."""
    offload = config.costs.offload
    if offload is not None and config.memory_cap is None:
        rule = "must be null without memory_cap, because activations are offloaded only to keep a cap"
        raise broken("costs.offload", rule, f"{offload:g}", f"null, or memory_cap={config.parallelism.pipeline}")
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
    slices = config.schedule.slices
    length = config.batch.sequence_length_tokens
    context = config.parallelism.context
    check_slices(config.schedule.kind, config.num_micro_batches, slices)
    if slices == 1 and config.schedule.slice_by != "work":
        raise broken("schedule.slice_by", "must be work with schedule.slices=1", config.schedule.slice_by, "work")
    if slices == 1:
        return
    if not TASKS.get(config.task.kind).splits_sequences:
        rule = f"must be 1 with task={config.task.kind}, because its loss reads whole sequences"
        raise broken(_SLICES, rule, slices, f"1, or {_splitting_tasks()}")
    segments = 2 * context if context > 1 else 1
    if slices * segments > length:
        unit = f" / {segments}, the segments of a slice on {context} ranks" if context > 1 else ""
        raise broken(_SLICES, f"must be at most {_LENGTH}={length}{unit}", slices, length // segments)


def _splitting_tasks() -> str:
    names = ", ".join(name for name, spec in TASKS.items() if spec.splits_sequences)
    return f"a task whose loss is of single tokens: {names}"


def _check_kind(config: TrainConfig, kind: str) -> None:
    pipeline = config.parallelism.pipeline
    count = config.num_micro_batches
    try:
        check_size(kind, pipeline, count, ranks_key="parallelism.pipeline", micro_batches_key=_BATCH)
    except ScheduleError as error:
        share = _micro_batch_sequences(config)
        unit = f"; one micro-batch over all data ranks is parallelism.data x batch.micro_sequences = {share} sequences"
        raise ScheduleError(f"{error}{unit if str(error).startswith(_BATCH) else ''}") from error
    run_cut(config, run_placement(config, kind))
    if config.memory_cap is not None:
        costs = nominal_costs(with_cut(config, fitted_cut(config, kind)), kind)
        build_schedule(kind, pipeline, count, costs, config.memory_cap, schedules_folder(config.data.cache_dir))


def _check_ramp(config: TrainConfig) -> None:
    ramp = config.batch.ramp
    last = config.batch.global_sequences
    if ramp is None:
        return
    if not 2 <= ramp.num_sizes <= last:
        rule = f"must be at least 2 and at most {_BATCH}={last}, which is the last size"
        near = f"{2 if ramp.num_sizes < 2 else last}, or {_RAMP}=null"
        raise broken(f"{_RAMP}.num_sizes", rule, ramp.num_sizes, near)
    if ramp.start_sequences >= last:
        near = f"{last - 1}, or {_RAMP}=null"
        raise broken(f"{_RAMP}.start_sequences", f"must be below {_BATCH}={last}", ramp.start_sequences, near)
    share = _micro_batch_sequences(config)
    for size in ramp_sizes(last, ramp):
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
    cluster = config.cluster
    parallelism = config.parallelism
    world = config.parallelism.world_size
    check_expert_ranks(parallelism)
    if world > cluster.ranks_per_node and world % cluster.ranks_per_node:
        rule = f"must divide the {world} ranks (parallelism.{parallelism.axes('=')})"
        near = divisors(world, cluster.ranks_per_node)
        raise broken("cluster.ranks_per_node", rule, cluster.ranks_per_node, near)
    check_attention(config)
    if cluster.communication_sms is not None and cluster.num_sms is not None:
        communication_share("cluster", cluster.communication_sms, cluster.num_sms)
    parts = config.recompute
    if len(set(parts)) < len(parts):
        raise broken("recompute", "must name each at most once", _listed(parts), _listed(dict.fromkeys(parts)))
    if config.precision.kind == "fp8" and not all_recomputed(parts).issuperset(RECOMPUTED):
        rule = "must name all parts with precision=fp8, which stores only the inputs of linear layers"
        raise broken("recompute", rule, _listed(parts), _listed(RECOMPUTED))
    if config.precision.kind == "fp8" and not cluster.has_fp8:
        raise broken("precision", "fp8 needs cluster.has_fp8, which this device has not", "fp8", "bf16")
    if config.plan.products is not None and not (cluster.has_mx and config.precision.kind == "bf16"):
        rule = f"needs cluster.has_mx=true and precision=bf16, has {cluster.has_mx} and {config.precision.kind}".lower()
        raise broken("plan.products", rule, config.plan.products, "null, or cluster=b200 precision=bf16")
    if cluster.backend == "nccl" and cluster.device != "cuda":
        value = f"nccl with cluster.device={cluster.device}"
        raise broken("cluster.backend", "nccl needs cluster.device=cuda", value, "gloo")


def _check_profile(config: TrainConfig) -> None:
    steps = config.task.steps
    last_rank = config.parallelism.world_size - 1
    profile = config.profile
    for key, least, most, chosen in (
        ("profile.steps", 1, steps, profile.steps),
        ("profile.ranks", 0, last_rank, profile.ranks),
    ):
        for number in chosen:
            if not least <= number <= most:
                near = min(max(number, least), most)
                raise ConfigError(f"{key}: each must be from {least} to {most}, one is {number}; nearest valid: {near}")
        if len(set(chosen)) < len(chosen):
            raise broken(key, "must name each at most once", _listed(chosen), _listed(dict.fromkeys(chosen)))


def check_exchange(dispatch: DispatchConfig, site: DispatchSite) -> None:
    """Rejects a dispatcher that the ranks or the router cannot use."""
    try:
        DISPATCHERS.get(dispatch.kind).check(dispatch, site)
    except DispatchRequirementError as error:
        raise ConfigError(str(error)) from error


def _listed(values: Iterable[object]) -> str:
    return f"[{','.join(map(str, values))}]"


def check_rollouts(config: TrainConfig) -> None:
    """Rejects rollouts that a task does not use or lacks, and sizes that do not fit."""
    kind = config.task.kind
    rollouts = config.rollout
    if TASKS.get(kind).has_rollouts:
        if rollouts is None:
            raise broken("rollout", f"must have values with task={kind}", "null", "rollout=default")
        check_all(config, _check_reward, _check_source, _check_rollout_sizes, _check_rollout_batch)
        return
    if config.plan.answer_tokens is not None:
        rule = f"must be null with task={kind}, which samples no answers to plan"
        raise broken("plan.answer_tokens", rule, "given", "plan.answer_tokens=null")
    for key, value in (("rollout", rollouts), ("reward", config.reward)):
        if value is not None:
            users = ", ".join(f"task={name}" for name, spec in TASKS.items() if spec.has_rollouts)
            raise ConfigError(
                f"{key}: must be null with task={kind}, which learns from no rewards, has values; nearest valid: "
                f"{key}=none, or {users}"
            )


def _check_reward(config: TrainConfig) -> None:
    if config.reward is None:
        raise broken("reward", f"must have values with task={config.task.kind}", "null", "reward=exact")
    for part in config.reward.parts:
        if isinstance(part, JudgeConfig):
            _check_judge(config, part)


def _check_rollout_batch(config: TrainConfig) -> None:
    kind = config.task.kind
    if config.batch.ramp is not None:
        raise ConfigError(
            f"batch.ramp: must be null with task={kind}, whose batches are as many as the answers need, has values; "
            f"nearest valid: batch.ramp=null"
        )
    if not config.batch.document_mask:
        packed = "answers that are packed into one sequence must not attend to each other"
        raise broken("batch.document_mask", f"must be true for task.kind={kind}, because {packed}", "false", "true")


def _check_source(config: TrainConfig) -> None:
    kind = config.data.source.kind
    if DATA_SOURCES.get(kind).problems is None:
        valid = " or ".join(f"data={name}" for name, entry in DATA_SOURCES.items() if entry.problems is not None)
        rule = f"must be a source with problems for task.kind={config.task.kind}"
        raise broken("data.kind", rule, kind, valid)


def _check_judge(config: TrainConfig, judge: JudgeConfig) -> None:
    most = config.model.max_position_tokens
    if judge.weights == "reference" and not TASKS.get(config.task.kind).has_reference(config.task):
        rule = "weights must be policy if the run has no reference"
        raise broken(JUDGE, rule, "reference", "policy, or task.loss.kl_weight above 0")
    if judge.ckpt is None:
        judge.check_room(most, f"model.max_position_tokens={most}", ConfigError)
    name = config.data.source.chat_template
    if judge.thinking and name is not None and CHAT_TEMPLATES.get(name).thoughts is None:
        rule = f"thinking must be false with data.template={name}, which has no thoughts"
        raise broken(JUDGE, rule, "true", "false")


def _check_rollout_sizes(config: TrainConfig) -> None:
    rollout = config.rollout
    length = config.batch.sequence_length_tokens
    assert rollout is not None
    if rollout.samples < 2:
        rule = "must be at least 2, because an answer is compared with the others to its prompt"
        raise broken("rollout.samples", rule, rollout.samples, 2)
    limit = rollout.max_new_tokens
    if limit >= length:
        rule = f"must be below batch.sequence_length_tokens={length}, which also holds the prompt"
        raise broken("rollout.max_new_tokens", rule, limit, length - 1)
    if rollout.prompts % rollout.updates:
        rule = f"must divide rollout.prompts={rollout.prompts}"
        near = divisors(rollout.prompts, rollout.updates)
        raise broken("rollout.updates", rule, rollout.updates, near)
    if rollout.length_penalty_tokens > limit:
        rule = f"must be at most rollout.max_new_tokens={limit}"
        raise broken("rollout.length_penalty_tokens", rule, rollout.length_penalty_tokens, limit)
    if rollout.engine == "local" and rollout.keep_routing:
        records = "records experts on other ranks than training expects"
        rule = f"must be false with rollout.engine=local, which {records}"
        raise broken("rollout.keep_routing", rule, "true", "false, or rollout.engine=pipelined")


# 1 - 2^-6. bf16 rounds by at most 2^-8 of a number. With this beta, a value that differs from the moment by a quarter
# still changes the moment.
_MOST_BETA_OF_BF16 = 0.984375
_DTYPES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
"""Type of activations for each precision."""


def check_model(model: ModelConfig) -> None:
    """Rejects inconsistent sizes of a model."""
    if model.rotated_dim % 2:
        near = multiples(model.rotated_dim, 2)
        rule = "must be even, because values rotate in pairs"
        raise broken(f"model.{model.ROTATED}", rule, model.rotated_dim, near)
    if isinstance(model, GqaConfig) and model.num_heads % model.num_kv_heads:
        near = divisors(model.num_heads, model.num_kv_heads)
        rule = f"must divide model.num_heads={model.num_heads}"
        raise broken("model.num_kv_heads", rule, model.num_kv_heads, near)
    if model.num_dense_layers > model.num_layers:
        rule = f"must be at most model.num_layers={model.num_layers}"
        raise broken("model.num_dense_layers", rule, model.num_dense_layers, model.num_layers)
    rope = model.rope_scaling
    if isinstance(rope, YarnRope) and (rope.factor < 1 or rope.beta_fast < rope.beta_slow):
        raise ConfigError(
            f"model.rope_scaling: must have factor of at least 1 and beta_fast of at least beta_slow, "
            f"is factor={rope.factor}, beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}"
        )


def _check_form(config: TrainConfig) -> None:
    """Rejects a form of attention that does not support the layout or the precision."""
    name = config.model.attention
    form = ATTENTION_FORMS.get(name)
    if config.precision.kind == "fp8" and not form.has_fp8:
        raise broken("precision", f"must not be fp8 with model.attention={name}", "fp8", "bf16")
    parts = {"parallelism.context": config.parallelism.context, _SLICES: config.schedule.slices}
    for key, number in parts.items():
        if number > 1 and not form.takes_parts:
            rule = f"must be 1 with model.attention={name}, which needs whole sequences"
            raise broken(key, rule, number, 1)


def check_experts(model: ModelConfig, expert: int) -> None:
    """Rejects a number of experts that does not fit the expert groups, the gate or the expert ranks."""
    experts = model.num_routed_experts
    top_k = model.num_experts_per_token
    groups = model.num_expert_groups
    limit = model.num_limited_groups
    if experts % expert:
        near = f"{multiples(experts, expert)}, or parallelism.expert={divisors(experts, expert)}"
        rule = f"must be divisible by parallelism.expert={expert}"
        raise broken("model.num_routed_experts", rule, experts, near)
    if experts % groups:
        rule = f"must divide model.num_routed_experts={experts}"
        raise broken("model.num_expert_groups", rule, groups, divisors(experts, groups))
    if limit > groups:
        raise broken("model.num_limited_groups", f"must be at most model.num_expert_groups={groups}", limit, groups)
    size = experts // groups
    if (model.group_score_experts or 1) > size:
        rule = f"must be at most {size}, the experts of a group"
        raise broken("model.group_score_experts", rule, model.group_score_experts, size)
    most = limit * size
    if top_k > most:
        within = f"{limit} of {groups} groups (model.num_limited_groups, model.num_expert_groups)"
        raise broken("model.num_experts_per_token", f"must be at most {most}, the experts in {within}", top_k, most)


def check_expert_ranks(mesh: ParallelismConfig) -> None:
    """Rejects a number of expert ranks that does not divide the ranks of a stage."""
    if mesh.stage_ranks % mesh.expert:
        axes = ["data", *(name for name in ("context", "tensor") if getattr(mesh, name) > 1)]
        divided = f"parallelism.data={mesh.data}"
        if len(axes) > 1:
            divided = f"{' x '.join(f'parallelism.{name}' for name in axes)} = {mesh.stage_ranks}"
        near = divisors(mesh.stage_ranks, mesh.expert)
        raise broken("parallelism.expert", f"must divide {divided}", mesh.expert, near)


def check_optim(config: TrainConfig) -> None:
    """Rejects a learning rate schedule, a sharding or moments that do not fit the run."""
    optim = config.optim
    precision = config.precision.kind
    try:
        check_schedule(optim, config.batch_sizes, config.task.steps)
    except RateError as error:
        raise ConfigError(str(error)) from error
    needed = {"float64": "replicated", "bf16": "zero1", "fp8": "zero1"}.get(precision, optim.sharding)
    if optim.sharding != needed:
        raise broken("optim.sharding", f"precision={precision} needs {needed}", optim.sharding, needed)
    if optim.sharding == "zero1" and find_spec("deepspeed") is None:
        nearest = "optim.sharding=replicated, or " if precision == "float32" else ""
        raise ConfigError(
            "optim.sharding: zero1 needs the package deepspeed, which is not installed; nearest valid: "
            f"{nearest}pip install ."
        )
    if optim.offload and optim.sharding == "replicated":
        rule = "needs sharding=zero1, whose master weights are not those of the model"
        others = "false" if precision == "float64" else "optim.sharding=zero1, or optim.offload=false"
        raise broken("optim.offload", rule, str(optim.offload).lower(), others)
    if optim.moments == "float32":
        return
    if optim.offload == "torch":
        rule = "must be true or false with optim.moments=bf16, which neither torch's nor DeepSpeed's AdamW has"
        raise broken("optim.offload", rule, "torch", "true")
    if precision == "float64":
        raise broken("optim.moments", "precision=float64 needs float32", "bf16", "float32")
    for name, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            limit = f"must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16"
            rule = f"{limit}, because smaller changes are lost in rounding"
            raise broken(f"optim.{name}", rule, beta, f"{_MOST_BETA_OF_BF16}, or optim.moments=float32")


_HALF = ("bf16", "fp8")


def check_attention(config: TrainConfig) -> None:
    """Rejects an attention kernel that does not support the device or the precision."""
    name = config.attention
    device = config.cluster.device
    precision = config.precision.kind
    if name == DETERMINISTIC and device == "cuda" and (config.parallelism.context > 1 or precision not in _HALF):
        rule = f"{name} needs precision=bf16 or fp8 and parallelism.context=1 on a GPU"
        raise broken("attention", rule, f"precision={precision}, context={config.parallelism.context}", AUTO)
    if name in (AUTO, DETERMINISTIC):
        return
    kernel = ATTENTION.get(name)
    installed = [name for name, spec in ATTENTION.items() if spec.package is None and device in spec.devices]
    suiting = [AUTO, *(kernel_name for kernel_name in installed if _takes(ATTENTION.get(kernel_name), precision))]
    if device not in kernel.devices:
        rule = f"{name} needs cluster.device={' or '.join(kernel.devices)}"
        raise broken("attention", rule, f"{name} with cluster.device={device}", " or ".join(suiting))
    if not _takes(kernel, precision):
        rule = f"{name} needs precision={' or '.join(kind for kind in _DTYPES if _takes(kernel, kind))}"
        raise broken("attention", rule, f"{name} with precision={precision}", " or ".join(suiting))
    if config.parallelism.context > 1 and not kernel.has_blocks:
        valid = [kernel_name for kernel_name in suiting if kernel_name == AUTO or ATTENTION.get(kernel_name).has_blocks]
        rule = (
            "must return logarithms of sums of exponentials with parallelism.context above 1, by which blocks of keys "
            "are merged"
        )
        raise broken("attention", rule, name, " or ".join(valid))


def _takes(kernel: AttentionKernel, precision: str) -> bool:
    return not kernel.dtypes or _DTYPES[precision] in kernel.dtypes


_SIZE_RULES: tuple[Callable[[TrainConfig], None], ...] = (
    _check_batch,
    lambda config: check_model(config.model),
    _check_task,
    _check_form,
    _check_schedule,
    _check_ramp,
    _check_ranks,
    lambda config: check_experts(config.model, config.parallelism.expert),
    lambda config: check_exchange(config.dispatch, config.dispatch_site),
    check_optim,
)
"""Rules about sizes, each of which relies on those before it."""
