"""Names, shapes and types of a released checkpoint: the exact counts, and agreement with the network itself."""

from collections import Counter
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import yaml

from comm.dispatch.local import LocalDispatcher
from model.config import ModelConfig
from model.hf.names import BIAS_SUFFIX, Stored, copied_from, is_quantized, scale_name, stored_tensors, weights
from model.size import count_parameters
from model.transformer import Transformer, named_tensors
from tests.test_floors import ROOT
from tests.tiny import MODEL
from train.config.decode import decode

GENERAL = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def preset(name: str) -> ModelConfig:
    keys = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
    return decode(ModelConfig, {**keys, "head": "tokens"})


@cache
def released_tensors() -> dict[str, Stored]:
    """Returns the tensors of DeepSeek-V3's released checkpoint."""
    return stored_tensors(preset("v3_671b"), dtype="BF16", fp8=True)


def test_the_released_file_has_exactly_these_tensors() -> None:
    stored = released_tensors()
    assert len(stored) == 91_991
    assert sum(tensor.num_elements for tensor in stored.values()) == 684_531_386_000
    kinds = Counter(tensor.dtype for tensor in stored.values())
    assert kinds == {"F8_E4M3": 45_808, "F32": 45_808 + 59, "BF16": 375 - 59}
    in_fp8 = {name: tensor for name, tensor in stored.items() if tensor.dtype == "F8_E4M3"}
    assert sum(tensor.num_elements for tensor in in_fp8.values()) == 680_571_043_840
    scales = sum(stored[scale_name(name)].num_elements for name in in_fp8)
    assert scales == 41_540_496
    copies = sum(tensor.num_elements for name, tensor in stored.items() if copied_from(name))
    biases = sum(tensor.num_elements for name, tensor in stored.items() if name.endswith(BIAS_SUFFIX))
    account = count_parameters(preset("v3_671b"))
    assert account.total + account.mtp + copies + biases + scales == 684_531_386_000


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.embed_tokens.weight", Stored((129280, 7168), "BF16")),
        ("lm_head.weight", Stored((129280, 7168), "BF16")),
        ("model.norm.weight", Stored((7168,), "BF16")),
        ("model.layers.0.mlp.down_proj.weight", Stored((7168, 18432), "F8_E4M3")),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", Stored((576, 7168), "F8_E4M3")),
        ("model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv", Stored((5, 56), "F32")),
        ("model.layers.3.self_attn.q_b_proj.weight", Stored((24576, 1536), "F8_E4M3")),
        ("model.layers.3.self_attn.q_a_layernorm.weight", Stored((1536,), "BF16")),
        ("model.layers.60.self_attn.kv_b_proj.weight", Stored((32768, 512), "F8_E4M3")),
        ("model.layers.60.mlp.gate.weight", Stored((256, 7168), "BF16")),
        ("model.layers.60.mlp.gate.e_score_correction_bias", Stored((256,), "F32")),
        ("model.layers.60.mlp.experts.255.gate_proj.weight", Stored((2048, 7168), "F8_E4M3")),
        ("model.layers.60.mlp.experts.255.down_proj.weight_scale_inv", Stored((56, 16), "F32")),
        ("model.layers.61.mlp.shared_experts.up_proj.weight", Stored((2048, 7168), "F8_E4M3")),
        ("model.layers.61.eh_proj.weight", Stored((7168, 14336), "BF16")),
        ("model.layers.61.enorm.weight", Stored((7168,), "BF16")),
        ("model.layers.61.hnorm.weight", Stored((7168,), "BF16")),
        ("model.layers.61.shared_head.norm.weight", Stored((7168,), "BF16")),
        ("model.layers.61.shared_head.head.weight", Stored((129280, 7168), "BF16")),
        ("model.layers.61.embed_tokens.weight", Stored((129280, 7168), "BF16")),
    ],
)
def test_a_tensor_of_the_released_file_is_as_it_is_there(name: str, expected: Stored) -> None:
    assert released_tensors()[name] == expected


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"num_shared_experts": 3},
        {"num_shared_experts": 0},
        {"mtp_depth": 0},
        {"mtp_depth": 3},
        {"num_dense_layers": 0},
        {"num_dense_layers": 4},
    ],
    ids=str,
)
def test_the_network_has_exactly_these_tensors(changes: dict[str, Any]) -> None:
    assert_the_network_agrees(replace(MODEL, **changes))


def test_the_network_of_671b_has_exactly_these_tensors() -> None:
    assert_the_network_agrees(preset("v3_671b"))


def assert_the_network_agrees(config: ModelConfig) -> None:
    with torch.device("meta"):
        model = Transformer(config, LocalDispatcher(config.num_routed_experts), torch.bfloat16)
    made = {name: tuple(tensor.shape) for name, tensor in named_tensors(model).items()}
    expected = {name: shape for name, shape in weights(config) if not copied_from(name) and 0 not in shape}
    assert made == expected
    stored = stored_tensors(config, dtype="BF16", fp8=False)
    words = {torch.bfloat16: "BF16", torch.float32: "F32"}
    for name, tensor in named_tensors(model).items():
        assert stored[name] == Stored(tuple(tensor.shape), words[tensor.dtype]), name  # type: ignore[arg-type]


def test_what_is_kept_out_of_fp8_is_what_the_report_keeps() -> None:
    kept = {name.split(".", 3)[-1] for name, _ in weights(MODEL) if not is_quantized(name) and name not in GENERAL}
    assert kept == {
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        "self_attn.q_a_layernorm.weight",
        "self_attn.kv_a_layernorm.weight",
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
        "enorm.weight",
        "hnorm.weight",
        "eh_proj.weight",
        "embed_tokens.weight",
        "shared_head.norm.weight",
        "shared_head.head.weight",
    }


def test_scales_follow_their_weight_and_nothing_without_elements_is_in_fp8() -> None:
    stored = stored_tensors(replace(MODEL, num_shared_experts=0), dtype="F32", fp8=True)
    names = list(stored)
    for name, tensor in stored.items():
        if tensor.dtype == "F8_E4M3":
            assert names[names.index(name) + 1] == scale_name(name)
    assert stored["model.layers.1.mlp.shared_experts.up_proj.weight"] == Stored((0, 32), "F32")
