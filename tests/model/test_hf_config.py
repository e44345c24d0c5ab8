"""Compares `config.json` in both spellings with what transformers reads from the same file."""

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from model.attention.rope import rotation_table, softmax_scale
from model.config import ModelConfig, PlainRope, YarnRope
from model.hf.config import read_config, write_config
from tests.model.hf_checkpoints import SIZES, YARN
from tests.test_floors import ROOT
from tests.tiny import MODEL
from train.config.decode import decode

RELEASED = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "v_head_dim": 128,
    "vocab_size": 129280,
}


def written(folder: Path, keys: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def test_the_released_file_is_the_preset(tmp_path: Path) -> None:
    keys = yaml.safe_load((ROOT / "conf/model/v3_671b.yaml").read_text("utf-8"))
    preset = decode(ModelConfig, {**keys, "head": "tokens"})
    assert read_config(written(tmp_path, RELEASED)) == replace(preset, initializer_range=0.02)


@pytest.mark.parametrize("keys", [{}, {"num_nextn_predict_layers": 3}, {"num_mtp_layers": 3}], ids=str)
def test_both_names_of_the_mtp_depth_are_read(keys: dict[str, int], tmp_path: Path) -> None:
    plain = {key: value for key, value in RELEASED.items() if key != "num_nextn_predict_layers"}
    folder = written(tmp_path, {**plain, **keys})
    expected = AutoConfig.from_pretrained(folder).num_nextn_predict_layers
    assert read_config(folder).mtp_depth == expected == (3 if keys else 1)


def test_what_transformers_saves_is_read_as_what_it_was_made_from(tmp_path: Path) -> None:
    folder = written(tmp_path / "old", RELEASED)
    AutoConfig.from_pretrained(folder).save_pretrained(tmp_path / "new")
    assert "rope_parameters" in json.loads((tmp_path / "new" / "config.json").read_text())
    assert read_config(tmp_path / "new") == read_config(folder)


YARN_CHANGES = [
    dict(zip(("mscale", "mscale_all_dim", "attention_factor"), values, strict=True))
    for values in itertools.product((None, 0.0, 0.4, 1.0), (None, 0.0, 0.7, 1.0), (None, 1.9))
]


@pytest.mark.parametrize("changes", YARN_CHANGES, ids=lambda changes: "-".join(map(str, changes.values())))
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_yarn_turns_and_scales_as_transformers_does(changes: dict[str, Any], factor: float, tmp_path: Path) -> None:
    given = {key: value for key, value in changes.items() if value is not None}
    if factor == 1.0 and "attention_factor" in given:
        given["attention_factor"] = 1.0
    scaling = {**{key: value for key, value in YARN.items() if "mscale" not in key}, **given, "factor": factor}
    keys = {**SIZES, "model_type": "deepseek_v3", "rms_norm_eps": 1e-6, "rope_scaling": scaling}
    config = read_config(written(tmp_path / "source", keys))
    assert_same_rotation(config, AutoConfig.from_pretrained(tmp_path / "source"))
    folder = written(tmp_path / "export", write_config(config, dtype="F32", fp8=False))
    assert_same_rotation(config, AutoConfig.from_pretrained(folder))
    assert_close(read_config(folder), config)


def assert_same_rotation(config: ModelConfig, reference: DeepseekV3Config) -> None:
    cos, sin = rotation_table(config, 40, torch.float64)
    positions = torch.arange(40)[None]
    expected_cos, expected_sin = DeepseekV3RotaryEmbedding(reference)(torch.empty(0), positions)
    half = config.qk_rope_head_dim // 2
    torch.testing.assert_close(cos.float(), expected_cos[0, :, :half], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sin.float(), expected_sin[0, :, :half], rtol=1e-5, atol=1e-5)
    assert softmax_scale(config) == pytest.approx(DeepseekV3Attention(reference, 0).scaling, rel=1e-12)


def assert_close(made: ModelConfig, expected: ModelConfig) -> None:
    """Asserts equality up to the last digits of an mscale that was computed from an attention factor."""
    ours, theirs = made.rope_scaling, expected.rope_scaling
    assert isinstance(ours, YarnRope)
    assert isinstance(theirs, YarnRope)
    assert math.isclose(ours.mscale, theirs.mscale, rel_tol=1e-9)
    assert replace(made, rope_scaling=replace(ours, mscale=theirs.mscale)) == expected


@pytest.mark.parametrize(
    "scaling",
    [
        PlainRope(kind="plain"),
        *(
            YarnRope(
                kind="yarn",
                factor=factor,
                original_max_position_tokens=16,
                beta_fast=20.0,
                beta_slow=2.0,
                mscale=mscale,
                mscale_all_dim=all_dim,
            )
            for factor in (1.0, 4.0)
            for mscale in (0.0, 0.5, 1.0)
            for all_dim in (0.0, 0.5, 1.0)
        ),
    ],
    ids=str,
)
def test_every_architecture_of_ours_is_written_as_what_transformers_computes(
    scaling: PlainRope | YarnRope, tmp_path: Path
) -> None:
    config = replace(MODEL, rope_scaling=scaling, mtp_hidden="pre_norm", mtp_depth=2, rope_theta=777.0)
    folder = written(tmp_path, write_config(config, dtype="BF16", fp8=False))
    assert read_config(folder) == config
    assert_same_rotation(config, AutoConfig.from_pretrained(folder))


def test_what_is_written_is_what_transformers_reads(tmp_path: Path) -> None:
    config = replace(MODEL, q_lora_rank=None, mtp_depth=0)
    carried = {"bos_token_id": 3, "eos_token_id": [4, 5], "surprise": 1}
    keys = write_config(config, dtype="BF16", fp8=True, carried=carried)
    assert keys["surprise"] == 1
    reference = AutoConfig.from_pretrained(written(tmp_path, keys))
    assert isinstance(reference, DeepseekV3Config)
    assert reference.architectures == ["DeepseekV3ForCausalLM"]
    assert reference.dtype == torch.bfloat16
    assert (reference.bos_token_id, reference.eos_token_id) == (3, [4, 5])
    assert reference.quantization_config["weight_block_size"] == [128, 128]
    assert reference.num_nextn_predict_layers == 0
    assert reference.q_lora_rank is None
    assert reference.n_routed_experts == config.num_routed_experts
    assert reference.topk_group == config.num_limited_groups
    assert reference.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
