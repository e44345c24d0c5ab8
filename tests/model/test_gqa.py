"""Grouped-query attention against transformers' Qwen3, and decoding from its cache against whole passes."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RotaryEmbedding

from base.refusal import ConfigError
from launch.config.rules import check_model, check_rules
from model.attention.gqa import GroupedAttention
from model.config import Computing, GqaConfig
from model.norm import RmsNorm
from model.transformer import build_linears
from tests.tiny import GQA, tiny_config

WIDE = replace(GQA, num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize("config", [GQA, WIDE])
def test_a_layer_equals_that_of_transformers(config: GqaConfig) -> None:
    torch.manual_seed(0)
    layer = GroupedAttention(config, torch.float64, "auto", build_linears(Computing()))
    theirs_config = Qwen3Config(
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        attn_implementation="eager",
    )
    theirs = Qwen3Attention(theirs_config, 0).double()
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    theirs.load_state_dict(layer.state_dict())
    norm = RmsNorm(config.hidden_size, config.norm_eps, torch.float64)
    x_BTD = torch.randn(2, 9, config.hidden_size, dtype=torch.float64)
    positions = torch.arange(9)[None]
    turns = tuple(each.double() for each in Qwen3RotaryEmbedding(theirs_config)(x_BTD, positions))
    future = torch.full((9, 9), -torch.inf, dtype=torch.float64).triu(1)[None, None]
    expected = x_BTD + theirs(norm(x_BTD), turns, future)[0]
    # Their cos and sin are of float32.
    torch.testing.assert_close(layer(x_BTD, norm, None), expected, rtol=1e-5, atol=1e-4)


def test_what_it_does_not_support_is_refused(tmp_path: object) -> None:
    config = tiny_config(tmp_path, model=GQA)  # type: ignore[arg-type]
    check_rules(config)
    with pytest.raises(ConfigError, match=r"^schedule\.slices: must be 1 with model\.attention=gqa"):
        check_rules(replace(config, schedule=replace(config.schedule, slices=2)))
    with pytest.raises(ConfigError, match=r"^model\.num_kv_heads: must divide model\.num_heads=2"):
        check_model(replace(GQA, num_kv_heads=3))
