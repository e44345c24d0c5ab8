"""The configuration of policy gradients: values of the loss that have no effect next to others are refused."""

from dataclasses import replace
from pathlib import Path

import pytest

from model.objectives.policy_loss import PolicyLossConfig
from tests.answers import GRPO, VARIANTS
from tests.train.tasks.test_policy_gradient import run_config
from train.config.errors import ConfigError
from train.tasks.grpo import GrpoConfig
from train.tasks.registry import TASKS

WEIGHTED = VARIANTS["cispo"]


@pytest.mark.parametrize(
    ("form", "rule"),
    [
        (replace(GRPO, kl_weight=0.1), "task.loss.kl_weight: must be 0 with task.loss.kl=none, is 0.1"),
        (replace(WEIGHTED, clip_low=0.2), "task.loss.clip_low: must be null with task.loss.surrogate=weighted"),
        (replace(WEIGHTED, clip_high=0.2), "task.loss.clip_high: must be null with task.loss.surrogate=weighted"),
        (replace(GRPO, largest_ratio=1.1), "task.loss.largest_ratio: must be 1.2 or above"),
        (replace(WEIGHTED, largest_ratio=0.5), "task.loss.largest_ratio: must be 1 or above"),
    ],
)
def test_loss_with_a_value_without_effect_is_refused(tmp_path: Path, form: PolicyLossConfig, rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        TASKS.get("grpo").check(run_config(tmp_path, form))


def test_every_variant_is_valid_and_says_whether_it_has_a_reference(tmp_path: Path) -> None:
    has_reference = []
    for name, form in VARIANTS.items():
        config = run_config(tmp_path, form)
        TASKS.get("grpo").check(config)
        assert isinstance(config.task, GrpoConfig)
        assert config.task.advantage == form.advantage
        if TASKS.get("grpo").has_reference(config.task):
            has_reference.append(name)
    assert has_reference == ["grpo", "r1", "v3", "v3_2"]
