"""Verification: every planted fault is named, and a job without faults passes."""

import re
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from comm.config import ParallelismConfig
from comm.layout import Layout
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.registry import ScheduleConfig
from launch.config.rules import check_rules
from model.config import GqaConfig
from tests.covering import exhaustive
from tests.ranks import run_ranks
from tests.rollouts import GRPO
from tests.tiny import GQA, MUON, OPTIM, tiny_config
from tests.verify.edited_faults import EDITS
from tests.verify.planted_faults import PLANTED, TASK_FAULTS
from train.config import EmaConfig, PrecisionConfig, TrainConfig
from train.tasks.pretrain import PretrainConfig
from train.tasks.registry import TASKS
from verify.certificate import missing_task
from verify.checks import CheckEntry, Outcome, Place, Verification, run_checks
from verify.equality import check_equality
from verify.layouts import CONFIGURED, OPTIMIZER, choose_trials
from verify.places import misplaced
from verify.rates import below_preset, partners, slow_places
from verify.run import CHECKS

NONE = "none"
CAPPED = "node cap raises on one rank alone"
NUM_PARTS = 6
"""Tests over which the faults are spread, so that none takes long."""


def run_config(folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
        ema=EmaConfig(decay=0.9),
    )


def verify(
    rank: int, world_size: int, config: TrainConfig, faults: list[str], num_sampled: int = 0
) -> list[list[Outcome]]:
    """Returns the outcomes of a verification with each fault in turn; `none` is no fault."""
    trials = choose_trials(config, num_sampled, check_rules)
    outcomes = []
    for fault in faults:
        with ExitStack() as stack:
            if fault != NONE:
                (PLANTED.get(fault) or EDITS[fault]).plant(rank, stack)
            folder = Path(config.out_dir)
            folder.mkdir(exist_ok=True)
            log = CollectiveLog()
            device = torch.device("cpu")
            verification = Verification(config=config, device=device, log=log, trials=trials, folder=folder)
            outcomes.append(list(run_checks(checks_for(fault), verification)))
    return outcomes


def checks_for(fault: str) -> list[CheckEntry]:
    """Leaves out the checks that take nine tenths of the time, for a fault with which they pass."""
    named = PLANTED[fault].check if fault in PLANTED else "equality"
    left_out = set() if named in ("equality", "copies") else {"equality", "checkpoint"} - {named}
    return [entry for entry in CHECKS if entry.name not in left_out]


def assert_named(fault: str, outcomes: list[Outcome]) -> None:
    failed = [outcome for outcome in outcomes if outcome.verdict != "passed"]
    if fault == NONE:
        assert not failed, "\n".join(map(str, failed))
        return
    planted = PLANTED[fault]
    named = {outcome.check: outcome.failures for outcome in failed}.get(planted.check, ())
    lines = "\n".join(map(str, (failure for outcome in failed for failure in outcome.failures)))
    assert named, f"{fault}: {lines or 'no check failed'}"
    assert {failure.rank for failure in named} <= set(planted.ranks), f"{fault}: {lines}"
    assert re.search(planted.subject, named[0].subject), f"{fault}: {lines}"
    assert re.search(planted.cause, str(named[0])), f"{fault}: {lines}"


def assert_all_named(config: TrainConfig, faults: list[str]) -> None:
    world = config.parallelism.world_size
    results = run_ranks(world, verify, config, faults, timeout_seconds=500)
    problems = []
    for fault, outcomes in zip(faults, results[0], strict=True):
        try:
            assert_named(fault, outcomes)
        except AssertionError as error:
            problems.append(str(error).split("\nassert")[0][:1500])
    assert not problems, "\n\n".join(problems)


@pytest.mark.parametrize("world", [1, 2, 3, 8, 13, 17, 40])
def test_partners_of_a_round_have_each_other(world: int) -> None:
    rounds = list(zip(*(partners(rank, world) for rank in range(world)), strict=True))
    for others in rounds:
        assert all(other is None or others[other] == rank != other for rank, other in enumerate(others))
    pairs = {frozenset((rank, other)) for others in rounds for rank, other in enumerate(others) if other is not None}
    assert len(pairs) == world * (world - 1) // 2 or (world > 16 and len(set().union(*pairs)) == world)


