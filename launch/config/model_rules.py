"""Rules for a run's model, attention kernel and optimizer. Imports no torch."""

from importlib.util import find_spec

from comm.config import ParallelismConfig
from kernels.attention import ATTENTION, AUTO, AttentionKernel
from model.config import ModelConfig, YarnRope
from train.config import TrainConfig
from train.config.errors import ConfigError, divisors, multiples
from train.optim.learning_rate import RateError, check_schedule

# 1 - 2^-6. bf16 rounds by at most 2^-8 of a number. With this beta, a value that differs from the moment by a quarter
# still changes the moment.
_MOST_BETA_OF_BF16 = 0.984375
_DTYPES = {"float64": "float64", "float32": "float32", "bf16": "bfloat16", "fp8": "bfloat16"}
"""Type of activations for each precision."""


def check_model(model: ModelConfig) -> None:
    """Rejects inconsistent sizes of a model."""
    if model.qk_rope_head_dim % 2:
        raise ConfigError(
            f"model.qk_rope_head_dim: must be even, because values rotate in pairs, is {model.qk_rope_head_dim}; "
            f"nearest valid: {multiples(model.qk_rope_head_dim, 2)}"
        )
    if model.num_dense_layers > model.num_layers:
        raise ConfigError(
            f"model.num_dense_layers: must be at most model.num_layers={model.num_layers}, "
            f"is {model.num_dense_layers}; nearest valid: {model.num_layers}"
        )
    rope = model.rope_scaling
    if isinstance(rope, YarnRope) and (rope.factor < 1 or rope.beta_fast < rope.beta_slow):
        raise ConfigError(
            f"model.rope_scaling: must have factor of at least 1 and beta_fast of at least beta_slow, "
            f"is factor={rope.factor}, beta_fast={rope.beta_fast}, beta_slow={rope.beta_slow}"
        )


def check_experts(model: ModelConfig, expert: int) -> None:
    """Rejects a number of experts that does not fit the expert groups, the gate or the expert ranks."""
    experts, top_k = model.num_routed_experts, model.num_experts_per_token
    groups, limit = model.num_expert_groups, model.num_limited_groups
    if experts % expert:
        raise ConfigError(
            f"model.num_routed_experts: must be divisible by parallelism.expert={expert}, is {experts}; nearest valid: "
            f"{multiples(experts, expert)}, or parallelism.expert={divisors(experts, expert)}"
        )
    if experts % groups:
        raise ConfigError(
            f"model.num_expert_groups: must divide model.num_routed_experts={experts}, is {groups}; "
            f"nearest valid: {divisors(experts, groups)}"
        )
    if limit > groups:
        raise ConfigError(
            f"model.num_limited_groups: must be at most model.num_expert_groups={groups}, is {limit}; "
            f"nearest valid: {groups}"
        )
    within = limit * (experts // groups)
    if top_k > within:
        raise ConfigError(
            f"model.num_experts_per_token: must be at most {within}, the experts in {limit} of {groups} groups "
            f"(model.num_limited_groups, model.num_expert_groups), is {top_k}; nearest valid: {within}"
        )


def check_expert_ranks(mesh: ParallelismConfig) -> None:
    """Rejects a number of expert ranks that does not divide the ranks of a stage."""
    if mesh.stage_ranks % mesh.expert:
        divided = f"parallelism.data={mesh.data}"
        if mesh.context > 1:
            divided = f"parallelism.data x parallelism.context = {mesh.stage_ranks}"
        raise ConfigError(
            f"parallelism.expert: must divide {divided}, is {mesh.expert}; "
            f"nearest valid: {divisors(mesh.stage_ranks, mesh.expert)}"
        )


def check_optim(config: TrainConfig) -> None:
    """Rejects a learning rate schedule, a sharding or moments that do not fit the run."""
    optim, precision = config.optim, config.precision.kind
    try:
        check_schedule(optim, config.batch_sizes, config.task.steps)
    except RateError as error:
        raise ConfigError(str(error)) from error
    needed = {"float64": "replicated", "bf16": "zero1", "fp8": "zero1"}.get(precision, optim.sharding)
    if optim.sharding != needed:
        raise ConfigError(
            f"optim.sharding: precision={precision} needs {needed}, is {optim.sharding}; nearest valid: {needed}"
        )
    if optim.sharding == "zero1" and find_spec("deepspeed") is None:
        nearest = "optim.sharding=replicated, or " if precision == "float32" else ""
        raise ConfigError(
            "optim.sharding: zero1 needs the package deepspeed, which is not installed; nearest valid: "
            f"{nearest}pip install ."
        )
    if optim.moments == "bf16":
        _check_bf16_moments(config)


def _check_bf16_moments(config: TrainConfig) -> None:
    if config.precision.kind == "float64":
        raise ConfigError("optim.moments: precision=float64 needs float32, is bf16; nearest valid: float32")
    for name, beta in (("beta1", config.optim.beta1), ("beta2", config.optim.beta2)):
        if beta > _MOST_BETA_OF_BF16:
            raise ConfigError(
                f"optim.{name}: must be at most {_MOST_BETA_OF_BF16} with optim.moments=bf16, because smaller changes "
                f"are lost in rounding, is {beta}; nearest valid: {_MOST_BETA_OF_BF16}, or optim.moments=float32"
            )


def check_attention(config: TrainConfig) -> None:
    """Rejects an attention kernel that does not support the device or the precision."""
    name, device, precision = config.attention, config.cluster.device, config.precision.kind
    if name == AUTO:
        return
    kernel = ATTENTION.get(name)
    suiting = [AUTO, *(other for other, each in ATTENTION.items() if _suits(each, device, precision))]
    if device not in kernel.devices:
        raise ConfigError(
            f"attention: {name} needs cluster.device={' or '.join(kernel.devices)}, is {name} with "
            f"cluster.device={device}; nearest valid: {' or '.join(suiting)}"
        )
    if not _takes(kernel, precision):
        valid = [kind for kind in _DTYPES if _takes(kernel, kind)]
        raise ConfigError(
            f"attention: {name} needs precision={' or '.join(valid)}, is {name} with precision={precision}; "
            f"nearest valid: {' or '.join(suiting)}"
        )
    if config.parallelism.context > 1 and not kernel.has_blocks:
        valid = [each for each in suiting if each == AUTO or ATTENTION.get(each).has_blocks]
        raise ConfigError(
            f"attention: must return logarithms of sums of exponentials with parallelism.context above 1, by which "
            f"blocks of keys are merged, is {name}; nearest valid: {' or '.join(valid)}"
        )


def _suits(kernel: AttentionKernel, device: str, precision: str) -> bool:
    return device in kernel.devices and _takes(kernel, precision) and kernel.package is None


def _takes(kernel: AttentionKernel, precision: str) -> bool:
    return not kernel.dtypes or _DTYPES[precision] in kernel.dtypes
