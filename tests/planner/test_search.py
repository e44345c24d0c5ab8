"""Search of layouts: bounds are below what is simulated and predicted, and nothing that is dropped is better."""

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from comm.config import Cut
from dualpipe.ir import ScheduleError
from dualpipe.registry import candidates
from launch.config.rules import check_rules
from launch.plan import search_space
from launch.plan_request import PlanRequest, read_request
from planner.job_plan import plan_job, require_time
from planner.layouts import Estimates, RankedLayout, SearchSpace, adapted_run
from planner.search import FoundLayout, Search, as_measured, search_layouts, short_runs
from planner.search_forms import layout_overrides, search_text, search_values
from planner.smallest import smallest_values
from train.predict.cut import run_cut, run_placement, with_cut
from train.predict.memory import predict_memory
from train.predict.timing import time_plan

MODEL = ("experiment=v2_lite_16b", "search=true")


def make_space(tmp_path: Path, ranks: int, sequences: int, *overrides: str) -> tuple[PlanRequest, SearchSpace]:
    """Returns a small search without DeepEP, which is not installed here."""
    batch = (f"batch.global_sequences={sequences}", f"validation.sequences={sequences}")
    request = read_request([*MODEL, f"ranks={ranks}", *batch, f"data.cache_dir={tmp_path}", *overrides])
    space = search_space(request)
    return request, replace(space, dispatches=tuple(each for each in space.dispatches if each.kind != "deepep"))


def ranked(request: PlanRequest, space: SearchSpace) -> list[RankedLayout]:
    return Search(space, request.planner, check_rules).waiting


@pytest.mark.slow
def test_least_figures_are_below_exact_ones(tmp_path: Path) -> None:
    """For layouts of all kinds."""
    request, space = make_space(tmp_path, 16, 32)
    seen = Counter[str]()
    layouts = ranked(request, space)
    Random(0).shuffle(layouts)
    for layout in layouts:
        kind = layout.schedule.kind
        seen[kind] += 1
        if seen[kind] > 1:
            continue
        config = space.layout_config(layout.setting, layout.schedule)
        config = with_cut(config, run_cut(config, run_placement(config, kind)))
        plan = plan_job(replace(config, cluster=replace(config.cluster, memory_bytes=None)), request.planner)
        step, peak = require_time(plan).time.step, plan.memory.worst.total
        assert 0.2 * step <= layout.least_seconds <= step, layout
        assert layout.least_memory <= peak, layout
        assert 0.5 * peak <= layout.memory <= 2 * peak, layout
    assert set(seen) == set(candidates())


@pytest.mark.long
@pytest.mark.parametrize(
    ("ranks", "sequences", "overrides"),
    [(16, 8, ("cluster.memory_bytes=40000000000",)), pytest.param(64, 32, (), marks=pytest.mark.exhaustive)],
)
def test_nothing_dropped_is_better(tmp_path: Path, ranks: int, sequences: int, overrides: tuple[str, ...]) -> None:
    """Compares the result with a plan of every layout that rules accept."""
    request, space = make_space(tmp_path, ranks, sequences, *overrides)
    own = space.config.dispatch
    space = replace(space, recomputes=(space.config.recompute,), dispatches=(own,), precisions=space.precisions[:1])
    space = replace(space, schedules=space.schedules[::2])
    result = search_layouts(space, request.config, request.planner, check_rules, most_seconds=200.0)
    assert result.counts["open"] == 0
    best: list[tuple[float, int]] = []
    estimates = Estimates(space=space, planner=request.planner)
    for layout in ranked(request, space):
        config = space.layout_config(layout.setting, layout.schedule)
        try:
            # A search lists the cut by rates; plans have the cut by estimated work.
            times = estimates.times(layout.setting, layout.schedule.slices)
            config = with_cut(config, run_cut(config, run_placement(config, layout.schedule.kind), times))
            plan = plan_job(config, request.planner)
        except ScheduleError:
            continue
        if plan.fits:
            best.append((require_time(plan).time.step, plan.memory.worst.total))
    best.sort()
    found = [each.order for each in result.found]
    # An order for the rates is faster than that of the plan, or is not returned.
    assert all(step <= other * (1 + 1e-6) for (step, _), (other, _) in zip(found[:6], best[:6], strict=False))
    assert len(found) >= min(6, len(best))
    for each in result.found:
        step, peak = each.order
        is_beaten = any(other < step * (1 - 1e-6) and need <= peak for other, need in best)
        assert not (each.is_pareto and is_beaten)


@pytest.mark.long
def test_counts_and_rejections_add_up(tmp_path: Path) -> None:
    request, space = make_space(tmp_path, 4, 8, "cluster.memory_bytes=180000000000")
    space = replace(space, recomputes=space.recomputes[:1], precisions=space.precisions[:1])
    result = search_layouts(space, request.config, request.planner, check_rules)
    counts = result.counts
    assert counts["layouts"] == sum(
        len(space.schedules_of(setting.mesh.pipeline, setting.mesh.context)) for setting in space.settings()
    )
    assert counts["rejected"] == sum(group.count for group in result.rejected)
    assert counts["layouts"] >= counts["rejected"] + counts["dropped"] + counts["open"]
    assert {group.reason.partition(":")[0] for group in result.rejected} >= {"dispatch", "batch.global_sequences"}
    assert all(found.memory.worst.total <= request.config.cluster.memory_bytes for found in result.found)  # type: ignore[operator]
    assert [found.order for found in result.found] == sorted(found.order for found in result.found)


