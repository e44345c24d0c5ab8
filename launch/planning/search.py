"""Builds the layouts that `launch.plan search=true` compares, from the options in `conf/`."""

from dataclasses import replace
from typing import Any

from comm.config import DispatchConfig
from comm.dispatch.registry import DISPATCHERS
from dualpipe.config import ScheduleConfig
from dualpipe.registry import candidates
from launch.config.groups import options, read_option
from launch.config.rules import check_rules
from launch.planning.request import PlanRequest
from train.config import Fp8PrecisionConfig, Precision, PrecisionConfig, TrainConfig
from train.config.decode import decode
from train.config.errors import ConfigError
from train.planner.config import MeasuredRates
from train.planner.job_plan import untimed_reason
from train.planner.search.layouts import search_layouts
from train.planner.search.result import SearchResult
from train.planner.search.space import MOST_RANKS, SearchSpace, adapted_run, recompute_sets


def search_request(request: PlanRequest) -> SearchResult:
    """Searches the layouts of a request's run.

    Args:
        request: with `search=true`.

    Raises:
        ConfigError: there are too many ranks or layouts, or no time can be predicted.
    """
    return search_layouts(search_space(request), request.config, request.planner, check_rules)


def search_space(request: PlanRequest) -> SearchSpace:
    """Returns all layouts of a request's run.

    Rates that a run measured hold for its precision and dispatch, so only layouts of these are compared.

    Args:
        request: with `search=true`.

    Raises:
        ConfigError: there are too many ranks, or no time can be predicted.
    """
    config = request.config
    if config.schedule.slices > 1:
        raise ConfigError(
            f"schedule.slices: must be 1 with search=true, which compares layouts of whole sequences, is "
            f"{config.schedule.slices}; nearest valid: 1"
        )
    if request.options.format == "html":
        raise ConfigError("format: must be text or json with search=true, is html; nearest valid: text")
    ranks = request.options.ranks or config.parallelism.world_size
    if ranks > MOST_RANKS:
        raise ConfigError(f"ranks: must be at most {MOST_RANKS}, is {ranks}; nearest valid: {MOST_RANKS}")
    is_measured = isinstance(request.planner.rates, MeasuredRates)
    precisions = (config.precision,) if is_measured else _precisions(config)
    untimed = untimed_reason(replace(config, precision=precisions[0]), request.planner.rates)
    if untimed:
        raise ConfigError(untimed)
    return SearchSpace(
        config=adapted_run(config, ranks),
        ranks=ranks,
        schedules=tuple(_schedule(config, kind) for kind in candidates()),
        precisions=precisions,
        recomputes=(config.recompute,) if is_measured else recompute_sets(),
        dispatches=_dispatches(config),
    )


def _precisions(config: TrainConfig) -> tuple[Precision, ...]:
    """Returns FP8, as the run has it or with float32 scales, and bf16."""
    own = config.precision
    fp8 = own if isinstance(own, Fp8PrecisionConfig) else Fp8PrecisionConfig(kind="fp8", scales="float32")
    return fp8, PrecisionConfig(kind="bf16")


def _schedule(config: TrainConfig, kind: str) -> ScheduleConfig:
    """Returns a kind of schedule with the pairing of its option, or of the run if that is its kind."""
    if kind == config.schedule.kind:
        return replace(config.schedule, chunks=None)
    pairing: Any = read_option("schedule", kind).get("pairing", config.schedule.pairing)
    return ScheduleConfig(kind=kind, chunks=None, pairing=pairing)


def _dispatches(config: TrainConfig) -> tuple[DispatchConfig, ...]:
    """Returns the dispatchers with an option, with the run's payload, and the run's own as it is."""
    found: list[DispatchConfig] = []
    for name in DISPATCHERS.names():
        if name == config.dispatch.kind:
            found.append(config.dispatch)
        elif name in options("dispatch"):
            values = read_option("dispatch", name) | {"payload": config.dispatch.payload}
            read: Any = decode(DISPATCHERS.get(name).config, values, "dispatch")
            found.append(read)
    return tuple(found)
