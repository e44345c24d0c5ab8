"""Counts against the released checkpoint's own, and against a built model."""

from dataclasses import replace

import pytest
import torch

from comm.dispatch.local import LocalDispatcher
from launch.config.run_config import compose_run
from model.config import ModelConfig
from model.size import count_parameters, training_flops_per_token
from model.transformer import BIAS, Transformer, named_tensors, whole
from tests.tiny import MODEL


def preset(name: str) -> ModelConfig:
    return compose_run([f"model={name}"]).model


def test_account_v3_equals_released_counts() -> None:
    account = count_parameters(preset("v3_671b"))
    assert account.total == 671_026_404_352
    assert account.active == 37_552_282_624
    assert account.active_without_embedding == 36_625_603_584
    assert account.attention == 187_107_328
    assert account.expert == 44_040_192
    assert account.mtp == 11_610_067_968


@pytest.mark.parametrize(
    ("name", "total", "active", "active_without_embedding", "attention", "expert"),
    [
        ("v2_lite_16b", 15_706_484_224, 2_661_150_208, 2_451_435_008, 13_763_072, 8_650_752),
        ("moonlight_16b", 15_960_108_544, 2_914_774_528, 2_579_230_208, 13_763_072, 8_650_752),
        ("v2_236b", 235_741_434_880, 21_375_800_320, 20_851_512_320, 149_227_520, 23_592_960),
    ],
)
def test_account_other_presets_equal_released_counts(
    name: str, total: int, active: int, active_without_embedding: int, attention: int, expert: int
) -> None:
    account = count_parameters(preset(name))
    assert account.total == total
    assert account.active == active
    assert account.active_without_embedding == active_without_embedding
    assert account.attention == attention
    assert account.expert == expert


def test_account_of_the_tiny_hugging_face_configuration() -> None:
    config = replace(
        preset("quickstart"),
        vocab_size=4096,
        hidden_size=256,
        num_layers=6,
        num_dense_layers=1,
        expert_intermediate_size=128,
        dense_intermediate_size=512,
    )
    account = count_parameters(config)
    assert account.total == 11_546_816
    assert account.active == 5_648_576
    assert account.active_without_embedding == 4_600_000
    assert account.attention == 112_800
    assert account.expert == 98_304
    assert account.mtp == 1_920_416


def test_account_v3_flops_match_the_reported_rate() -> None:
    # 250 GFLOP a token at 4K, which with the reported speed gives 386 TFLOP/s on a GPU.
    assert training_flops_per_token(preset("v3_671b"), 4096) == pytest.approx(250e9, rel=0.005)


@pytest.mark.parametrize(
    "config",
    [
        MODEL,
        replace(MODEL, q_lora_rank=None, num_shared_experts=2),
        replace(MODEL, mtp_depth=3, num_dense_layers=0),
        replace(MODEL, mtp_depth=0, num_shared_experts=0),
    ],
)
def test_account_equals_built_model(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.float32)
    named = {name: tensor.numel() for name, tensor in named_tensors(model).items() if not name.endswith(BIAS)}
    mtp_prefixes = tuple(f"model.layers.{config.num_layers + depth}." for depth in range(config.mtp_depth))
    mtp = sum(count for name, count in named.items() if mtp_prefixes and name.startswith(mtp_prefixes))
    account = count_parameters(config)
    assert account.mtp == mtp
    assert account.total == sum(named.values()) - mtp


def test_names_of_v3_are_the_released_ones() -> None:
    config = preset("v3_671b")
    with torch.device("meta"):
        model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.bfloat16, whole(config))
    named = named_tensors(model)
    # The file stores embedding and head again for the MTP layer, and scales for each of 45,808 FP8 weights.
    assert len(named) + 2 + 45_808 == 91_991
    assert named["model.layers.60.mlp.experts.255.down_proj.weight"].shape == (7168, 2048)
    assert named["model.layers.61.eh_proj.weight"].shape == (7168, 14336)
    assert named["model.layers.3.self_attn.kv_a_proj_with_mqa.weight"].shape == (576, 7168)
