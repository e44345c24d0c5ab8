"""Measures the time of a step of the project and of torch's pipelines: `python -m bench`."""

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import report
from bench.blocks import Workload
from bench.contenders import ALONE, OWN_KINDS, TORCH_KINDS
from bench.decoding import decoding_text, measure_decoding
from bench.drafts import drafts_text, measure_drafts
from bench.forecast import forecast_text
from bench.grouped_stages import CASES, grouped_text, measure_grouped
from bench.grpo import grpo_text, measure_grpo
from bench.interpreter import microseconds_per_operation
from bench.launches import launches_text, measure_launches, num_launches
from bench.measure import Plan, make_schedule, measure
from bench.overlap import NUM_NODES, all_to_all_plan, measure_overlap, two_hop_plan
from bench.pipeline import conversion_text, measure_pipeline, pipeline_text
from bench.planned_cpu import cpu_text, measure_cpu, quickstart
from bench.planned_layouts import SECONDS_PER_SEQUENCE, layouts_text, measure_layouts, small_layouts
from bench.planned_stages import KINDS, measure_planned, planned_text
from bench.sft import measure_sft, sft_text
from bench.training import SHAPES, measure_training, training_rows, training_text
from bench.turns import StepSample, missing_trl, step_rows
from tests.cluster.exchange import exchange_text
from tests.cluster.namespaces import missing, open_cluster

SECTIONS = (
    "sleep",
    "products",
    "interpreter",
    "forecast",
    "exchange",
    "overlap",
    "training",
    "launches",
    "decoding",
    "drafts",
    "sft",
    "grpo",
    "pipeline",
    "plan",
    "groups",
)

_WITH_TRL = {"sft": (measure_sft, sft_text), "grpo": (measure_grpo, grpo_text)}


def main() -> None:
    """Runs the requested sections and prints their tables."""
    arguments = _arguments()
    found: dict[str, Any] = {"machine": report.machine()}
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    if "sleep" in arguments.sections:
        plan = Plan(
            contenders=(*arguments.kinds, *TORCH_KINDS),
            num_ranks=8,
            num_micro_batches=16,
            num_rounds=arguments.rounds,
            workload=Workload(kind="sleep", num_rows=1, hidden=8, seconds=0.02),
        )
        found["sleep"] = report.sleep_rows(plan, measure(plan))
        print("\n" + report.sleep_text(plan, found["sleep"]), flush=True)
    if "products" in arguments.sections:
        plan = Plan(
            contenders=(ALONE, *arguments.kinds, *TORCH_KINDS),
            num_ranks=4,
            num_micro_batches=8,
            num_rounds=3 * arguments.rounds,
            workload=Workload(kind="products", num_rows=512, hidden=256, num_layers=4),
        )
        found["products"] = report.products_rows(measure(plan))
        print("\n" + report.products_text(plan, found["products"]), flush=True)
    if "interpreter" in arguments.sections:
        found["interpreter"] = {
            kind: microseconds_per_operation(make_schedule(kind, 8, 16), rank=3, num_repeats=200)
            for kind in arguments.kinds
        }
        print("\n" + report.interpreter_text(found["interpreter"]), flush=True)
    if "forecast" in arguments.sections:
        print("\n" + forecast_text(), flush=True)
    if "exchange" in arguments.sections:
        _exchange()
    if "overlap" in arguments.sections:
        found["overlap"] = _overlap(max(1, arguments.rounds // 2))
    if "training" in arguments.sections:
        found["training"] = {name: _training(name, arguments.rounds) for name in SHAPES}
    if "launches" in arguments.sections:
        launches = measure_launches()
        found["launches"] = {name: num_launches(counts) for name, counts in launches.items()}
        print("\n" + launches_text(launches), flush=True)
    if "decoding" in arguments.sections:
        samples = measure_decoding(arguments.rounds)
        found["decoding"] = [asdict(sample) for sample in samples]
        print("\n" + decoding_text(samples), flush=True)
    if "drafts" in arguments.sections:
        made = measure_drafts(arguments.rounds)
        found["drafts"] = [asdict(sample) for sample in made]
        print("\n" + drafts_text(made), flush=True)
    for section, (measure_steps, text) in _WITH_TRL.items():
        if section in arguments.sections:
            found[section] = _with_trl(section, 4 * arguments.rounds, measure_steps, text)
    if "pipeline" in arguments.sections:
        config = quickstart("parallelism=four_ranks", "batch.global_sequences=16")
        costs = measure_pipeline(config, 2 * arguments.rounds)
        found["pipeline"] = [asdict(cost) for cost in costs]
        print("\n" + pipeline_text(config, costs) + "\n" + conversion_text(max(1, arguments.rounds // 2)), flush=True)
    if "plan" in arguments.sections:
        found["plan"] = _planned(arguments.rounds)
    if "groups" in arguments.sections:
        grouped = measure_grouped(8, 16, 0.24, CASES, max(1, arguments.rounds // 2))
        found["groups"] = [asdict(step) for step in grouped]
        print("\n" + grouped_text(grouped), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def _training(name: str, num_rounds: int) -> list[dict[str, Any]]:
    rows = training_rows(SHAPES[name], measure_training(SHAPES[name], num_rounds))
    print("\n" + training_text(name, rows), flush=True)
    return rows


def _with_trl(
    section: str,
    num_rounds: int,
    measure: Callable[[int], dict[str, StepSample]],
    text: Callable[[dict[str, StepSample]], str],
) -> list[dict[str, Any]]:
    reason = missing_trl()
    if reason is not None:
        print(f"\n{section}: skipped: {reason}")
        return []
    samples = measure(num_rounds)
    print("\n" + text(samples), flush=True)
    return step_rows(samples)


def _planned(num_rounds: int) -> dict[str, Any]:
    steps = measure_planned(8, 16, 0.02, KINDS, num_rounds)
    print("\n" + planned_text(steps), flush=True)
    ranks = measure_cpu(quickstart(), num_rounds)
    print("\n" + cpu_text(ranks), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        layouts = small_layouts(Path(folder))
        times = measure_layouts(layouts, num_rounds, SECONDS_PER_SEQUENCE)
    print("\n" + layouts_text(times), flush=True)
    tables: dict[str, Sequence[Any]] = {"stages": steps, "cpu": ranks, "layouts": times}
    return {name: [asdict(each) for each in rows] for name, rows in tables.items()}


def _exchange() -> None:
    reason = missing()
    print(f"\nExchange: skipped: {reason}" if reason is not None else "\n" + exchange_text(), flush=True)


def _overlap(num_rounds: int) -> list[dict[str, Any]]:
    reason = missing()
    if reason is not None:
        print(f"\nOverlap: skipped: {reason}")
        return []
    plans = [make(num_micro_batches=8, num_rounds=num_rounds) for make in (two_hop_plan, all_to_all_plan)]
    rows = []
    for plan in plans:
        with open_cluster(NUM_NODES) as cluster:
            rows.append(report.overlap_row(plan, measure_overlap(cluster, plan)))
    print("\n" + report.overlap_text(plans, rows), flush=True)
    return rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--kinds", nargs="+", choices=OWN_KINDS, default=["dualpipe_split"])
    parser.add_argument(
        "--rounds", type=int, default=7, help="of sleeping steps; three times as many of products, half of overlap"
    )
    parser.add_argument("--json", type=Path, help="also write all figures to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
