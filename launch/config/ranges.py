"""The range of each number in a run's configuration, as data, and the arithmetic of nearest valid values.

The shares and sizes of `data` and the `costs` are checked there, and values with a form of their own (spans, schedules
over tokens) as they are read.
"""

from collections.abc import Callable
from dataclasses import fields, is_dataclass

from train.config import TrainConfig
from train.config.errors import ConfigError

Number = int | float

_POSITIVE = (
    "cluster.ranks_per_node",
    "cluster.threads_per_rank",
    "cluster.timeout_seconds",
    "cluster.peak_flops",
    "cluster.memory_bytes",
    "cluster.grace_seconds",
    "parallelism.pipeline",
    "parallelism.data",
    "parallelism.expert",
    "dispatch.max_nodes",
    "dispatch.chunks",
    "model.vocab_size",
    "model.hidden_size",
    "model.num_layers",
    "model.dense_intermediate_size",
    "model.num_heads",
    "model.q_lora_rank",
    "model.kv_lora_rank",
    "model.qk_nope_head_dim",
    "model.qk_rope_head_dim",
    "model.v_head_dim",
    "model.num_routed_experts",
    "model.num_experts_per_token",
    "model.expert_intermediate_size",
    "model.num_expert_groups",
    "model.num_limited_groups",
    "model.routed_scaling_factor",
    "model.norm_eps",
    "model.rope_theta",
    "model.max_position_tokens",
    "model.initializer_range",
    "model.rope_scaling.factor",
    "model.rope_scaling.original_max_position_tokens",
    "model.rope_scaling.beta_fast",
    "model.rope_scaling.beta_slow",
    "task.steps",
    "batch.sequence_length_tokens",
    "batch.global_sequences",
    "batch.micro_sequences",
    "batch.ramp.start_sequences",
    "batch.ramp.end_tokens",
    "batch.ramp.num_sizes",
    "checkpointing.keep",
    "optim.learning_rate",
    "optim.eps",
    "optim.bucket_elements",
    "optim.clip_norm",
    "guard.spike_window_steps",
    "guard.max_consecutive",
    "track.log_every_steps",
)

_NOT_NEGATIVE = (
    "cluster.max_restarts",
    "cluster.memory_reserve_bytes",
    "track.picture_every_steps",
    "track.loads_every_steps",
    "seed",
    "data.seed",
    "model.num_dense_layers",
    "model.num_shared_experts",
    "model.mtp_depth",
    "model.rope_scaling.mscale",
    "model.rope_scaling.mscale_all_dim",
    "task.balance_loss_weight",
    "validation.every_steps",
    "validation.sequences",
    "checkpointing.every_steps",
    "samples.tokens",
    "samples.temperature",
    "optim.schedule.final_learning_rate",
    "optim.schedule.last_learning_rate",
    "optim.weight_decay",
)

_SHARES = ("optim.schedule.final_ratio",)

_BELOW_ONE = ("optim.beta1", "optim.beta2", "ema.decay")

_OFF_OR_ABOVE_ONE = ("guard.spike_factor",)

_RANGES: tuple[tuple[tuple[str, ...], str, Callable[[Number], bool]], ...] = (
    (_POSITIVE, "above 0", lambda value: value > 0),
    (_NOT_NEGATIVE, "0 or above", lambda value: value >= 0),
    (_OFF_OR_ABOVE_ONE, "0, which is off, or above 1", lambda value: value == 0 or value > 1),
    (_SHARES, "between 0 and 1", lambda value: 0 <= value <= 1),
    (_BELOW_ONE, "at least 0 and below 1", lambda value: 0 <= value < 1),
)


def ranged_keys() -> frozenset[str]:
    """Every dotted key that has a range."""
    return frozenset(key for keys, _, _ in _RANGES for key in keys)


def numbers(config: TrainConfig) -> dict[str, Number]:
    """Every number of a configuration by its dotted key."""
    return dict(_numbers(config, ""))


def check_ranges(config: TrainConfig) -> None:
    """Refuses a number outside its range.

    Raises:
        ConfigError: names the key, the range and the value.
    """
    values = numbers(config)
    for keys, rule, holds in _RANGES:
        for key in keys:
            if key in values and not holds(values[key]):
                least = "; the least is 1" if rule == "above 0" and isinstance(values[key], int) else ""
                raise ConfigError(f"{key}: must be {rule}, is {values[key]}{least}")


def multiples(value: int, of: int) -> str:
    """The multiples of `of` around `value`, from 1 x `of` up: `4 or 8`."""
    below, above = value // of * of, -(-value // of) * of
    return _either(sorted({max(below, of), max(above, of)}))


def divisors(of: int, value: int) -> str:
    """The divisors of `of` around `value`: `2 or 4`."""
    valid = [number for number in range(1, of + 1) if of % number == 0]
    below = [number for number in valid if number <= value][-1:]
    above = [number for number in valid if number >= value][:1]
    return _either(sorted({*below, *above}))


def _either(choices: list[int]) -> str:
    return " or ".join(str(choice) for choice in choices)


def _numbers(value: object, place: str) -> list[tuple[str, Number]]:
    if hasattr(value, "to_plain"):
        return []  # checked as it is read
    if is_dataclass(value):
        found: list[tuple[str, Number]] = []
        for field in fields(value):
            found += _numbers(getattr(value, field.name), f"{place}.{field.name}" if place else field.name)
        return found
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return [(place, value)]
    return []
