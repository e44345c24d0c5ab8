"""Finds the fewest devices that hold a run, with its optimizer on them or on the host. No torch here."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import chain, groupby
from typing import Any

from base.refusal import broken
from comm.config import Cut
from model.config import LAYER
from model.size import count_parameters
from planner.forms import labeled
from planner.job_plan import PlannerConfig, layout_json
from planner.layouts import SearchSpace, adapted_run, divisors
from planner.search import FoundLayout, Rules, Search
from planner.search_forms import layout_overrides
from train.config import TrainConfig
from train.optim.registry import AdamWConfig
from train.predict.fit import gigabytes, parts
from train.predict.rank_bytes import state_bytes

_MOST_RANKS = 4096
_COUNT_SECONDS = 2.0
"""CPU seconds for the predictions of one number of ranks, as a search estimates them."""


def smallest_values(space: SearchSpace, planner: PlannerConfig, rules: Rules) -> list[dict[str, Any]]:
    """Returns the smallest jobs with the optimizer on the device and on the host as plain values.

    Layouts have the precision, the dispatch and the batch of the run, micro-batches of one whole sequence,
    recompute=[layer] and an even cut. Smaller numbers of ranks are refused by a bound for any cut and recomputation, or
    some of their layouts are open.
    """
    config = space.config
    if config.cluster.memory_bytes is None:
        raise broken("cluster.memory_bytes", "must be known with smallest=true", "null", "cluster=h800")
    # Equal times need more memory at the ends of the pipeline than equal numbers of layers.
    config = replace(config, memory_cap=None, parallelism=replace(config.parallelism, cut=Cut("even")))
    kept: dict[str, Any] = {"precisions": (config.precision,), "dispatches": (config.dispatch,)}
    kept["schedules"] = tuple(schedule for schedule in space.schedules if schedule.slices == 1)
    space = replace(space, recomputes=((LAYER,),), most_micro_sequences=1, **kept)
    jobs = []
    optim = config.optim
    runs = [config]
    if isinstance(optim, AdamWConfig):
        choices = (False, True) if optim.sharding == "zero1" else (False,)
        runs = [replace(config, optim=replace(optim, offload=offload)) for offload in choices]
    for run in runs:
        refused, found = _first_job(replace(space, config=run), planner, rules)
        groups = [list(group) for _, group in groupby(refused, key=lambda tried: tried["proven"])]
        values = {} if found is None else _job_values(found, run)
        smaller = [{"from": group[0]["ranks"], "to": group[-1]["ranks"], **group[-1]} for group in groups]
        jobs.append({"offload": run.optim.offload, "ranks": None, **values, "smaller": smaller})
    return jobs


def _first_job(
    space: SearchSpace, planner: PlannerConfig, rules: Rules
) -> tuple[list[dict[str, Any]], FoundLayout | None]:
    """Returns why numbers of ranks were refused, and if that is proven, and the first layout that fits."""
    refused: list[dict[str, Any]] = []
    run = space.config
    node = run.cluster.ranks_per_node
    for ranks in chain(divisors(node), range(2 * node, _MOST_RANKS + 1, node)):
        if reason := _host_shortage(run, ranks):
            refused.append({"ranks": ranks, "proven": True, "reason": reason})
            continue
        search = Search(replace(space, config=adapted_run(run, ranks), ranks=ranks), planner, rules)
        is_proven = not search.waiting
        search.seconds_left = _COUNT_SECONDS
        if (found := search.first_that_fits()) is not None:
            return refused, found
        nearest = min(search.rejected.values(), key=lambda group: group.excess or float("inf"))
        refused.append({"ranks": ranks, "proven": is_proven, "reason": nearest.reason})
    return refused, None


def _host_shortage(run: TrainConfig, ranks: int) -> str:
    """Returns why nodes cannot hold their part of the state, and its copy for a checkpoint, in any layout."""
    host = run.cluster.host_memory_bytes
    copies = 2 if run.optim.offload else 1
    state = copies * state_bytes(run, count_parameters(run.model).total)
    least = state * min(ranks, run.cluster.ranks_per_node) // ranks
    if host is None or run.optim.sharding != "zero1" or least <= host:
        return ""
    return f"host memory: a node needs at least {gigabytes(least)} of {gigabytes(host)}"


def _job_values(found: FoundLayout, run: TrainConfig) -> dict[str, Any]:
    ranks = found.config.parallelism.world_size
    has_key = isinstance(run.optim, AdamWConfig)
    offload = [f"optim.offload={str(run.optim.offload).lower()}"] if has_key else []
    return {
        "ranks": ranks,
        "layout": layout_json(found.config),
        "peak_bytes": found.peak_bytes,
        "capacity_bytes": run.cluster.memory_bytes,
        "parts": parts(found.memory.worst),
        "node_bytes": max(rank.host for rank in found.memory.ranks) * min(ranks, run.cluster.ranks_per_node),
        "node_capacity_bytes": run.cluster.host_memory_bytes,
        "overrides": [*offload, *layout_overrides(found.config, run)],
    }


def smallest_text(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the smallest jobs as lines of at most 100 columns, except those of overrides."""
    lines = []
    for job in jobs:
        found = f"nothing found up to {_MOST_RANKS:,} GPUs" if job["ranks"] is None else f"{job['ranks']:,} GPUs"
        lines.append(f"optimizer on the {'host' if job['offload'] else 'device'}: {found}")
        if job["ranks"] is not None:
            layout = job["layout"]
            axes = f"pipeline {layout['pipeline']} x data {layout['data']} x context {layout['context']}"
            of = "" if job["node_capacity_bytes"] is None else f" of {gigabytes(job['node_capacity_bytes'])}"
            room = f"{gigabytes(job['peak_bytes'])} of {gigabytes(job['capacity_bytes'])}"
            lines += labeled("layout", f"{axes}, experts over {layout['expert']}; schedule {layout['schedule']}")
            lines += labeled("device", f"{room} ({job['parts']})")
            lines += labeled("host", f"{gigabytes(job['node_bytes'])}{of} in a node")
        for group in job["smaller"]:
            span = f"{group['from']:,}" if group["from"] == group["to"] else f"{group['from']:,} to {group['to']:,}"
            verdict = "refused by a bound" if group["proven"] else "no predicted layout fits, others are not predicted"
            text = f"with {span}: {verdict}; with {group['to']:,}, {group['reason']}"
            lines += labeled("proven" if group["proven"] else "open", text)
        lines += ["", shlex.join(job.get("overrides", ())), ""]
    return lines
