"""Files of Qwen3-MoE: logits of transformers in both directions, and each choice that the files cannot hold."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Qwen3MoeConfig

from base.decode import decode
from launch.config.compose import read_option
from model.config import GqaConfig, ModelConfig, YarnRope
from model.hf.config import check_format, parse_config, write_config
from model.hf.files import HfError
from model.hf.names import BIAS_SUFFIX, is_quantized
from model.pretrained import load_hf, save_hf
from model.transformer import named_tensors
from tests.model.hf_checkpoints import (
    qwen3_model,
    random_tokens,
    read_tensors,
    reference_logits,
    write_tensors,
)

# What Qwen3-30B-A3B's config.json says.
RELEASED = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 64}


def read(**changes: Any) -> ModelConfig:
    return parse_config({**RELEASED, **changes}, Path("config.json"))


def preset(name: str) -> ModelConfig:
    return decode(ModelConfig, {**read_option("model", name), "head": "tokens"})


def test_released_file_is_the_model_of_its_name() -> None:
    assert read() == preset("qwen3_30b")
    assert read(sliding_window=4096) == read(num_local_experts=128) == read()
    assert read(head_dim=None).qk_head_dim == 2048 // 32


def test_written_keys_are_read_by_transformers(tmp_path: Path) -> None:
    config = replace(read(), num_dense_layers=2)
    (tmp_path / "config.json").write_text(json.dumps(write_config(config, dtype="BF16", fp8=False)))
    reference = Qwen3MoeConfig.from_pretrained(tmp_path)
    assert (reference.num_experts, reference.num_key_value_heads, reference.head_dim) == (128, 4, 128)
    assert (reference.norm_topk_prob, reference.mlp_only_layers) == (True, [0, 1])
    assert parse_config(json.loads((tmp_path / "config.json").read_text()), tmp_path) == config


@torch.no_grad()
@pytest.mark.parametrize("changes", [{}, {"rope_parameters": YARN}], ids=["plain", "yarn"])
def test_loaded_and_saved_weights_have_the_logits_of_transformers(changes: dict[str, Any], tmp_path: Path) -> None:
    reference, tokens = qwen3_model(1, **changes), random_tokens(num_tokens=100)
    expected = reference_logits(reference, tokens)
    reference.save_pretrained(tmp_path / "source")
    model = load_hf(tmp_path / "source", torch.float32)
    torch.testing.assert_close(model(tokens), expected, rtol=0, atol=2e-5)
    save_hf(model, tmp_path / "back")
    back = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype=torch.float32).eval()
    assert torch.equal(reference_logits(back, tokens), expected)


def test_files_hold_no_biases_and_fp8_weights_of_all_maps(tmp_path: Path) -> None:
    qwen3_model(0).save_pretrained(tmp_path / "source")
    model = load_hf(tmp_path / "source", torch.float32)
    save_hf(model, tmp_path / "fp8", "fp8")
    tensors = read_tensors(tmp_path / "fp8")
    assert not [name for name in tensors if name.endswith(BIAS_SUFFIX)]
    coded = {name for name, tensor in tensors.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {name.split(".")[-2] for name in coded} == {
        f"{word}_proj" for word in ["q", "k", "v", "o", "gate", "up", "down"]
    }
    again = named_tensors(load_hf(tmp_path / "fp8", torch.float32))
    for name, values in named_tensors(model).items():
        tolerance = 0.07 if is_quantized(name) else 0.01
        assert torch.allclose(again[name], values, rtol=tolerance, atol=1e-2), name


def test_scores_are_those_of_transformers_class(tmp_path: Path) -> None:
    qwen3_model(0).save_pretrained(tmp_path / "source")
    model = load_hf(tmp_path / "source", torch.float32)
    config = replace(model.config, head="score")
    keys = write_config(config, dtype="F32", fp8=False, carried={"model_type": "qwen3_moe"})
    assert keys["architectures"] == ["Qwen3MoeForSequenceClassification"]
    assert parse_config(keys, tmp_path) == config
    assert AutoModelForSequenceClassification._model_mapping[Qwen3MoeConfig].__name__ == keys["architectures"][0]


def test_a_correction_bias_is_refused(tmp_path: Path) -> None:
    qwen3_model(0).save_pretrained(tmp_path / "source")
    model = load_hf(tmp_path / "source", torch.float32)
    bias = next(values for name, values in named_tensors(model).items() if name.endswith(BIAS_SUFFIX))
    assert not bias.any()
    bias[1] = 0.5
    with pytest.raises(HfError, match=r"e_score_correction_bias: must be 0, .*bias_update_rate 0"):
        save_hf(model, tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_a_file_with_a_correction_bias_is_refused(tmp_path: Path) -> None:
    qwen3_model(0).save_pretrained(tmp_path)
    write_tensors(tmp_path, read_tensors(tmp_path) | {"model.layers.0" + BIAS_SUFFIX: torch.zeros(8)})
    with pytest.raises(HfError, match=r"e_score_correction_bias: must be a tensor of the architecture, is none"):
        load_hf(tmp_path, torch.float32)


CASES: dict[str, tuple[dict[str, Any], str]] = {
    "weights not normalized": ({"norm_topk_prob": False}, "norm_topk_prob: must be true"),
    "layers without experts between others": ({"mlp_only_layers": [1]}, r"mlp_only_layers: must list the first"),
    "not a list": ({"mlp_only_layers": 3}, r"mlp_only_layers: must list the first"),
    "every second layer": ({"decoder_sparse_step": 2}, "decoder_sparse_step: must be 1"),
    "windows": ({"use_sliding_window": True}, "use_sliding_window: must be false"),
    "uneven groups of heads": ({"num_key_value_heads": 3}, "num_key_value_heads: must divide num_attention_heads 32"),
    "odd heads": ({"head_dim": 127}, "head_dim: must be even"),
    "two numbers of experts": ({"num_local_experts": 64}, "num_local_experts: must be 128"),
    "too many chosen": ({"num_experts_per_tok": 129}, "num_experts_per_tok: must be at most 128, num_experts"),
    "latents": ({"kv_lora_rank": 512}, "kv_lora_rank: must be absent or null"),
    "groups of experts": ({"n_group": 8}, "n_group: must be absent or null"),
    "scaled experts": ({"routed_scaling_factor": 2.5}, "routed_scaling_factor: must be absent or null"),
    "shared experts": ({"n_shared_experts": 1}, "n_shared_experts: must be absent or null"),
    "MTP": ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers: must be absent or null"),
    "biases": ({"attention_bias": True}, "attention_bias: must be false"),
    "scaled scores": (
        {"rope_scaling": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}, "rope_theta": 1e6},
        r"rope_scaling\.mscale_all_dim: must be absent or 0, .*is 1",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_other_choices_are_refused(case: str) -> None:
    changes, message = CASES[case]
    with pytest.raises(HfError, match=message):
        read(**changes)


def test_normalized_weights_must_be_stated() -> None:
    keys = {key: value for key, value in RELEASED.items() if key != "norm_topk_prob"}
    with pytest.raises(HfError, match="norm_topk_prob: must be given, is missing"):
        parse_config(keys, Path("config.json"))


def test_keys_of_qwen3_are_refused_in_files_of_deepseek() -> None:
    keys = write_config(preset("v3_671b"), dtype="BF16", fp8=False)
    for change in ({"mlp_only_layers": [1]}, {"use_sliding_window": True}, {"sliding_window": 4096}):
        with pytest.raises(HfError, match="must be absent or null, as it may change the network"):
            parse_config({**keys, **change}, Path("config.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {"router": "sigmoid"},
        {"qk_norm": False},
        {"num_shared_experts": 1},
        {"routed_scaling_factor": 2.0},
        {"mtp_depth": 1},
        {"num_expert_groups": 2},
    ],
    ids=str,
)
def test_an_export_refuses_what_the_files_cannot_state(changes: dict[str, Any]) -> None:
    config = replace(read(), **changes)
    with pytest.raises(
        HfError, match=rf"model\.{next(iter(changes))}: must be .* in Hugging Face's form with attention gqa"
    ):
        check_format(config)


def test_an_export_refuses_scaled_scores() -> None:
    config = read(rope_scaling=YARN, rope_theta=1e6)
    assert isinstance(config, GqaConfig)
    assert isinstance(config.rope_scaling, YarnRope)
    with pytest.raises(HfError, match=r"model\.rope_scaling\.mscale_all_dim: must be 0"):
        check_format(replace(config, rope_scaling=replace(config.rope_scaling, mscale_all_dim=1.0)))
