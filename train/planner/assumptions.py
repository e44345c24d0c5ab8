"""Lists what a plan rests on, each value with its unit and source. No torch here."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from train.config import TrainConfig
from train.config.decode import encode
from train.planner.config import EfficiencyConfig, KernelRates, Rates
from train.planner.rows import rows_per_token
from train.planner.timing import part_seconds

_UNITS = {
    "seconds": "s",
    "tokens": "tokens",
    "flops": "FLOP/s",
    "flops_per_second": "FLOP/s",
    "bytes_per_second": "bytes/s",
    "bytes": "bytes",
    "sms": "SMs",
    "hour": "$ per GPU-hour",
    "hours": "h",
    "gpu": "W",
}
_TIMED = ("attention", "experts", "exchange", "recomputed", "dense", "moe", "embedding", "head", "mtp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Assumption:
    """One value that a plan uses."""

    name: str
    value: float
    unit: str
    source: str


def assumptions(config: TrainConfig, rates: Rates, efficiency: EfficiencyConfig) -> tuple[Assumption, ...]:
    """Returns what a plan rests on: times of layers, rates, devices, links, and the declared factor."""
    return (
        *_layers(config, rates),
        *_rates(rates),
        *_cluster(config),
        Assumption(
            name="rows_across_nodes",
            value=rows_per_token(config).across_nodes,
            unit="rows per token and dispatch",
            source="random scores, experts equally loaded",
        ),
        Assumption(
            name="efficiency.unexplained",
            value=efficiency.unexplained,
            unit="factor on a step",
            source="declared: what no rate explains",
        ),
    )


def _layers(config: TrainConfig, rates: Rates) -> Iterator[Assumption]:
    """Yields the times of the run's layers, scaled from the rates."""
    times = part_seconds(rates, config)
    unit = f"s per layer and {config.batch.micro_sequences * config.mean_part_tokens:,.0f} tokens"
    for name in ("dense", "moe", "head", "mtp"):
        for phase, seconds in encode(getattr(times, name)).items():
            if seconds:
                kernels = {"head": "head_flops_per_second"}.get(name, "attention")
                source = source_of(rates, kernels if isinstance(rates, KernelRates) else name)
                yield Assumption(name=f"{name}.{phase}", value=seconds, unit=unit, source=f"scaled from {source}")


def _rates(rates: Rates) -> Iterator[Assumption]:
    values = encode(rates)
    for name, value in _leaves({key: values[key] for key in values if key not in ("kind", "sources")}):
        last = name.rpartition(".")[2]
        unit = next((unit for end, unit in _UNITS.items() if last == end or last.endswith(f"_{end}")), "")
        is_time = name.partition(".")[0] in _TIMED
        unit = unit or ("s per layer" if is_time else "number")
        yield Assumption(name=f"rates.{name}", value=value, unit=unit, source=source_of(rates, name))


def _cluster(config: TrainConfig) -> Iterator[Assumption]:
    for name, value in _leaves({"cluster": encode(config.cluster), "cost": encode(config.cost)}):
        last = name.rpartition(".")[2]
        unit = next((unit for end, unit in _UNITS.items() if last.endswith(f"_{end}")), None)
        if unit is not None and not last.startswith(("timeout", "grace")):
            yield Assumption(name=name, value=value, unit=unit, source="configuration")


def _leaves(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield f"{prefix}{key}", value


def source_of(rates: Rates, name: str) -> str:
    """Returns where a rate comes from: the source with the longest key that is a prefix of its name.

    Args:
        name: dotted key below `rates`.
    """
    found = [
        (len(key), source.text)
        for source in rates.sources
        for key in source.keys
        if name == key or name.startswith(f"{key}.") or key == "all"
    ]
    return max(found)[1] if found else "not given"
