"""Compares changed runs with a run, and lists what better hardware could change. No torch here."""

import fnmatch
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from base.decode import encode, flatten
from model.config import RECOMPUTED
from planner.job_plan import JobPlan, PlannerConfig, plan_job
from planner.products import held_weights
from planner.scaling import REFERENCE_MEMORY_BYTES_PER_SECOND, KernelRates, Rates, rows_per_token
from train.config import TrainConfig

_WISHES = Path(__file__).with_name("advice.yaml")
_FP8_SHARE = 0.75
"""Share of the peak of the computing SMs that FP8 products reach in the wish."""
_FP8_OVER_BF16 = 2.0
_SLOWER = 1e-6
_EQUAL = 1 - 1e-9
_TIMES = "x "
"""Start of a change in `advice.yaml` that multiplies the numbers of a run."""


def plan_with_order(base: JobPlan, before: TrainConfig, after: TrainConfig, planner: PlannerConfig) -> JobPlan | None:
    """Plans a changed run with the order and the cut of the run, or returns None if they do not apply.

    Raises:
        ScheduleError, CutError: as `plan_job`.
    """
    if base.timed is None or _order_inputs(before) != _order_inputs(after):
        return None
    parallelism = replace(after.parallelism, cut=base.config.parallelism.cut)
    schedule = replace(after.schedule, kind=base.config.schedule.kind, slices=base.config.schedule.slices)
    return plan_job(replace(after, parallelism=parallelism, schedule=schedule), planner, base.timed.schedule)


