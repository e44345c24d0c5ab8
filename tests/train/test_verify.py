"""Verification: every planted fault is named, and a job without faults passes."""

import re
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from comm.config import ParallelismConfig
from comm.watchdog.collective_log import CollectiveLog
from dualpipe.registry import ScheduleConfig
from launch.config.rules import check_rules
from tests.ranks import run_ranks
from tests.tiny import tiny_config
from tests.train.verify_faults import PLANTED
from train.config import TrainConfig
from train.verify.checks import Outcome, Verification, run_checks
from train.verify.layouts import choose_trials
from train.verify.run import CHECKS

NONE = "none"


def run_config(folder: Path) -> TrainConfig:
    return tiny_config(
        folder,
        parallelism=ParallelismConfig(pipeline=2, data=2, expert=2),
        schedule=ScheduleConfig(kind="dualpipe_split", chunks=None, pairing="overlapped"),
    )


def verify(rank: int, world_size: int, config: TrainConfig, faults: list[str]) -> list[list[Outcome]]:
    """Returns the outcomes of a verification with each fault in turn; `none` is no fault."""
    trials = choose_trials(config, 0, check_rules)
    outcomes = []
    for fault in faults:
        with ExitStack() as stack:
            if fault != NONE:
                PLANTED[fault].plant(rank, stack)
            folder = Path(config.out_dir)
            log = CollectiveLog()
            device = torch.device("cpu")
            verification = Verification(config=config, device=device, log=log, trials=trials, folder=folder)
            outcomes.append(list(run_checks(CHECKS, verification)))
    return outcomes


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


@pytest.mark.slow
def test_faults_of_two_ranks_are_named(tmp_path: Path) -> None:
    config = replace(run_config(tmp_path), parallelism=ParallelismConfig(pipeline=1, data=2, expert=2))
    assert_all_named(config, ["wrong device", "another seed", "gradient doubled"])


@pytest.mark.long
def test_planted_faults_are_named(tmp_path: Path) -> None:
    assert_all_named(run_config(tmp_path), [NONE, *PLANTED])
