"""Rules for a run's model, attention kernel and optimizer. Imports no torch."""

from importlib.util import find_spec

from comm.config import ParallelismConfig
from kernels.attention import ATTENTION, AUTO, AttentionKernel
from model.config import ModelConfig, YarnRope
from train.config import TrainConfig
from train.config.errors import ConfigError, broken, divisors, multiples
from train.optim.learning_rate import RateError, check_schedule

# 1 - 2^-6. bf16 rounds by at most 2^-8 of a number. With this beta, a value that differs from the moment by a quarter
# still changes the moment.
_MOST_BETA_OF_BF16 = 0.984375
_DTYPES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
"""Type of activations for each precision."""


def check_model(model: ModelConfig) -> None:
    """Rejects inconsistent sizes of a model."""
    if model.qk_rope_head_dim % 2:
        near = multiples(model.qk_rope_head_dim, 2)
        rule = "must be even, because values rotate in pairs"
        raise broken("model.qk_rope_head_dim", rule, model.qk_rope_head_dim, near)
    if model.num_dense_layers > model.num_layers:
        rule = f"must be at most model.num_layers={model.num_layers}"
        raise broken("model.num_dense_layers", rule, model.num_dense_layers, model.num_layers)
    rope = model.rope_scaling
    if isinstance(rope, YarnRope) and (rope.factor < 1 or rope.beta_fast < rope.beta_slow):
        raise ConfigError(
            f"model.rope_scaling: must have factor of at least 1 and beta_fast of at least beta_slow, "
            f"is factor={rope.factor}, beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}"
        )


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
    most = limit * (experts // groups)
    if top_k > most:
        within = f"{limit} of {groups} groups (model.num_limited_groups, model.num_expert_groups)"
        raise broken("model.num_experts_per_token", f"must be at most {most}, the experts in {within}", top_k, most)


def check_expert_ranks(mesh: ParallelismConfig) -> None:
    """Rejects a number of expert ranks that does not divide the ranks of a stage."""
    if mesh.stage_ranks % mesh.expert:
        divided = f"parallelism.data={mesh.data}"
        if mesh.context > 1:
            divided = f"parallelism.data x parallelism.context = {mesh.stage_ranks}"
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
    if optim.moments == "float32":
        return
    if precision == "float64":
        raise broken("optim.moments", "precision=float64 needs float32", "bf16", "float32")
    for name, beta in (("beta1", optim.beta1), ("beta2", optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            limit = f"must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16"
            rule = f"{limit}, because smaller changes are lost in rounding"
            raise broken(f"optim.{name}", rule, beta, f"{_MOST_BETA_OF_BF16}, or optim.moments=float32")


def check_attention(config: TrainConfig) -> None:
    """Rejects an attention kernel that does not support the device or the precision."""
    name = config.attention
    device = config.cluster.device
    precision = config.precision.kind
    if name == AUTO:
        return
    kernel = ATTENTION.get(name)
    installed = [name for name, spec in ATTENTION.items() if spec.package is None and device in spec.devices]
    suiting = [AUTO, *(other for other in installed if _takes(ATTENTION.get(other), precision))]
    if device not in kernel.devices:
        rule = f"{name} needs cluster.device={' or '.join(kernel.devices)}"
        raise broken("attention", rule, f"{name} with cluster.device={device}", " or ".join(suiting))
    if not _takes(kernel, precision):
        rule = f"{name} needs precision={' or '.join(kind for kind in _DTYPES if _takes(kernel, kind))}"
        raise broken("attention", rule, f"{name} with precision={precision}", " or ".join(suiting))
    if config.parallelism.context > 1 and not kernel.has_blocks:
        valid = [other for other in suiting if other == AUTO or ATTENTION.get(other).has_blocks]
        rule = (
            "must return logarithms of sums of exponentials with parallelism.context above 1, by which blocks of keys "
            "are merged"
        )
        raise broken("attention", rule, name, " or ".join(valid))


def _takes(kernel: AttentionKernel, precision: str) -> bool:
    return not kernel.dtypes or _DTYPES[precision] in kernel.dtypes
