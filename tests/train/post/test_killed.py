"""A rank is killed in each phase of a step: the run restarts and ends as if nothing had happened."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from model.transformer import named_tensors
from tests.commands import run_command
from tests.train.post.killed_run import NONE, PHASES
from train.checkpoint.load import load_whole
from train.checkpoint.locate import step_folder
from train.checkpoint.manifest import read_model
from train.post.journal import FOLDER_NAME, read_journal
from train.post.sample import ScoredRollout

pytestmark = pytest.mark.long
STEPS = 5
FEW = ("training", "ahead-sampling", "updates-journal")
"""Before, while and after a rollout is written, each in a variant of a step."""
OTHERS = (*(phase for phase in PHASES if phase not in FEW), "ahead-update", "updates-training")
CALM = (NONE, "ahead-none", "updates-none")


@pytest.fixture(scope="module")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Makes the runs that the chosen tests of this module need, by one command."""
    made = tmp_path_factory.mktemp("killed")
    items = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    chosen = {item.callspec.params.get("phase") for item in items}
    phases = [phase for phase in (*FEW, *OTHERS) if phase in chosen]
    done = run_command(["-m", "tests.train.post.killed_run", str(made), *CALM, *phases])
    assert done.returncode == 0, done.stdout + done.stderr
    return made


def rollouts(run: Path) -> list[ScoredRollout]:
    """Returns the rollouts of a run without the times that they took."""
    paths = sorted((run / FOLDER_NAME).glob("*.jsonl"))
    found = [read_journal(run, int(path.stem[5:])) for path in paths]
    return [replace(each, header=replace(each.header, seconds={})) for each in found]


def records(run: Path) -> list[tuple[float, ...]]:
    """Returns what is equal in two runs of a step's records."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    names = ("step", "loss", "grad_norm", "kl", "entropy", "lr")
    return [(*(line[name] for name in names), line["rollouts"]["reward"]) for line in lines]


@pytest.mark.parametrize("phase", [*FEW, *(pytest.param(phase, marks=pytest.mark.exhaustive) for phase in OTHERS)])
def test_run_killed_in_a_phase_ends_bitwise_as_if_it_was_not(folder: Path, phase: str) -> None:
    variant, _, _ = phase.rpartition("-")
    run, calm = folder / phase, folder / (f"{variant}-{NONE}" if variant else NONE)
    assert (run / "killed").exists(), "the phase was not reached"
    assert rollouts(run) == rollouts(calm)
    assert records(run) == records(calm)
    ends = [step_folder(each, STEPS) for each in (run, calm)]
    ours, theirs = (named_tensors(load_whole(read_model(end), end, torch.float32)) for end in ends)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("calm", CALM)
def test_run_uses_every_prompt_once(folder: Path, calm: str) -> None:
    positions = Counter(group.number for rollout in rollouts(folder / calm) for group in rollout.groups)
    assert sorted(positions) == list(range(len(positions)))
    assert set(positions.values()) == {1}


def test_time_of_a_step_has_the_parts_of_its_rollout(folder: Path) -> None:
    for variant, samples in ((NONE, [True] * STEPS), ("updates-none", [step % 2 == 0 for step in range(STEPS)])):
        lines = [json.loads(line) for line in (folder / variant / "metrics.jsonl").read_text().splitlines()]
        assert [line["step_time"]["sampling_seconds"] > 0 for line in lines] == samples
        assert [line["step_time"]["scoring_seconds"] > 0 for line in lines] == samples
        for line in lines:
            parts = sum(line["step_time"].values()) - line["step_time"]["saving_seconds"]
            assert parts == pytest.approx(line["step_seconds"], rel=0.02)
