"""Tiny checkpoints in the layouts that were published, written with safetensors and json alone.

Nothing of this project is imported: names, types, blocks and keys are spelled here a second time, from the published
files. Sizes leave ragged blocks of 128 behind.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN, VOCAB, HEADS, DENSE, EXPERT = 144, 320, 2, 160, 136
KV_RANK, NOPE, ROPE, VALUE = 130, 8, 8, 8
LICENCE = "A licence.\nKeep it.\n"
YARN = {
    "type": "yarn",
    "factor": 4,
    "original_max_position_embeddings": 16,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
# Keys that every published file has in addition to the architecture.
BESIDE = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "aux_loss_alpha": 0.001,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "ep_size": 1,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "norm_topk_prob": True,
    "pretraining_tp": 1,
    "scoring_func": "sigmoid",
    "seq_aux": True,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "torch_dtype": "bfloat16",
    "transformers_version": "4.33.1",
    "use_cache": True,
    "house_note": {"of": "no concern"},
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """One published layout.

    Attributes:
        fp8: type of the scales of FP8 weights; None: weights in bfloat16.
        mtp: whether the files hold the MTP module, with copies of embedding and head.
    """

    keys: Mapping[str, Any] = field(default_factory=dict)
    fp8: torch.dtype | None = None
    mtp: bool = False
    rotary: bool = False
    num_files: int = 1


ONE_GROUP = {"n_group": 1, "topk_group": 1, "q_lora_rank": None, "rope_theta": 50000.0, "num_nextn_predict_layers": 0}
UE8M0 = {"quantization_config": {**FP8, "scale_fmt": "ue8m0"}}
LAYOUTS = {
    "v3": Layout(keys={"quantization_config": FP8}, fp8=torch.float32, mtp=True, num_files=3),
    "v3_1": Layout(keys=UE8M0, fp8=torch.float32, mtp=True),
    "v3_1_exponents": Layout(keys=UE8M0, fp8=torch.float8_e8m0fnu, mtp=True, num_files=2),
    "bf16_without_mtp": Layout(num_files=2),
    "moonlight": Layout(keys={**ONE_GROUP, "rope_scaling": None}, rotary=True, num_files=2),
    "kimi_k2": Layout(
        keys={
            **ONE_GROUP,
            "model_type": "kimi_k2",
            "q_lora_rank": 24,
            "n_routed_experts": 12,
            "vocab_size": 640,
            "rope_scaling": {**YARN, "beta_fast": 1.0, "beta_slow": 1.0},
            "quantization_config": FP8,
        },
        fp8=torch.float32,
        rotary=True,
        num_files=3,
    ),
}


def write_published(name: str, folder: Path) -> dict[str, Tensor]:
    """Writes a layout's checkpoint with a license, code and a chat template; returns its tensors by name."""
    layout = LAYOUTS[name]
    keys = config_keys(layout)
    tensors = dict(_tensors(layout, keys))
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(keys, indent=2))
    (folder / "LICENSE-MODEL").write_text(LICENCE)
    (folder / "configuration_deepseek.py").write_text("raise SystemExit('it must not run')\n")
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    if layout.num_files == 1:
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        return tensors
    weight_map: dict[str, Any] = {}
    for number in range(layout.num_files):
        names = sorted(tensors)[number :: layout.num_files]
        file_name = f"model-{number + 1:05}-of-{layout.num_files:06}.safetensors"
        save_file({each: tensors[each] for each in names}, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return tensors


def config_keys(layout: Layout) -> dict[str, Any]:
    return {
        **BESIDE,
        "model_type": "deepseek_v3",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": DENSE,
        "moe_intermediate_size": EXPERT,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "q_lora_rank": 24,
        "kv_lora_rank": KV_RANK,
        "qk_nope_head_dim": NOPE,
        "qk_rope_head_dim": ROPE,
        "v_head_dim": VALUE,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000,
        "rope_scaling": YARN,
        "num_nextn_predict_layers": 1,
        **layout.keys,
    }


def as_plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every weight in float32: FP8 element (i, j) times the scale of block (i // 128, j // 128)."""
    made = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv") or name.endswith("inv_freq"):
            continue
        values = tensor.float()
        if tensor.dtype == torch.float8_e4m3fn:
            scales = tensors[f"{name}_scale_inv"].float()
            values *= scales.repeat_interleave(128, 0)[: len(values)].repeat_interleave(128, 1)[:, : values.shape[1]]
        made[name] = values
    return made


def _tensors(layout: Layout, keys: Mapping[str, Any]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    made: dict[str, Tensor] = {}

    def put(name: str, *shape: int, low: float = -0.25, high: float = 0.25) -> None:
        made[f"{name}.weight"] = torch.empty(shape).uniform_(low, high, generator=generator).bfloat16()

    def norm(name: str, size: int) -> None:
        put(name, size, low=0.5, high=1.5)

    def linear(name: str, rows: int, columns: int) -> None:
        if layout.fp8 is None:
            put(name, rows, columns)
            return
        values = torch.empty(rows, columns).uniform_(-240.0, 240.0, generator=generator)
        made[f"{name}.weight"] = values.to(torch.float8_e4m3fn)
        blocks = (-(-rows // 128), -(-columns // 128))
        scales = torch.empty(blocks).uniform_(2.0**-11, 2.0**-9, generator=generator)
        is_power = "scale_fmt" in keys["quantization_config"]
        made[f"{name}.weight_scale_inv"] = (scales.log2().ceil().exp2() if is_power else scales).to(layout.fp8)

    def feed_forward(prefix: str, size: int) -> None:
        linear(f"{prefix}.gate_proj", size, HIDDEN)
        linear(f"{prefix}.up_proj", size, HIDDEN)
        linear(f"{prefix}.down_proj", HIDDEN, size)

    def block(number: int) -> None:
        prefix = f"model.layers.{number}"
        attention = f"{prefix}.self_attn"
        norm(f"{prefix}.input_layernorm", HIDDEN)
        norm(f"{prefix}.post_attention_layernorm", HIDDEN)
        if keys["q_lora_rank"] is None:
            linear(f"{attention}.q_proj", HEADS * (NOPE + ROPE), HIDDEN)
        else:
            linear(f"{attention}.q_a_proj", keys["q_lora_rank"], HIDDEN)
            norm(f"{attention}.q_a_layernorm", keys["q_lora_rank"])
            linear(f"{attention}.q_b_proj", HEADS * (NOPE + ROPE), keys["q_lora_rank"])
        linear(f"{attention}.kv_a_proj_with_mqa", KV_RANK + ROPE, HIDDEN)
        norm(f"{attention}.kv_a_layernorm", KV_RANK)
        linear(f"{attention}.kv_b_proj", HEADS * (NOPE + VALUE), KV_RANK)
        linear(f"{attention}.o_proj", HIDDEN, HEADS * VALUE)
        if layout.rotary:
            powers = torch.arange(0, ROPE, 2, dtype=torch.float32) / ROPE
            made[f"{attention}.rotary_emb.inv_freq"] = 1.0 / keys["rope_theta"] ** powers
        if number < keys["first_k_dense_replace"]:
            feed_forward(f"{prefix}.mlp", DENSE)
            return
        put(f"{prefix}.mlp.gate", keys["n_routed_experts"], HIDDEN)
        bias = torch.empty(keys["n_routed_experts"]).uniform_(-0.2, 0.2, generator=generator)
        made[f"{prefix}.mlp.gate.e_score_correction_bias"] = bias
        for expert in range(keys["n_routed_experts"]):
            feed_forward(f"{prefix}.mlp.experts.{expert}", EXPERT)
        feed_forward(f"{prefix}.mlp.shared_experts", EXPERT)

    put("model.embed_tokens", keys["vocab_size"], HIDDEN)
    block(0)
    block(1)
    norm("model.norm", HIDDEN)
    put("lm_head", keys["vocab_size"], HIDDEN)
    if layout.mtp:
        block(2)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            norm(f"model.layers.2.{name}", HIDDEN)
        put("model.layers.2.eh_proj", HIDDEN, 2 * HIDDEN)
        made["model.layers.2.embed_tokens.weight"] = made["model.embed_tokens.weight"].clone()
        made["model.layers.2.shared_head.head.weight"] = made["lm_head.weight"].clone()
    return made