def _order_inputs(config: TrainConfig) -> tuple[object, ...]:
    """Returns what decides, with the costs, on the order and the cut of a run."""
    mesh = config.parallelism
    model = config.model
    sizes = (mesh.pipeline, mesh.cut, config.num_micro_batches, model.num_layers, model.num_dense_layers)
    return (*sizes, model.mtp_depth, config.schedule, config.memory_cap, config.costs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """Better or worse hardware."""

    name: str
    change: str = ""
    needs: str = ""
    note: str = ""
    has_memory: bool = True


def wishes(config: TrainConfig, rates: Rates) -> Iterator[Wish]:
    """Yields what hardware could change for a run: the rows of `advice.yaml` that apply."""
    facts = _facts(config, rates)
    run = _run_numbers(config, rates)
    values = _kernel_values(config, rates) if isinstance(rates, KernelRates) else {}
    for row in yaml.safe_load(_WISHES.read_text(encoding="utf-8")):
        if not all(facts[fact.removeprefix("not ")] != fact.startswith("not ") for fact in row.get("when", ())):
            continue
        for factor in row.get("factors", (1.0,)):
            filled = values | {"factor": factor, "inverse": 1 / factor}
            strings = {key: row.get(key, "").format_map(filled) for key in ("wish", "needs", "note")}
            change = " ".join(_overrides(row.get("change", {}), filled, run))
            yield Wish(name=strings.pop("wish"), change=change, has_memory=row.get("has_memory", True), **strings)


def _facts(config: TrainConfig, rates: Rates) -> dict[str, bool]:
    is_kernels = isinstance(rates, KernelRates)
    exchanges = config.parallelism.expert > 1
    used = _communication_sms(config, rates) if isinstance(rates, KernelRates) else 0
    return {
        "kernels": is_kernels,
        "fp8": config.precision.kind == "fp8",
        "below fp8 wish": isinstance(rates, KernelRates) and fp8_share(rates) < _FP8_SHARE,
        "exchange": exchanges,
        "across nodes": rows_per_token(config).across_nodes > 0,
        "communication SMs": exchanges and used > 0,
        "several SMs": used > 1,
        "imbalance": isinstance(rates, KernelRates) and rates.receive_imbalance > 1,
        "forwarding": config.dispatch.kind in ("two_hop", "deepep"),
        "limited groups": config.model.num_limited_groups < config.model.num_expert_groups,
        "pipeline": config.parallelism.pipeline > 1,
        "even pipeline": config.parallelism.pipeline % 2 == 0,
        "recomputation": bool(config.recompute),
        "offload": config.costs.offload is not None,
        "failures": config.cost.gpu_mtbf_hours is not None,
    }


def _kernel_values(config: TrainConfig, rates: KernelRates) -> dict[str, Any]:
    """Returns the values that rows of `advice.yaml` about kernels contain."""
    attention = rates.attention.backward_input
    experts = rates.experts.backward_input
    saved = rates.recomputed
    share = fp8_share(rates)
    return {
        "all_recomputed": ",".join(RECOMPUTED),
        "fp8_share": 100 * share,
        "fp8_factor": share / _FP8_SHARE,
        "half_sms": _communication_sms(config, rates) // 2,
        "groups": config.model.num_expert_groups,
        "nodes": math.ceil(config.parallelism.expert / config.cluster.ranks_per_node),
        "stored_products": max(0.0, attention.products - saved.mla_up),
        "stored_attention": max(0.0, attention.other - saved.norm),
        "stored_experts": max(0.0, experts.other - saved.swiglu),
    }


def _communication_sms(config: TrainConfig, rates: KernelRates) -> int:
    used = config.cluster.communication_sms
    return rates.reference.communication_sms if used is None else used


def _overrides(changes: Mapping[str, object], values: Mapping[str, Any], run: Mapping[str, Any]) -> Iterator[str]:
    """Yields the overrides of a row. Unknown numbers and zeros have no multiple."""
    for pattern, change in changes.items():
        text = str(change).format_map(values)
        for key in fnmatch.filter(run, pattern) or [pattern]:
            if not text.startswith(_TIMES):
                yield f"{key}={text}"
            elif value := run.get(key):
                multiple = value * float(text.removeprefix(_TIMES))
                yield f"{key}={round(multiple) if isinstance(value, int) else f'{multiple:.6g}'}"


def _run_numbers(config: TrainConfig, rates: Rates) -> dict[str, Any]:
    """Returns the values that multiples refer to; the rates say what the cluster leaves to them."""
    cluster = encode(config.cluster)
    if isinstance(rates, KernelRates):
        defaults = encode(rates.reference) | {"memory_bytes_per_second": REFERENCE_MEMORY_BYTES_PER_SECOND}
        cluster = {key: defaults.get(key) if value is None else value for key, value in cluster.items()}
    sections = {name: encode(getattr(config, name)) for name in ("parallelism", "costs", "cost")}
    return dict(flatten(sections | {"cluster": cluster, "rates": encode(rates)}))


def fp8_share(rates: KernelRates) -> float:
    """Returns the share of the FP8 peak of the computing SMs that the products of the reference reach."""
    reference = rates.reference
    experts = 3 * reference.hidden_size * reference.active_expert_width
    # F, I and W each multiply by all weights of a token, and I computes some products of F again.
    weights = 3 * (held_weights(reference.attention) + experts) + reference.recomputed_parameters
    flops = 2 * reference.tokens * weights
    parts = (rates.attention, rates.experts)
    passes = [kernels for part in parts for kernels in (part.forward, part.backward_input, part.backward_weight)]
    seconds = sum(kernels.products for kernels in passes)
    computing = 1 - reference.communication_sms / reference.num_sms
    return flops / seconds / (_FP8_OVER_BF16 * reference.peak_flops * computing) if seconds else math.inf


def link_balance(config: TrainConfig, rates: Rates) -> dict[str, Any]:
    """Returns exchange next to computation of a MoE layer, for an F overlapped with a full backward.

    Below `break_even_bytes_per_second` between nodes, exchange is longer than computation. It is None if that link is
    unknown or not used, or if the link within a node alone is slower than computation.
    """
    moe = rates.part_seconds(config).moe.work
    link = config.cluster.inter_node_bytes_per_second
    if link is None and isinstance(rates, KernelRates):
        link = rates.reference.inter_node_bytes_per_second
    even = None
    limit = "nothing is exchanged"
    hidden = "none: there is no exchange"
    if moe.exchange:
        hidden = "exchange" if moe.exchange <= moe.compute else "computation"
        across = moe.exchange
        within = 0.0
        if not rows_per_token(config).across_nodes:
            across = 0.0
        elif isinstance(rates, KernelRates) and link is not None:
            # On a link this slow, nothing within a node is a limit, and time is inversely proportional to its rate.
            across = _moe_exchange(config, rates, link * _SLOWER) * _SLOWER
            within = _moe_exchange(config, rates, link / _SLOWER)
        limit = "link between nodes" if across >= moe.exchange * _EQUAL else "link within a node"
        if link is not None and within < moe.compute:
            even = link * across / moe.compute or None
    return {
        "exchange_over_compute": moe.exchange / moe.compute if moe.compute else 0.0,
        "exchange_seconds_per_layer": moe.exchange,
        "compute_seconds_per_layer": moe.compute,
        "hidden": hidden,
        "limit": limit,
        "inter_node_bytes_per_second": link,
        "break_even_bytes_per_second": even,
        "link_over_break_even": None if link is None or even is None else link / even,
    }


def _moe_exchange(config: TrainConfig, rates: Rates, link: float) -> float:
    cluster = replace(config.cluster, inter_node_bytes_per_second=link)
    return rates.part_seconds(replace(config, cluster=cluster)).moe.work.exchange
