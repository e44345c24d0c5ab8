"""Both spellings of `config.json` as transformers reads them, and each key that is missing, wrong or not supported."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from base.decode import decode
from model.attention.form import rotation_table, softmax_scale
from model.config import ModelConfig, PlainRope, YarnRope
from model.hf.config import read_config, write_config
from model.hf.files import HfError
from tests.model.hf_checkpoints import FP8_CONFIG, SIZES, YARN, edit_json
from tests.model.hf_damage import CONFIG, assert_refused, sound_checkpoint
from tests.test_floors import ROOT
from tests.tiny import MODEL

RELEASED = json.loads("""{
    "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001, "bos_token_id": 0, "eos_token_id": 1, "ep_size": 1, "first_k_dense_replace": 3,
    "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
    "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
    "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
    "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06, "rope_theta": 10000, "routed_scaling_factor": 2.5,
    "rope_scaling": {
        "beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"
    },
    "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false, "topk_group": 4,
    "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128, "vocab_size": 129280
}""")


def written(folder: Path, keys: dict[str, Any]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(keys))
    return folder


def test_the_released_file_is_the_preset(tmp_path: Path) -> None:
    keys = yaml.safe_load((ROOT / "conf/model/v3_671b.yaml").read_text("utf-8"))
    preset = decode(ModelConfig, {**keys, "head": "tokens"})
    assert read_config(written(tmp_path, RELEASED)) == replace(preset, initializer_range=0.02)


@pytest.mark.parametrize(
    ("choices", "limit", "scores"), [(8, 4, None), (9, 4, None), (6, 4, 2), (8, 2, 2), (6, 8, None)]
)
def test_released_models_add_two_scores_of_a_group_for_any_number_of_choices(
    choices: int, limit: int, scores: int | None, tmp_path: Path
) -> None:
    keys = {**RELEASED, "num_experts_per_tok": choices, "topk_group": limit}
    config = read_config(written(tmp_path, keys))
    assert config.group_score_experts == scores
    # As in the report, K / M scores: another choice is written, and is read again.
    for model in (config, replace(config, group_score_experts=None)):
        again = write_config(model, dtype="BF16", fp8=False)
        assert ("group_score_experts" in again) == (not model.is_released_routing)
        assert read_config(written(tmp_path, again)) == model


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


@pytest.mark.covering(2)
@pytest.mark.parametrize("attention_factor", [None, 1.9])
@pytest.mark.parametrize("mscale_all_dim", [None, 0.0, 0.7, 1.0])
@pytest.mark.parametrize("mscale", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("factor", [1.0, 8.0])
def test_yarn_turns_and_scales_as_transformers_does(
    mscale: float | None, mscale_all_dim: float | None, attention_factor: float | None, factor: float, tmp_path: Path
) -> None:
    changes = {"mscale": mscale, "mscale_all_dim": mscale_all_dim, "attention_factor": attention_factor}
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
    half = config.rotated_dim // 2
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
            for factor, mscale, all_dim in ((1.0, 0.5, 1.0), (4.0, 0.0, 1.0), (4.0, 0.5, 0.5), (4.0, 1.0, 0.0))
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


CONFIG_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "other model": (
        {"model_type": "llama"},
        "model_type: must be one of deepseek_v3, kimi_k2, glm4_moe_lite, qwen3_moe, is 'llama'",
    ),
    "experts before a dense layer": ({"mlp_layer_types": ["sparse", "dense"]}, "mlp_layer_types: must have dense for"),
    "grouped heads": ({"num_key_value_heads": 5}, "num_key_value_heads: must be 10"),
    "head_dim": ({"head_dim": 32}, "head_dim: must be 8"),
    "qk_head_dim": ({"qk_head_dim": 32}, "qk_head_dim: must be 16"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size: must be a whole number, is None"),
    "true as a number": ({"hidden_size": True}, "hidden_size: must be a whole number, is True"),
    "no layer": ({"num_hidden_layers": 0}, "num_hidden_layers: must be at least 1, is 0"),
    "a billion experts": ({"n_routed_experts": 10**9, "n_group": 1}, "is missing"),
    "another width": ({"hidden_size": 48}, "must have shape [48, 48], has [48, 24]"),
    "another rank": ({"q_lora_rank": None}, "q_proj.weight"),
    "groups that do not divide": ({"n_group": 3}, "n_group: must divide n_routed_experts 4, is 3"),
    "more experts a token than there are": ({"num_experts_per_tok": 3}, "num_experts_per_tok: must be at most 2"),
    "odd rotation": ({"qk_rope_head_dim": 7, "head_dim": 7, "qk_head_dim": 15}, "qk_rope_head_dim: must be even"),
    "eps of zero": ({"rms_norm_eps": 0}, "rms_norm_eps: must be above 0"),
    "NaN": ({"routed_scaling_factor": float("nan")}, "must be JSON in UTF-8, is not (it holds NaN)"),
    "a size beyond all": ({"hidden_size": 10**400}, "hidden_size: must be at most 9223372036854775807, is 1000"),
    "end of sentence as text": ({"eos_token_id": "1"}, "eos_token_id: must be a token id or null, is '1'"),
    "end of sentence in a list as text": ({"eos_token_id": [1, "2"]}, "eos_token_id: must be a token id or null"),
    "an endless number": ({"routed_scaling_factor": 10**400}, "routed_scaling_factor: must be a finite number"),
    "two MTP depths": ({"num_mtp_layers": 2}, "num_mtp_layers: must equal num_nextn_predict_layers 1, is 2"),
    "more MTP modules than tensors": ({"num_nextn_predict_layers": 2}, "model.layers.2.input_layernorm.weight"),
    "MTP modules that config.json denies": ({"num_nextn_predict_layers": 0}, "is none"),
    "MTP state": ({"mtp_hidden": "both"}, "mtp_hidden: must be post_norm or pre_norm"),
    "unknown dtype": ({"dtype": "int8"}, "dtype: must be one of float64, float32, float16, bfloat16, is 'int8'"),
    "two dtypes": ({"torch_dtype": "float16"}, "torch_dtype: must equal dtype 'bfloat16'"),
    "other quantization": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
    "other blocks": (
        {"quantization_config": {**FP8_CONFIG, "weight_block_size": [64, 64]}},
        "quantization_config.weight_block_size: must be [128, 128], is [64, 64]",
    ),
    "other format": ({"quantization_config": {**FP8_CONFIG, "fmt": "e5m2"}}, "quantization_config.fmt: must be e4m3"),
}

ROPE_CASES: dict[str, tuple[dict[str, Any], str]] = {
    "no base": ({}, "rope_theta: must be given, is missing"),
    "base of zero": ({"rope_theta": 0}, "rope_theta: must be above 0"),
    "other kind": ({"rope_theta": 1e4, "rope_scaling": {"type": "linear", "factor": 2}}, "must be default or yarn"),
    "other kind of 5": ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, "is 'llama3'"),
    "two kinds": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "rope_type": "default"}},
        "must equal rope_type",
    ),
    "both spellings": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}, "rope_parameters": {"rope_theta": 1e4}},
        "rope_parameters: must not be given together with rope_scaling",
    ),
    "a part rotates": ({"rope_theta": 1e4, "partial_rotary_factor": 0.5}, "partial_rotary_factor: must be 1"),
    "no factor": ({"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}, "rope_scaling.factor: must be given"),
    "factor below one": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 0.5}},
        "rope_scaling.factor: must be at least 1",
    ),
    "not truncated": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 2, "truncate": False}},
        "rope_scaling.truncate: must be true",
    ),
    "attention factor of a factor of one": (
        {"rope_theta": 1e4, "rope_scaling": {"type": "yarn", "factor": 1, "attention_factor": 1.5}},
        "rope_scaling.attention_factor: must be 1 with factor 1",
    ),
    "base of one": ({"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_theta: must be above 1"),
}

REQUIRED = """
    model_type vocab_size hidden_size num_hidden_layers first_k_dense_replace intermediate_size num_attention_heads
    q_lora_rank kv_lora_rank qk_nope_head_dim qk_rope_head_dim v_head_dim n_routed_experts n_shared_experts
    num_experts_per_tok moe_intermediate_size n_group topk_group routed_scaling_factor rms_norm_eps
    max_position_embeddings
