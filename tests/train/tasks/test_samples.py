"""Tests that tasks reject sources whose samples lack a value that they read, before anything starts."""

import pytest

from launch.config.run_config import check, compose_run
from train.config.errors import ConfigError


@pytest.mark.parametrize("task", ["dpo", "reward_model"])
def test_task_on_pairs_rejects_demonstrations(task: str) -> None:
    given = ["experiment=arithmetic_sft", f"task={task}", "init_from=random", "data.form=preferences"]
    check(compose_run([*given, "model.mtp_depth=0"]))
    with pytest.raises(
        ConfigError,
        match=rf"^data\.kind: must be a source whose samples have the value (pair|score) for task\.kind={task}, is ",
    ):
        check(compose_run([*given[:3], "data.form=demonstrations"]))
