"""Steps that learn from rewards: many ranks equal one, and rollouts do not depend on the layout."""

from dataclasses import replace
from pathlib import Path

import pytest

from infer.protocol import Group
from tests.answers import VARIANTS as VARIANTS_OF_LOSS
from tests.ranks import run_ranks
from tests.rollouts import GRPO, LOSS, REWARD, ROLLOUT, EvenConfig, rollout_config
from tests.train.job import Job, Seen, run_jobs, task_of
from tests.train.test_equality import assert_equal
from train.config import TrainConfig
from train.post.journal import read_journal
from train.post.statistics import has_equal_rewards

STEPS = 3
VARIANTS = {
    "plain": {},
    "two_updates": {"rollout": replace(ROLLOUT, updates=2)},
    "one_ahead": {"rollout": replace(ROLLOUT, steps_ahead=1)},
    "sequence": {
        "task": replace(
            GRPO,
            loss=replace(LOSS, ratio="sequence_mean", normalizer="answers", off_policy_limit=0.1),
            reference_every_steps=2,
        ),
    },
}
LAYOUTS = [
    (2, 1, 1),
    pytest.param((1, 2, 1), marks=pytest.mark.long),
    pytest.param((2, 2, 2), marks=pytest.mark.long),
    pytest.param((4, 1, 1), marks=pytest.mark.long),
]


def tokens_of(groups: tuple[Group, ...]) -> list[object]:
    """Returns what must not depend on a layout."""
    return [
        (group.number, group.key, group.tokens, group.dropped, answer.tokens, answer.reward, answer.version)
        for group in groups
        for answer in group.answers
    ]


def journals(config: TrainConfig) -> list[list[object]]:
    """Returns the rollouts of a run, in order."""
    paths = sorted((Path(config.out_dir) / "rollouts").glob("*.jsonl"))
    assert paths
    return [tokens_of(read_journal(Path(config.out_dir), int(path.name[5:13])).groups) for path in paths]


def jobs(folder: Path, layout: tuple[int, int, int], layers: int) -> list[Job]:
    """Returns the run of each variant with a layout; all have the same model."""
    made = []
    for name, changes in VARIANTS.items():
        config = rollout_config(folder, *layout, **changes)
        model = replace(config.model, num_layers=layers)
        out_dir = folder / f"{name}-{'x'.join(map(str, layout))}"
        made.append(Job(config=replace(config, model=model, out_dir=str(out_dir))))
    return made


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Job], list[list[Seen]]]:
    """One rank's results of each variant."""
    folder = tmp_path_factory.mktemp("policy")
    made = jobs(folder, (1, 1, 1), layers=4)
    (seen,) = run_ranks(1, run_jobs, made, STEPS)
    return folder, made, seen


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_policy_of_many_ranks_is_that_of_one(
    layout: tuple[int, int, int], one_rank: tuple[Path, list[Job], list[list[Seen]]]
) -> None:
    folder, alone, expected = one_rank
    made = jobs(folder, layout, layers=4)
    results = run_ranks(layout[0] * layout[1], run_jobs, made, STEPS)
    for number, (job, before) in enumerate(zip(made, alone, strict=True)):
        assert journals(job.config) == journals(before.config), job.config.out_dir
        for step in range(STEPS):
            assert_equal([rank[number][step] for rank in results], expected[number][step], 1e-9)
        assert job.config.rollout is not None
        if job.config.rollout.steps_ahead:
            continue  # its ratios compare with the sampler, which rounds otherwise
        names = task_of(job.config).names
        for rank in results:
            reported = dict(zip(names, rank[number][0].losses, strict=False))
            ratios = (reported["ratio_deviation"], reported["clip_fraction"])
            assert ratios == (0.0, 0.0), f"{job.config.out_dir}: ratios must be exactly 1"


SPARSE = replace(REWARD, parts=(EvenConfig(kind="sparse", weight=1.0),))
FEW_GROUPS = replace(ROLLOUT, prompts=8, samples=3, held_out=0)
UPDATES = {"gspo": 2}
"""Updates per rollout of variants that have several."""


def sparse_jobs(folder: Path, *, drops: bool) -> list[Job]:
    """Returns a run of each published variant in which three of four groups have equal rewards."""
    made = []
    for name, form in VARIANTS_OF_LOSS.items():
        rollout = replace(FEW_GROUPS, drop_equal_groups=drops, updates=UPDATES.get(name, 1))
        changes = {"task": replace(GRPO, loss=form), "rollout": rollout, "reward": SPARSE}
        config = rollout_config(folder, **changes)
        model = replace(config.model, mtp_depth=0)
        made.append(Job(config=replace(config, model=model, out_dir=str(folder / f"{name}-{drops}"))))
    return made


@pytest.mark.slow
def test_dropped_groups_of_equal_rewards_leave_the_gradient_as_it_is_except_with_dapo(tmp_path: Path) -> None:
    whole, dropped = sparse_jobs(tmp_path, drops=False), sparse_jobs(tmp_path, drops=True)
    (seen,) = run_ranks(1, run_jobs, [*whole, *dropped], 1)
    for name, job, (before,), (after,) in zip(
        VARIANTS_OF_LOSS, dropped, seen[: len(whole)], seen[len(whole) :], strict=True
    ):
        groups = read_journal(Path(job.config.out_dir), 1).groups
        assert sum(map(has_equal_rewards, groups)) == 6, f"{name}: of 8 groups"
        assert before.norm > 0, name
        if name == "dapo":
            assert after.norm > 1.5 * before.norm
            continue
        # Reported means are those of the trained tokens.
        main_loss = [replace(each, losses=each.losses[:1]) for each in (after, before)]
        assert_equal([main_loss[0]], main_loss[1], 1e-12)
