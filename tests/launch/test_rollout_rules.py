"""Rules of rewards that need models, each refused in one line before a run starts."""

from pathlib import Path

import pytest

from infer.scoring.score import ScoringError
from launch.config.rules import check_rules
from launch.config.run_config import check, compose_run
from tests.launch.test_config import place_weights
from train.checkpoint.manifest import CheckpointError
from train.config.errors import ConfigError

JUDGE = ("experiment=arithmetic_self_reward", "init_from=random", "reward=judge", "reward.parts.0.max_new_tokens=16")
PLACE = "reward.parts, kind judge: "


@pytest.mark.parametrize(
    ("overrides", "rule"),
    [
        (["reward.parts.0.weights=reference"], "weights must be policy if the run has no reference, is reference"),
        (["reward.parts.0.max_new_tokens=4096"], "max_new_tokens must be below model.max_position_tokens="),
        (["reward.parts.0.thinking=true"], "thinking must be false with data.template=v3, which has no thoughts"),
    ],
)
def test_a_judge_that_the_run_cannot_have_is_refused(overrides: list[str], rule: str) -> None:
    check_rules(compose_run(JUDGE))
    with pytest.raises(ConfigError, match=f"{PLACE}{rule}"):
        check_rules(compose_run([*JUDGE, *overrides]))


def test_a_judge_may_be_the_reference_of_the_divergence() -> None:
    divergence = ("task.loss.kl=forward", "task.loss.kl_weight=0.04")
    check_rules(compose_run([*JUDGE, *divergence, "reward.parts.0.weights=reference"]))
    check_rules(compose_run([*JUDGE, "rollout.limits.kl=0.2", "reward.parts.0.weights=reference"]))


def test_a_local_engine_is_accepted_without_its_routes() -> None:
    local = ("experiment=arithmetic_self_reward", "rollout.engine=local")
    check_rules(compose_run(local))
    with pytest.raises(ConfigError, match=r"rollout\.keep_routing: must be false with rollout\.engine=local"):
        check_rules(compose_run([*local, "rollout.keep_routing=true"]))


def test_files_of_a_reward_are_checked_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ScoringError, match="constitution_path must be a text file"):
        check(compose_run([*JUDGE, f"reward.parts.0.constitution_path={tmp_path / 'none.txt'}"]))
    scored = ("experiment=arithmetic_self_reward", "init_from=random", "reward=reward_model")
    with pytest.raises(CheckpointError, match="kind reward_model: ckpt"):
        check(compose_run([*scored, f"reward.parts.0.ckpt={tmp_path / 'none'}"]))
    weights = place_weights(tmp_path / "weights")
    with pytest.raises(ConfigError, match="must be a reward model, which has a head for scores"):
        check(compose_run([*scored, f"reward.parts.0.ckpt={weights}"]))
