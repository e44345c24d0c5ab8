"""Rollouts in the plan: laws of their figures, and the plan of a real run against its journals."""

import json
from pathlib import Path

import pytest

from base.refusal import ConfigError
from dualpipe.builder import decode
from dualpipe.costs import CostModel, StageCosts
from dualpipe.registry import SCHEDULES
from dualpipe.simulation import makespan_of
from infer.cohorts import CohortSizes
from launch.plan import main
from planner.job_plan import require_time
from planner.rollouts import RolloutPlan, plan_rollouts
from tests.commands import run_command
from tests.planner.planned import plan_of, request_of
from tests.refusals import assert_refused
from train.predict.layer_times import LayerTimes
from train.predict.measured import TimesScope
from train.predict.timing import MeasuredRates, RolloutRates
from train.report.plan_comparison import read_sampled

GRPO = ("experiment=arithmetic_grpo", "init_from=random", "cluster=h800", "precision=bf16", "plan.check=false")
RUN = (
    "experiment=arithmetic_grpo",
    "init_from=random",
    "task.steps=2",
    "validation.every_steps=0",
    "rollout.max_new_tokens=6",
)


def rollouts_of(*overrides: str) -> RolloutPlan:
    plan = plan_of(*GRPO, *overrides)
    assert plan.rollouts is not None
    return plan.rollouts


def test_more_and_longer_answers_change_the_figures() -> None:
    base = rollouts_of()
    more = rollouts_of("rollout.samples=64")
    longer = rollouts_of("rollout.max_new_tokens=100")
    assert more.answers == 8 * base.answers
    assert more.batches > base.batches
    assert base.sampling_seconds is not None
    assert more.sampling_seconds is not None
    assert longer.sampling_seconds is not None
    assert more.sampling_seconds > base.sampling_seconds
    assert longer.sampling_seconds > 4 * base.sampling_seconds
    assert longer.cache_bytes == base.cache_bytes
    time = require_time(plan_of(*GRPO)).time
    passes = require_time(plan_of(*GRPO)).simulation.makespan + base.reference_seconds
    assert time.without_factor == pytest.approx(base.batches * passes + base.sampling_seconds + time.optimizer)


def test_lengths_follow_the_distribution() -> None:
    lengths = "plan.answer_tokens={median: 20, sigma: 0.5}"
    plan = rollouts_of("rollout.max_new_tokens=100", "rollout.samples=64", lengths)
    assert plan.mean_tokens == pytest.approx(20 * 2.718281828 ** (0.5**2 / 2), rel=0.1)
    assert plan.most_tokens <= 100
    assert plan.rows_per_visit < rollouts_of("rollout.max_new_tokens=100", "rollout.samples=64").rows_per_visit


@pytest.mark.parametrize(("kind", "ranks", "samples"), [("dualpipe", 4, 300), ("dualpipe", 4, 8), ("1f1b", 2, 200)])
def test_seconds_are_those_of_the_simulated_program(kind: str, ranks: int, samples: int) -> None:
    """A round is as long as a cohort's way or the busiest rank's visits, here of stages that take one second."""
    placement = SCHEDULES.get(kind).placement(ranks, 1)
    request = request_of(*GRPO, f"schedule={kind}", f"parallelism.pipeline={ranks}", "model.num_layers=4",
                         f"rollout.samples={samples}", "batch.micro_sequences=1")  # fmt: skip
    rates = RolloutRates(visit_seconds=float(ranks), token_seconds=0.0, tokens_per_pass=1.0, prompts=())
    planned = plan_of(*GRPO, f"schedule={kind}", f"parallelism.pipeline={ranks}", "model.num_layers=4",
                      f"rollout.samples={samples}", "batch.micro_sequences=1")  # fmt: skip
    timed = require_time(planned)
    part = request.planner.rates.part_seconds(planned.config).moe
    measured = MeasuredRates(
        kind="measured",
        scope=TimesScope(precision="bf16", layer_parameters=1, expert=1, tokens=1),
        times=LayerTimes(dense=part, moe=part, embedding=part, head=part, mtp=part, latency_seconds=0.0),
        alone=1.0,
        optimizer_seconds=0.0,
        sources=(),
        rollouts=rates,
    )  # fmt: skip
    found = plan_rollouts(planned.config, measured, timed)
    assert found is not None
    sizes = CohortSizes.within(planned.config.batch.micro_sequences * planned.config.rank_sequence_tokens)
    cohorts = sizes.num_cohorts(placement, -(-8 // len(placement)) * samples)
    assert found.cohorts == cohorts
    stage = StageCosts(forward=1.0, backward_input=0.0, backward_weight=0.0, forward_exchange=0.0,
                       backward_exchange=0.0, activation=1.0)  # fmt: skip
    program = decode(placement, cohorts, found.rounds)
    simulated = makespan_of(program, CostModel(stages=(stage,) * ranks, latency=0.0))
    assert found.sampling_seconds == pytest.approx(simulated, rel=0.1)


def test_lengths_without_rollouts_are_refused() -> None:
    message = ["plan.answer_tokens: must be null with task=pretrain"]
    assert_refused(
        ConfigError, message, lambda: main(["experiment=quickstart", "plan.answer_tokens={median: 9, sigma: 1}"])
    )


PLUGIN = """
import sys
import time
from train.optim.learning_rate import LR_SCHEDULES, RateSchedule, RateSpec

if "torch" in sys.modules:  # in ranks
    from infer.engines.pipelined import CohortRun

    def run_slowly(run, phase, forward=CohortRun.forward):
        began = time.perf_counter()
        forward(run, phase)
        time.sleep(max(0.0, began + 0.2 - time.perf_counter()))

    CohortRun.forward = run_slowly

LR_SCHEDULES.register("rests", RateSpec(summary="registers", config=RateSchedule, rate=lambda *values: 0.0))
"""


@pytest.mark.long
def test_plan_of_a_run_is_what_its_journals_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Rounds and rows of every journal exactly; the time of a run with other rollouts from the rates of the first.

    Stages that decode take at least 200 ms, so that a busy machine hardly changes the time.
    """
    (tmp_path / "rests.py").write_text(PLUGIN)
    others = ("rollout.samples=40",)  # two cohorts of each direction in place of one
    for name, more in (("one", ()), ("two", others)):
        done = run_command(["-m", "launch.train", *RUN, *more, f"plugins=[{tmp_path / 'rests.py'}]",
                            f"out_dir={tmp_path / name}", f"data.cache_dir={tmp_path}"])  # fmt: skip
        assert done.returncode == 0, done.stderr
    for name, more in (("one", ()), ("two", others)):
        compared = planned(capsys, f"run={tmp_path / name}")["compared"]
        for key in ("rounds", "rows_per_visit"):
            assert compared[key]["predicted"] == pytest.approx(compared[key]["measured"], rel=1e-12), key
        assert compared["sampling_seconds"]["factor"] == pytest.approx(1, rel=0.2)
        rollouts = planned(capsys, *RUN, *more, f"rates={tmp_path / 'one'}")["rollouts"]
        config = request_of(*RUN, *more).config
        measured = sorted(rollout.seconds for rollout in read_sampled(tmp_path / name, config))
        assert rollouts["sampling_seconds"] == pytest.approx(measured[len(measured) // 2], rel=0.2)


def planned(capsys: pytest.CaptureFixture[str], *overrides: str) -> dict[str, dict[str, dict[str, float]]]:
    assert main([*overrides, "format=json"]) == 0
    values: dict[str, dict[str, dict[str, float]]] = json.loads(capsys.readouterr().out)
    return values
