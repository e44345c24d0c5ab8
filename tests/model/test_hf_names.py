"""Names, shapes and known keys of a released checkpoint, and the memory of its conversion."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from base.decode import decode
from comm.dispatch.local import LocalDispatcher
from model.config import ModelConfig, YarnRope
from model.hf.checkpoint import open_checkpoint
from model.hf.config import read_config
from model.hf.files import HfError
from model.hf.names import BIAS_SUFFIX, Stored, copied_from, is_quantized, scale_name, stored_tensors, weights
from model.hf.reader import HfReader
from model.size import count_parameters
from model.transformer import Transformer, named_tensors
from tests.model.hf_memory import SHARD_BYTES
from tests.model.published_checkpoints import LAYOUTS, config_keys, write_published
from tests.test_floors import ROOT
from tests.tiny import MODEL

GENERAL = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def preset(name: str) -> ModelConfig:
    keys = yaml.safe_load((ROOT / "conf" / "model" / f"{name}.yaml").read_text("utf-8"))
    return decode(ModelConfig, {**keys, "head": "tokens"})


@cache
def released_tensors() -> dict[str, Stored]:
    """Returns the tensors of DeepSeek-V3's released checkpoint."""
    return stored_tensors(preset("v3_671b"), dtype="BF16", fp8=True)


@pytest.mark.slow
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


RELEASED = """
    embed_tokens.weight=[129280,7168],BF16 norm.weight=[7168],BF16 layers.0.mlp.down_proj.weight=[7168,18432],F8_E4M3
    layers.0.self_attn.kv_a_proj_with_mqa.weight=[576,7168],F8_E4M3 layers.61.enorm.weight=[7168],BF16
    layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv=[5,56],F32 layers.61.hnorm.weight=[7168],BF16
    layers.3.self_attn.q_b_proj.weight=[24576,1536],F8_E4M3 layers.3.self_attn.q_a_layernorm.weight=[1536],BF16
    layers.60.self_attn.kv_b_proj.weight=[32768,512],F8_E4M3 layers.60.mlp.gate.weight=[256,7168],BF16
    layers.60.mlp.gate.e_score_correction_bias=[256],F32 layers.61.shared_head.norm.weight=[7168],BF16
    layers.60.mlp.experts.255.gate_proj.weight=[2048,7168],F8_E4M3 layers.61.embed_tokens.weight=[129280,7168],BF16
    layers.60.mlp.experts.255.down_proj.weight_scale_inv=[56,16],F32 layers.61.eh_proj.weight=[7168,14336],BF16
    layers.61.mlp.shared_experts.up_proj.weight=[2048,7168],F8_E4M3
    layers.61.shared_head.head.weight=[129280,7168],BF16
"""


def test_tensors_of_the_released_file_are_as_they_are_there() -> None:
    stored = released_tensors()
    for entry in RELEASED.split():
        name, _, described = entry.partition("=")
        shape, _, dtype = described.rpartition(",")
        assert stored[f"model.{name}"] == Stored(tuple(json.loads(shape)), dtype), name  # type: ignore[arg-type]
    assert stored["lm_head.weight"] == Stored((129280, 7168), "BF16")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"q_lora_rank": None},
        {"num_shared_experts": 3, "mtp_depth": 0, "num_dense_layers": 0},
        {"num_shared_experts": 0, "mtp_depth": 3},
        {"num_dense_layers": 4},
    ],
    ids=str,
)
def test_the_network_has_exactly_these_tensors(changes: dict[str, Any]) -> None:
    assert_the_network_agrees(replace(MODEL, **changes))


@pytest.mark.slow
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


REFUSED = """
    index_topk=2048 index_n_heads=64 index_head_dim=128 sliding_window=4096 use_sliding_window=true max_window_layers=28
    swiglu_limit=7.0 attn_logit_softcapping=50.0 final_logit_softcapping=30.0 logits_soft_cap=30.0 hc_mult=4
    embedding_multiplier=12.0 residual_multiplier=0.22 attention_multiplier=0.5 logits_scaling=8.0 scale_emb_factor=2.0
    scale_depth=1.4 layer_types=["full_attention","sliding_attention"] mlp_bias=true qk_layernorm=true use_qk_norm=true
    moe_shared_expert_gate=true zero_expert_num=8 compress_ratios=[0,4] num_hash_layers=3 use_rope=false
    no_rope_layers=[1,0] attn_output_gate=true residual_scale=true linear_attn_config={"num_heads":2}
    n_routed_experts_extra=2 num_experts=4 attention_bias=true attention_bias="false" tie_word_embeddings=true
    hidden_act="gelu" rope_interleave=false moe_layer_freq=2 topk_method="greedy" scoring_func="softmax"
    norm_topk_prob=false partial_rotary_factor=0.5 attention_dropout=0.1
"""
HARMLESS = """
    sliding_window=null use_sliding_window=false index_topk=null embedding_multiplier=1.0 logits_scaling=1
    layer_types=["full_attention","full_attention"] mlp_bias=false use_qk_norm=false final_logit_softcapping=null
    aux_loss_alpha=0.001 router_aux_loss_coef=0.001 _attn_implementation="eager" house_note=[1,2] num_experts=8
"""


