"""The ladder of small models: exact counts of its named steps, proportions of every step, values on top of them."""

from itertools import pairwise

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from launch.config.run_config import compose_run, read_config, write_config
from model.config import ModelConfig, ladder
from model.size import count_parameters
from model.transformer import BIAS, Transformer, named_tensors
from train.config.errors import ConfigError

SIZES = range(1, 25)


def chosen(*overrides: str) -> ModelConfig:
    return compose_run(overrides).model


@pytest.mark.parametrize(
    ("name", "size", "total", "active_without_embedding", "mtp"),
    [
        ("ladder_20m", 4, 22_425_408, 6_565_696, 3_630_432),
        ("ladder_100m", 7, 93_885_736, 22_779_176, 10_958_696),
        ("ladder_300m", 11, 340_561_320, 79_236_520, 27_020_488),
        ("ladder_1b", 16, 1_013_362_432, 231_124_736, 57_120_128),
    ],
)
def test_ladder_named_steps_have_these_counts(
    name: str, size: int, total: int, active_without_embedding: int, mtp: int
) -> None:
    config = chosen(f"model={name}")
    assert config == ladder(size) == chosen("model=ladder", f"model.size={size}")
    account = count_parameters(config)
    assert account.total == total
    assert account.active_without_embedding == active_without_embedding
    assert account.mtp == mtp


def test_ladder_counts_are_those_of_the_built_model() -> None:
    config = ladder(4)
    with torch.device("meta"):
        model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    account = count_parameters(config)
    built = sum(tensor.numel() for name, tensor in named_tensors(model).items() if not name.endswith(BIAS))
    assert built == account.total + account.mtp


def test_ladder_grows_from_under_a_million_to_above_a_billion() -> None:
    totals = [count_parameters(ladder(size)).total for size in SIZES]
    assert totals == sorted(set(totals))
    assert totals[0] < 1_000_000
    assert totals[-1] > 1_000_000_000
    # From 140M on fine enough that a wished size is met within a fifth.
    assert all(after / before < 1.4 for before, after in pairwise(totals[7:]))


@pytest.mark.parametrize("size", SIZES)
def test_ladder_every_step_keeps_the_proportions(size: int) -> None:
    config = ladder(size)
    assert config.qk_nope_head_dim == 2 * config.qk_rope_head_dim == config.v_head_dim
    assert config.num_heads * config.v_head_dim == 2 * config.hidden_size
    assert config.q_lora_rank is not None
    assert config.q_lora_rank < config.hidden_size
    assert config.kv_lora_rank < config.hidden_size
    together = config.num_experts_per_token + config.num_shared_experts
    assert config.dense_intermediate_size == together * config.expert_intermediate_size
    assert config.num_routed_experts % config.num_expert_groups == 0
    assert config.num_expert_groups == 2 * config.num_limited_groups
    assert config.num_experts_per_token <= config.num_limited_groups * (
        config.num_routed_experts // config.num_expert_groups
    )
    assert (config.num_shared_experts, config.mtp_depth) == (1, 1)
    assert 1 <= config.num_dense_layers < config.num_layers
    assert config.hidden_size % 32 == 0


def test_ladder_single_values_are_changed_on_top() -> None:
    config = chosen("model=ladder", "model.size=2", "+model.mtp_depth=0", "+model.q_lora_rank=null")
    assert config.mtp_depth == 0
    assert config.q_lora_rank is None
    assert config.hidden_size == ladder(2).hidden_size


def test_ladder_a_run_records_the_whole_model() -> None:
    written = write_config(compose_run(["model=ladder_100m"]))
    assert written["model"]["hidden_size"] == ladder(7).hidden_size
    assert "kind" not in written["model"]
    assert read_config(written).model == ladder(7)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model=ladder", "model.size=0"], ["model.size", "at least 1", "is 0", "nearest valid: 1"]),
        (["model=ladder", "model.size=1.5"], ["model.size", "whole number", "1.5"]),
        (["model=ladder", "~model.size"], ["model.size", "None"]),
        (["model=ladder", "model.kind=laddr"], ["model.kind", "did you mean ladder"]),
        (["model=ladder", "+model.mtp_dpth=0"], ["model.mtp_dpth: unknown key", "did you mean model.mtp_depth"]),
        (["model=ladder", "model.mtp_depth=0"], ["model.mtp_depth", "+model.mtp_depth=0"]),
        (["model=ladder", "+model.hidden_size=x"], ["model.hidden_size", "whole number", "'x'"]),
        (["model.size=3"], ["model.size", "model=ladder"]),
        (["model=of_checkpoint"], ["model: of_checkpoint", "init_from=FOLDER"]),
    ],
)
def test_ladder_sizes_that_name_no_model_are_rejected(overrides: list[str], parts: list[str]) -> None:
    with pytest.raises(ConfigError) as refused:
        chosen(*overrides)
    for part in parts:
        assert part in str(refused.value)
