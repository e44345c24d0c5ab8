"""Tests of the rules of the optimizer's configuration."""

from importlib.machinery import ModuleSpec

import pytest

import launch.config.model_rules
from launch.config.model_rules import check_optim
from tests.launch.test_config import build
from train.config.errors import ConfigError


def find_all_but_deepspeed(name: str) -> ModuleSpec | None:
    """Returns a spec for every package but one."""
    return None if name == "deepspeed" else ModuleSpec(name, None)


@pytest.mark.parametrize(("precision", "nearest"), [("float32", "optim.sharding=replicated, or "), ("bf16", "")])
def test_zero1_without_deepspeed_is_rejected_before_any_rank_starts(
    precision: str, nearest: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch.config.model_rules, "find_spec", find_all_but_deepspeed)
    with pytest.raises(ConfigError) as refused:
        check_optim(build(f"precision={precision}"))
    assert str(refused.value) == (
        "optim.sharding: zero1 needs the package deepspeed, which is not installed; nearest valid: "
        f"{nearest}pip install ."
    )


def test_replicated_optimizer_needs_no_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch.config.model_rules, "find_spec", find_all_but_deepspeed)
    check_optim(build("precision=float32", "optim.sharding=replicated"))