def test_slow_places_are_links_or_ranks_whose_links_are_all_slow() -> None:
    pairs: dict[tuple[int, ...], float] = {(one, other): 8.0 for other in range(4) for one in range(other)}
    assert slow_places(pairs, 0.5) == {}
    assert slow_places({**pairs, (1, 2): 1.0}, 0.5) == {(1, 2): 0.125}
    assert slow_places({pair: 2.0 if 2 in pair else 8.0 for pair in pairs}, 0.5) == {(2,): 0.25}
    assert slow_places({(0,): 1.0, (1,): 8.0}, 0.5) == {(0,): 0.125}


def test_rates_below_half_of_the_preset_are_named_with_its_key() -> None:
    cluster = replace(tiny_config(Path()).cluster, ranks_per_node=1, peak_flops=4.0, inter_node_bytes_per_second=10.0)
    layout = Layout(ParallelismConfig(pipeline=1, data=2, expert=1), 1)
    found = list(below_preset({"product": {(0,): 3.0, (1,): 1.0}, "link": {(0, 1): 4.0}}, cluster, layout))
    assert [(one.rank, one.difference) for one in found] == [
        (1, "is 0.25 of cluster.peak_flops=4"),
        (0, "is 0.4 of cluster.inter_node_bytes_per_second=10"),
    ]


def test_ranks_on_wrong_devices_and_hosts_are_named() -> None:
    cluster = replace(tiny_config(Path()).cluster, device="cuda", backend="nccl", ranks_per_node=2)
    place = Place(rank=0, local_rank=0, host="a", device_type="cuda", device_index=0, device="x")
    other = replace(place, rank=1, local_rank=1, device_index=1, device="y")
    assert list(misplaced([place, other], cluster)) == []
    wrong = {
        "device": [replace(other, device="x"), replace(other, device_index=0), replace(other, device_type="cpu")],
        "host": [replace(other, host="b")],
    }
    for subject, places in wrong.items():
        for moved in places:
            (failure,) = misplaced([place, moved], cluster)
            assert (failure.rank, failure.subject) == (1, subject)