"""


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_checkpoint(tmp_path_factory.mktemp("sound"))


def broken_config(sound: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object]) -> Path:
    """Copies the sound checkpoint's files with another config.json."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in sound.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / CONFIG).unlink()
    shutil.copy(sound / CONFIG, folder / CONFIG)
    edit_json(folder / CONFIG, edit)
    return folder


@pytest.mark.parametrize(("changes", "words"), CONFIG_CASES.values(), ids=CONFIG_CASES.keys())
def test_a_wrong_key_is_named_in_one_line(changes: dict[str, Any], words: str, sound: Path, tmp_path: Path) -> None:
    assert_refused(broken_config(sound, tmp_path, lambda keys: keys.update(changes)), (words,))


@pytest.mark.parametrize(("changes", "words"), ROPE_CASES.values(), ids=ROPE_CASES.keys())
def test_a_wrong_rotary_embedding_is_named(changes: dict[str, Any], words: str, sound: Path, tmp_path: Path) -> None:
    def edit(keys: dict[str, Any]) -> None:
        keys.pop("rope_parameters")
        keys.update(changes)

    assert_refused(broken_config(sound, tmp_path, edit), ("config.json", words))


def test_a_missing_key_is_named(sound: Path, tmp_path: Path) -> None:
    keys = json.loads((sound / CONFIG).read_text())
    for key in REQUIRED.split():
        with pytest.raises(HfError, match=rf"config\.json: {key}: must be given, is missing"):
            read_config(written(tmp_path, {name: value for name, value in keys.items() if name != key}))
