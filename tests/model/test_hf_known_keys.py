"""Keys of `config.json` that may change the network are refused unless neutral; harmless ones are carried through."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from model.config import YarnRope
from model.hf.checkpoint import open_checkpoint
from model.hf.config import read_config
from model.hf.files import HfError
from model.hf.reader import HfReader
from tests.model.published_checkpoints import LAYOUTS, config_keys, write_published

REFUSED: dict[str, Any] = {
    "index_topk": 2048,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "sliding_window": 4096,
    "use_sliding_window": True,
    "max_window_layers": 28,
    "swiglu_limit": 7.0,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "logits_soft_cap": 30.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.5,
    "logits_scaling": 8.0,
    "scale_emb_factor": 2.0,
    "scale_depth": 1.4,
    "layer_types": ["full_attention", "sliding_attention"],
    "mlp_bias": True,
    "qk_layernorm": True,
    "use_qk_norm": True,
    "moe_shared_expert_gate": True,
    "zero_expert_num": 8,
    "hc_mult": 4,
    "compress_ratios": [0, 4],
    "num_hash_layers": 3,
    "use_rope": False,
    "no_rope_layers": [1, 0],
    "attn_output_gate": True,
    "residual_scale": True,
    "linear_attn_config": {"num_heads": 2},
    "n_routed_experts_extra": 2,
    "num_experts": 4,
    "attention_bias": True,
    "tie_word_embeddings": True,
    "hidden_act": "gelu",
    "rope_interleave": False,
    "moe_layer_freq": 2,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "partial_rotary_factor": 0.5,
}
HARMLESS: dict[str, Any] = {
    "sliding_window": None,
    "use_sliding_window": False,
    "index_topk": None,
    "embedding_multiplier": 1.0,
    "logits_scaling": 1,
    "layer_types": ["full_attention", "full_attention"],
    "mlp_bias": False,
    "use_qk_norm": False,
    "final_logit_softcapping": None,
    "aux_loss_alpha": 0.001,
    "router_aux_loss_coef": 0.001,
    "_attn_implementation": "eager",
    "house_note": [1, 2],
    "num_experts": 8,
}


def written(folder: Path, **changes: Any) -> Path:
    keys = {**config_keys(LAYOUTS["v3"]), **changes}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in keys.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize("key", REFUSED)
def test_a_key_that_may_change_the_network_is_rejected_in_one_line(key: str, tmp_path: Path) -> None:
    with pytest.raises(HfError) as refused:
        read_config(written(tmp_path, **{key: REFUSED[key]}))
    text = str(refused.value)
    assert text.startswith(f"{tmp_path / 'config.json'}: {key}: must be ")
    assert len(text.splitlines()) == 1


@pytest.mark.parametrize("key", HARMLESS)
def test_a_neutral_or_harmless_key_changes_nothing(key: str, tmp_path: Path) -> None:
    plain = read_config(written(tmp_path))
    assert read_config(written(tmp_path, **{key: HARMLESS[key]})) == plain


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