def test_small_runs_take_the_configured_optimizer_and_router(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    optim = replace(OPTIM, sharding="zero1", offload="torch")
    config = replace(config, optim=optim, batch=replace(config.batch, document_mask=True))
    config = replace(config, precision=PrecisionConfig(kind="float32"))
    trials = {trial.name: trial.config for trial in choose_trials(config, 0, check_rules)}
    run = trials[OPTIMIZER]
    assert (run.optim.sharding, run.optim.offload, run.ema.decay is None) == ("zero1", "torch", False)
    assert all(trial.batch.document_mask for trial in trials.values())
    assert {"directions axis", "slices axis"} <= set(trials)
    muon = replace(config, optim=replace(MUON, sharding="zero1", momentum=0.8))
    configured = [trial.config.optim for trial in choose_trials(muon, 0, check_rules)]
    assert {(optim.kind, getattr(optim, "momentum", None)) for optim in configured} == {("muon", 0.8)}
    softmax = replace(config, model=replace(config.model, router="softmax"))
    assert {trial.config.model.router for trial in choose_trials(softmax, 0, check_rules)} == {"softmax"}
    grouped = choose_trials(replace(config, model=GQA), 0, check_rules)
    assert {type(trial.config.model) for trial in grouped} == {GqaConfig}
    assert not {"slices", "context"} & {trial.axis for trial in grouped}


def task_config(folder: Path, kind: str) -> TrainConfig:
    """Returns a run of a task with the values of its example, as the task's checks of rollouts are not those here."""
    config = run_config(folder)
    spec = TASKS.get(kind)
    values: dict[str, Any] = {field.name: getattr(config.task, field.name) for field in fields(PretrainConfig)}
    values |= {**spec.example, "kind": kind}
    task = replace(GRPO, reference_every_steps=1) if kind == "grpo" else spec.config(**values)
    return replace(config, task=task, batch=replace(config.batch, document_mask=True))


def task_failures(rank: int, world_size: int, runs: list[tuple[TrainConfig, str]]) -> list[list[str]]:
    """Returns the failures of this rank in the small run of each configured task, with a fault."""
    failures = []
    for config, fault in runs:
        trials = [trial for trial in choose_trials(config, 0, check_rules) if trial.name in ("task axis", CONFIGURED)]
        device = torch.device("cpu")
        job = Verification(
            config=config, device=device, log=CollectiveLog(), trials=trials, folder=Path(config.out_dir)
        )
        with ExitStack() as stack:
            if fault != NONE:
                TASK_FAULTS[fault](rank, stack)
            failures.append([str(failure) for failure in check_equality(job).failures])
    return failures


def test_small_runs_take_the_configured_task_or_the_certificate_says_that_they_do_not(tmp_path: Path) -> None:
    for kind in ("sft", "dpo", "reward_model", "distill", "grpo", "long_context"):
        config = task_config(tmp_path, kind)
        trials = {trial.name: trial.config.task.kind for trial in choose_trials(config, 1, check_rules)}
        taken = "pretrain" if kind == "long_context" else kind
        assert (trials[CONFIGURED], trials[OPTIMIZER], trials.get("task axis", "pretrain")) == (taken, taken, taken)
        assert missing_task(config.task) == []
    TASKS.register("heights", replace(TASKS.get("sft"), values=("heights",)))
    try:
        plugin = replace(task_config(tmp_path, "sft"), task=replace(task_config(tmp_path, "sft").task, kind="heights"))
        assert {trial.config.task.kind for trial in choose_trials(plugin, 1, check_rules)} == {"pretrain"}
        assert missing_task(plugin.task) == ["task=heights, which reads heights of tokens; small runs pretrain"]
    finally:
        TASKS.remove(["heights"])


@pytest.mark.long
def test_small_runs_of_each_task_equal_one_rank_and_name_the_task_if_it_is_at_fault(tmp_path: Path) -> None:
    pair = ParallelismConfig(pipeline=2, data=1, expert=1)
    kinds = ("sft", "dpo", "reward_model", "distill", "grpo")
    runs = [(replace(task_config(tmp_path, kind), parallelism=pair), NONE) for kind in kinds]
    runs += [(runs[1][0], fault) for fault in TASK_FAULTS]
    ranks = run_ranks(2, task_failures, runs, timeout_seconds=300)
    for (config, fault), first, second in zip(runs, *ranks, strict=True):
        failures = [*first, *second]
        assert bool(failures) == (fault != NONE), (config.task.kind, fault, failures)
        assert all("the task axis" in failure for failure in failures), (fault, failures)


@pytest.mark.slow
def test_faults_of_two_ranks_are_named(tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), parallelism=ParallelismConfig(pipeline=1, data=2, expert=2))
    assert_all_named(config, ["wrong device", "another seed", "gradient doubled", "average not updated", CAPPED])


@pytest.mark.long
@pytest.mark.parametrize("part", [0, 1, *exhaustive(*range(2, NUM_PARTS))])
def test_planted_faults_are_named(tmp_path: Path, part: int) -> None:
    assert_all_named(run_config(tmp_path), [NONE, *PLANTED][part::NUM_PARTS])


@pytest.mark.parametrize("part", [pytest.param(1, marks=pytest.mark.long), *exhaustive(0, *range(2, NUM_PARTS))])
def test_edits_of_a_line_of_the_sources_are_found(tmp_path: Path, part: int) -> None:
    config = run_config(tmp_path)
    optim = replace(config.optim, sharding="zero1")
    config = replace(config, optim=optim, batch=replace(config.batch, document_mask=True))
    edits = [*EDITS][part::NUM_PARTS]
    for name, outcomes in zip(edits, run_ranks(4, verify, config, edits, timeout_seconds=500)[0], strict=True):
        failures = [str(failure) for outcome in outcomes for failure in outcome.failures]
        assert re.search(EDITS[name].report, "\n".join(failures)), (name, failures)


@pytest.mark.exhaustive
def test_no_check_fails_over_forty_random_layouts(tmp_path: Path) -> None:
    for seed in range(2):
        config = replace(run_config(tmp_path), seed=seed)
        trials = choose_trials(config, 20, check_rules)
        assert sum(not trial.axis for trial in trials) == 21
        (outcomes,) = run_ranks(4, verify, config, [NONE], 20, timeout_seconds=500)[0]
        assert_named(NONE, outcomes)
