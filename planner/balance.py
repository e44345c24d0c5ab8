"""Compares modes of copies of hot experts: rows on the fullest rank, bytes, time. No torch here.

Shape legend: R ranks of an expert group, E experts.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np

from base.figures import aligned
from base.refusal import broken
from comm.balance.rows import Ints
from dualpipe.ir import Schedule
from planner.job_plan import JobPlan, PlannerConfig
from planner.scaling import ExpertLoad, KernelRates, rows_per_token
from train.config import TrainConfig
from train.predict.layer_times import LayerTimes
from train.predict.timing import time_plan
from train.report.micro_batches import (
    MODES,
    ReplayedBatch,
    balance_costs,
    expert_nodes,
    grouped_loads,
    middle_batch,
    replay,
)

_NUM_SYNTHETIC = 8
_MOST_BYTES = 2**28


@dataclass(frozen=True, slots=True)
class GivenLoads:
    """Loads of experts as YAML writes them: a MaxVio, or the path of a run or of counts."""

    value: float | str

    @classmethod
    def from_plain(cls, value: object) -> Self:
        """Reads a number or a path; raises ValueError without the key."""
        if isinstance(value, str):
            return cls(value)
        if type(value) in (int, float) and math.isfinite(value):  # type: ignore[arg-type]
            return cls(float(value))  # type: ignore[arg-type]
        raise ValueError(f"must be a MaxVio or a path, is {value!r}; nearest valid: 4")

    def to_plain(self) -> object:
        """Returns what `from_plain` reads."""
        return self.value


@dataclass(frozen=True, slots=True)
class LoadedRates:
    """Rates of kernels for uneven experts; implements `LayerRates`."""

    rates: KernelRates
    load: ExpertLoad

    def part_seconds(
        self, config: TrainConfig, attended_tokens: int | None = None, index: int | None = None
    ) -> LayerTimes:
        """Implements `LayerRates.part_seconds`."""
        return self.rates.part_seconds(config, attended_tokens, index, self.load)

    def alone_factor(self, config: TrainConfig) -> float:
        """Implements `LayerRates.alone_factor`."""
        return self.rates.alone_factor(config)

    def update_seconds(self, config: TrainConfig, schedule: Schedule) -> float:
        """Implements `LayerRates.update_seconds`."""
        return self.rates.update_seconds(config, schedule)


def synthetic_loads(max_violation: float, config: TrainConfig) -> Iterator[Ints]:
    """Yields rows [R, E] of random micro-batches; the largest load is 1 + `max_violation` means.

    The logarithms of popularities are normal; the same experts are popular on all ranks.

    Raises:
        ConfigError: a token would choose an expert more than once.
    """
    model = config.model
    most = model.num_routed_experts / model.num_experts_per_token - 1
    if not 0 <= max_violation <= most:
        raise broken("loads", f"must be a MaxVio from 0 to {most:g}", max_violation, f"{min(4.0, most):g}")
    random = np.random.default_rng(0)
    rows = round(config.batch.micro_sequences * config.mean_part_tokens) * model.num_experts_per_token
    for _ in range(_NUM_SYNTHETIC):
        normal_E = random.standard_normal(model.num_routed_experts)
        normal_E -= normal_E.max()
        # The largest share falls as the spread does, so halving finds the spread.
        low, high = 0.0, 64.0
        for _ in range(50):
            spread = (low + high) / 2
            is_high = 1 / np.exp(spread * normal_E).mean() > 1 + max_violation
            low, high = (low, spread) if is_high else (spread, high)
        popular_E = np.exp(low * normal_E)
        yield random.multinomial(rows, popular_E / popular_E.sum(), size=config.parallelism.expert)


def read_counts(path: Path) -> Iterator[tuple[int, Ints]]:
    """Yields 0 and rows [R, E] of each micro-batch in a .npy or .json file of counts [..., R, E].

    Raises:
        ConfigError: the file does not exist, is too large, or has other values.
    """
    rule = "must be a MaxVio, the folder of a run, or a .npy or .json file of counts [..., source ranks, experts]"
    if not path.is_file() or path.suffix not in (".npy", ".json") or path.stat().st_size > _MOST_BYTES:
        raise broken("loads", rule, repr(str(path)), "4")
    try:
        counts = np.load(path) if path.suffix == ".npy" else np.array(json.loads(path.read_text()))
        if counts.ndim < 2 or counts.dtype.kind not in "iu" or not counts.size or counts.min() < 0:
            raise ValueError(f"it has {counts.dtype} {list(counts.shape)}")
    except (OSError, ValueError, RecursionError) as error:
        raise broken("loads", f"{rule}; {error}", repr(str(path)), "4") from error
    yield from ((0, counts_RE) for counts_RE in counts.reshape(-1, *counts.shape[-2:]).astype(np.int64))


def balance_values(plan: JobPlan, planner: PlannerConfig, loads: Iterator[tuple[int, Ints]] | float) -> dict[str, Any]:
    """Returns what each mode costs and gains for loads of experts, as plain values.

    Args:
        loads: layer and rows of recorded micro-batches, scaled to the tokens of the run; or a MaxVio.

    Raises:
        ConfigError: the run has no experts on several ranks, or the loads are those of other ranks or experts.
    """
    config = plan.config
    num_ranks = config.parallelism.expert
    if num_ranks == 1 or not rows_per_token(config).within_node + rows_per_token(config).across_nodes:
        raise broken("parallelism.expert", "must be above 1 with loads", num_ranks, "8")
    given = synthetic_loads(loads, config) if isinstance(loads, float) else grouped_loads(loads, num_ranks)
    sent = rows_per_token(config).across_nodes
    all_sent = rows_per_token(replace(config, dispatch=replace(config.dispatch, kind="all_to_all"))).across_nodes
    costs = balance_costs(config, sent / all_sent if all_sent else 1.0)
    tokens = config.batch.micro_sequences * config.mean_part_tokens
    rows = round(tokens * config.model.num_experts_per_token * num_ranks)
    batches = replay(_checked(given, config.model.num_routed_experts), expert_nodes(config), costs, rows)
    if not batches:
        raise broken("loads", f"must have micro-batches of {num_ranks} source ranks with rows", "none", "a longer run")
    middle = middle_batch(batches)
    return {
        "micro_batches": len(batches),
        "max_violation": fmean(batch.max_violation for batch in batches),
        "fullest_node": fmean(batch.fullest_node("none") for batch in batches),
        "forced_step_seconds": None if plan.timed is None else plan.timed.time.step,
        "modes": {mode: _mode_values(plan, planner, batches, mode, costs.row) for mode in MODES},
        "bars": {mode: middle.bars(mode) for mode in MODES},
    }


def _checked(loads: Iterator[Ints], num_experts: int) -> Iterator[Ints]:
    for counts_RE in loads:
        if counts_RE.shape[1] != num_experts:
            rule = f"must have counts of the {num_experts} experts of the model"
            raise broken("loads", rule, counts_RE.shape[1], f"model.num_routed_experts={counts_RE.shape[1]}")
        yield counts_RE


def _mode_values(
    plan: JobPlan, planner: PlannerConfig, batches: Sequence[ReplayedBatch], mode: str, row_bytes: int
) -> dict[str, Any]:
    planned = [batch.modes[mode] for batch in batches]
    load = ExpertLoad(
        rank=fmean(batch.fullest(mode) for batch in batches),
        node=fmean(batch.fullest_node(mode) for batch in batches),
        copies=fmean(each.busiest for each in planned),
        copies_across=fmean(each.busiest_across for each in planned),
        slots=fmean(each.used_slots for each in planned),
    )
    between = sum(batch.rows_between_nodes for batch in batches) * row_bytes
    step = None
    if plan.timed is not None and isinstance(planner.rates, KernelRates):
        rates = LoadedRates(planner.rates, load)
        step = time_plan(rates, planner.efficiency, plan.config, schedule=plan.timed.schedule).time.step
    return {
        "fullest_rank": load.rank,
        "worst_fullest_rank": max(batch.fullest(mode) for batch in batches),
        "copies_per_rank": fmean(each.copies for each in planned) / len(batches[0].nodes),
        "bytes_between_nodes": 1 + sum(each.extra_bytes for each in planned) / between if between else None,
        "step_seconds": step,
        "of_forced_balance": None if step is None or plan.timed is None else plan.timed.time.step / step,
    }


def balance_text(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields a table of the modes, and the rows of each rank in a typical micro-batch as bars."""
    yield (
        f"loads of {values['micro_batches']} micro-batches: MaxVio {values['max_violation']:.2f}, fullest node "
        f"{values['fullest_node']:.3f} of the mean; step with forced balance {_number(values['forced_step_seconds'])} s"
    )
    header = ["balance", "fullest rank", "worst", "copies/rank", "bytes between nodes", "step s", "of forced balance"]
    rows = [[mode, *map(_number, of_mode.values())] for mode, of_mode in values["modes"].items()]
    yield from aligned([header, *rows], text=(0,))
    yield "rows of each rank in a typical micro-batch, nodes apart:"
    yield from (f"{mode:<6}{bars}" for mode, bars in values["bars"].items())


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