@pytest.mark.slow
def test_no_layout_fits_only_if_all_are_compared(tmp_path: Path) -> None:
    """Without time, nothing is found and everything is open; with time, nothing fits."""
    request, space = make_space(tmp_path, 4, 8, "cluster.memory_bytes=70000000000")
    space = replace(space, recomputes=space.recomputes[:1], precisions=space.precisions[:1])
    texts = []
    for seconds in (0.0, 100.0):
        result = search_layouts(space, request.config, request.planner, check_rules, most_seconds=seconds)
        texts.append(search_text(search_values(result), 8, 8))
        assert result.counts["layouts"] == result.counts["rejected"] + result.counts["open"]
        assert not result.found
        assert result.counts["dropped"] == 0
    assert re.fullmatch(r"none found: [\d,]+ of [\d,]+ are ruled out, [\d,]+ are open", texts[0][0])
    assert texts[0][2].endswith(" s a step;") or "not compared" in texts[0][2]
    assert texts[1][0] == f"no layout of {result.counts['layouts']:,} fits"


@pytest.mark.slow
def test_a_searched_order_of_few_micro_batches_is_extended_to_the_step_of_the_whole_order(tmp_path: Path) -> None:
    """On a pipeline whose steady state repeats; other orders of a step are built whole before they are returned."""
    sizes = ("parallelism.pipeline=4", "parallelism.data=1", "parallelism.expert=1", "dispatch=local")
    request, space = make_space(tmp_path, 4, 64, *sizes)
    search = Search(
        replace(space, schedules=space.schedules[:1], recomputes=space.recomputes[:1]), request.planner, check_rules
    )
    schedule = replace(request.config.schedule, kind="interleaved_1f1b", chunks=2)
    config = replace(
        request.config, schedule=schedule, parallelism=replace(request.config.parallelism, cut=Cut("even"))
    )
    short = short_runs(config)
    assert [run.num_micro_batches for run in short] == [20, 24]
    whole = search.step_time(config, (config,))
    extended = search.step_time(config, short)
    assert extended.step == pytest.approx(whole.step, rel=0.03)
    for time in (whole, extended):
        assert time.tokens_per_second_per_gpu * time.step == pytest.approx(64 * 4096 / 4)


def test_batch_is_adapted_only_if_no_layout_divides_it() -> None:
    config = read_request(["experiment=v3_671b"]).config
    assert adapted_run(config, 2048) == config
    adapted = adapted_run(config, 100_352)
    assert adapted.batch.global_sequences == 100_352
    assert adapted.batch.ramp is None
    tokens = config.batch_sizes.tokens_before(config.task.steps)
    assert 0 <= adapted.batch_sizes.tokens_before(adapted.task.steps) - tokens < 100_352 * 4096
    check_rules(replace(adapted, parallelism=replace(config.parallelism, data=6272)))


@pytest.mark.slow
def test_smallest_jobs_fit_as_planned_and_every_smaller_number_is_refused_or_open(tmp_path: Path) -> None:
    # A node holds the state, and its copy for a checkpoint, and hardly more.
    sizes = ("cluster.memory_bytes=50000000000", "cluster.host_memory_bytes=300000000000")
    run = ("experiment=v2_lite_16b", *sizes, f"data.cache_dir={tmp_path}")
    request = read_request([*run, "smallest=true"])
    jobs = smallest_values(search_space(request), request.planner, check_rules)
    assert [job["offload"] for job in jobs] == [False, True]
    assert jobs[1]["ranks"] < jobs[0]["ranks"]
    assert jobs[1]["node_bytes"] > 1.5 * jobs[0]["node_bytes"]
    for job in jobs:
        plan = plan_job(read_request([*run, *job["overrides"]]).config, request.planner)
        assert plan.fits
        assert plan.memory.worst.total == job["peak_bytes"]
        numbers = [1, 2, 4, *range(8, job["ranks"], 8)] if job["ranks"] > 8 else [1, 2, 4, 8]
        below = [number for number in numbers if number < job["ranks"]]
        assert [job["smaller"][0]["from"], job["smaller"][-1]["to"]] == [below[0], below[-1]]
    # Nodes that cannot hold a checkpoint's copy refuse every number.
    small = read_request([*run, "smallest=true", "cluster.host_memory_bytes=1000"])
    for job in smallest_values(search_space(small), small.planner, check_rules):
        (refused,) = job["smaller"]
        assert (job["ranks"], refused["proven"], refused["from"], refused["to"]) == (None, True, 1, 4096)
        assert "host memory" in refused["reason"]


def test_returned_layout_measures_first_if_the_order_for_the_rates_is_faster(tmp_path: Path) -> None:
    """A plan of the overrides has the same step, so a search is never slower than the plan of its layout."""
    cut = "parallelism.cut=[4,4,4,4,4,4,4,4,4,4,4,4,4,4,4,1]"
    request = read_request(["experiment=v3_671b", cut, f"data.cache_dir={tmp_path}"])
    kind = replace(request.config.schedule, kind="dualpipe_interleaved", chunks=1)
    config = replace(request.config, schedule=kind)
    time = time_plan(request.planner.rates, request.planner.efficiency, config).time
    found = FoundLayout(config=config, memory=predict_memory(config), time=time)
    measured = as_measured(found, request.planner, check_rules)
    assert measured.is_measured
    assert measured.time.step < 0.99 * time.step
    overrides = list(layout_overrides(measured.config, request.config, measures=True))
    assert "schedule=auto" in overrides
    planned = read_request(["experiment=v3_671b", *overrides, f"data.cache_dir={tmp_path}"])
    again = time_plan(planned.planner.rates, planned.planner.efficiency, planned.config).time
    assert again.step == pytest.approx(measured.time.step, rel=1e-9)
    # The published order does not depend on times.
    published = replace(found, config=replace(config, schedule=replace(kind, kind="dualpipe")))
    assert as_measured(published, request.planner, check_rules) is published
