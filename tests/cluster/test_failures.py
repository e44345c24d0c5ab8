"""A run whose rank is killed, stopped or disconnected ends in time, and all other ranks name it."""

from pathlib import Path

import pytest

from tests.cluster.failures import run_cases
from tests.cluster.namespaces import missing
from tests.train.faults import CASES, DEADLINE_SECONDS, GRACE_SECONDS, WORLD_SIZE, Case, Outcome, read_reports

pytestmark = pytest.mark.long

EXHAUSTIVE = ("exchange of counts", "combine", "backward", "validation", "gathering of weights", "optimizer step")
"""Phases whose kinds of operations other cases have; but a rank is stopped in a backward pass."""
ALL = [
    pytest.param(case, marks=pytest.mark.exhaustive)
    if case.phase in EXHAUSTIVE and (case.how, case.phase) != ("stopped", "backward")
    else case
    for case in CASES
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest, folder: Path) -> dict[Case, Outcome]:
    """Runs all chosen cases that are possible at once, because most of them mostly wait."""
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    sample = {case for case in ALL if isinstance(case, Case)}
    chosen = {item.callspec.params["case"] for item in items} or sample
    cases = [case for case in CASES if case in chosen and (case.how != "disconnected" or missing() is None)]
    return {outcome.case: outcome for outcome in run_cases(cases, folder)}


def _outcome(case: Case, outcomes: dict[Case, Outcome]) -> Outcome:
    if case not in outcomes:
        pytest.skip(str(missing()))
    return outcomes[case]


@pytest.mark.parametrize("case", ALL, ids=str)
def test_run_that_loses_a_rank_ends_in_time_with_one_message_of_all(
    case: Case, outcomes: dict[Case, Outcome], folder: Path
) -> None:
    outcome = _outcome(case, outcomes)
    assert outcome.ended, outcome
    assert outcome.seconds <= DEADLINE_SECONDS + GRACE_SECONDS, outcome
    reports = {rank: word for rank, word in read_reports(folder / str(case)).items() if rank != case.rank}
    assert set(reports.values()) == {(outcome.text, outcome.exit_code)}
    others = set(range(WORLD_SIZE)) - {case.rank}
    # The launcher ends all ranks when one dies, including those that have not joined yet.
    assert set(reports) <= others if case.name == "start of the job" else set(reports) == others


def test_run_that_loses_a_rank_names_it_and_the_collective(outcomes: dict[Case, Outcome]) -> None:
    wrong = [outcome for outcome in outcomes.values() if not outcome.is_right]
    assert len(wrong) <= 1, wrong