def entries(text: str) -> list[tuple[str, Any]]:
    """Returns keys of `config.json` and their values, of a list of key=value."""
    return [(key, json.loads(value)) for key, _, value in (entry.partition("=") for entry in text.split())]


def written(folder: Path, **changes: Any) -> Path:
    keys = {**config_keys(LAYOUTS["v3"]), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value != "absent"}))
    return folder


def test_keys_that_may_change_the_network_are_rejected_in_one_line(tmp_path: Path) -> None:
    for key, value in entries(REFUSED):
        with pytest.raises(HfError) as refused:
            read_config(written(tmp_path, **{key: value}))
        text = str(refused.value)
        assert text.startswith(f"{tmp_path / 'config.json'}: {key}: must be ")
        assert len(text.splitlines()) == 1


def test_neutral_and_harmless_keys_change_nothing(tmp_path: Path) -> None:
    plain = read_config(written(tmp_path))
    for key, value in entries(HARMLESS):
        assert read_config(written(tmp_path, **{key: value})) == plain, key


def test_unknown_keys_are_named_and_carried(tmp_path: Path) -> None:
    write_published("v3", tmp_path / "hf")
    checkpoint = open_checkpoint(tmp_path / "hf")
    assert checkpoint.unknown == ("house_note",)
    assert checkpoint.carried["house_note"] == {"of": "no concern"}
    assert checkpoint.carried["aux_loss_alpha"] == 0.001
    assert "hidden_size" not in checkpoint.carried


def test_a_length_at_the_top_is_the_one_that_yarn_stretches(tmp_path: Path) -> None:
    yarn = {**config_keys(LAYOUTS["v3"])["rope_scaling"]}
    inner = read_config(written(tmp_path))
    del yarn["original_max_position_embeddings"]
    assert read_config(written(tmp_path, rope_scaling=yarn, original_max_position_embeddings=16)) == inner
    assert isinstance(inner.rope_scaling, YarnRope)
    for changes in (
        {"original_max_position_embeddings": 32},
        {"original_max_position_embeddings": 16, "rope_scaling": None},
    ):
        with pytest.raises(HfError, match=r"original_max_position_embeddings: must "):
            read_config(written(tmp_path, **changes))
    same = read_config(written(tmp_path, original_max_position_embeddings=64, rope_scaling=None))
    assert same == read_config(written(tmp_path, rope_scaling=None))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([1.0, 0.1, 0.01, 0.002], "must be the frequencies of rope_theta 50000, 0.00029907 at [3], is 0.002"),
        ([1.0, 0.1, 0.01], "must be F32, BF16, F16 or F64 [4], is F32 [3]"),
        ([1.0, 0.1, 0.01, float("nan")], "is nan"),
    ],
)
def test_stored_frequencies_of_another_rotation_are_rejected(values: list[float], words: str, tmp_path: Path) -> None:
    tensors = write_published("moonlight", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("model*"):
        file.unlink()
    name = "model.layers.1.self_attn.rotary_emb.inv_freq"
    save_file({**tensors, name: torch.tensor(values)}, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    with pytest.raises(HfError) as refused:
        HfReader(tmp_path / "hf")
    assert f"{name}: " in str(refused.value)
    assert words in str(refused.value)


def test_stored_frequencies_may_be_interpolated_or_in_half_precision(tmp_path: Path) -> None:
    """YaRN extends 16 positions by 4 with both betas at 1.

    The first pair keeps its frequency, and the others get a quarter.
    """
    tensors = write_published("kimi_k2", tmp_path / "hf")
    for file in (tmp_path / "hf").glob("model*"):
        file.unlink()
    plain = 1.0 / 50000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / 8)
    yarn = torch.where(torch.arange(4) < 1, plain, plain / 4)
    names = [f"model.layers.{layer}.self_attn.rotary_emb.inv_freq" for layer in range(2)]
    changed = {**tensors, names[0]: yarn.float(), names[1]: plain.bfloat16()}
    save_file(changed, tmp_path / "hf" / "model.safetensors", {"format": "pt"})
    reader = HfReader(tmp_path / "hf")
    assert reader.rotary[names[1]].dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc")
def test_peak_memory_is_at_most_two_shards_above_the_model(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.model.hf_memory", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    peak = json.loads(done.stdout)
    assert peak["num_files"] >= 8
    assert peak["size"] > 7 * SHARD_BYTES
    assert peak["streamed"] <= 2 * SHARD_BYTES
    assert peak["loaded"] <= peak["size"] + 2 * SHARD_BYTES
    assert peak["saved"] <= peak["size"] + 2 * SHARD_BYTES
    # The measure itself: a second copy of all weights shows in full.
    assert peak["held"] >= 1.9 * peak["size"]
