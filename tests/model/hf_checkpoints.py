"""Random checkpoints in Hugging Face form, created by transformers, or by hand if transformers cannot write them.

Shape legend: B sequences, T tokens.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from model.hf.names import is_quantized, scale_name, scale_shape

SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 24,
    "intermediate_size": 40,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
    "q_lora_rank": 12,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "initializer_range": 0.25,
    "num_nextn_predict_layers": 1,
}
YARN = {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16, "mscale": 1.0, "mscale_all_dim": 1.0}


def reference_model(seed: int = 0, **changes: Any) -> DeepseekV3ForCausalLM:
    """Returns a model of transformers in float32.

    Norms and correction biases are random too, so that omitting one changes the result.
    """
    torch.manual_seed(seed)
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**{**SIZES, **changes})).float().eval()
    randomize_norms(model)
    return model


def glm_model(num_dense: int) -> Glm4MoeLiteForCausalLM:
    """Returns a small GLM-4.7-Flash of transformers, whose first layers are dense."""
    torch.manual_seed(3)
    kinds = ["dense"] * num_dense + ["sparse"] * (SIZES["num_hidden_layers"] - num_dense)
    read = {key: SIZES[key] for key in SIZES if key not in ("first_k_dense_replace", "num_nextn_predict_layers")}
    sizes = {**read, "n_group": 1, "topk_group": 1, "rope_theta": 1e6, "mlp_layer_types": kinds}
    model = Glm4MoeLiteForCausalLM(Glm4MoeLiteConfig(**sizes)).float().eval()
    randomize_norms(model)
    return model


def qwen3_model(num_dense: int, **changes: Any) -> Qwen3MoeForCausalLM:
    """Returns a small Qwen3-MoE of transformers, whose first layers are dense."""
    torch.manual_seed(4)
    shared = ("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers")
    sizes = {
        **{key: SIZES[key] for key in (*shared, "max_position_embeddings", "initializer_range", "num_experts_per_tok")},
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 8,
        "norm_topk_prob": True,
        "mlp_only_layers": list(range(num_dense)),
        "rope_theta": 1e6,
        **changes,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).float().eval()
    randomize_norms(model)
    return model


@torch.no_grad()
def randomize_norms(model: torch.nn.Module) -> None:
    """Draws norms and correction biases."""
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.uniform_(0.5, 1.5)
    for name, bias in model.named_buffers():
        if "e_score_correction_bias" in name:
            bias.uniform_(-0.2, 0.2)


def random_tokens(num_sequences: int = 2, num_tokens: int = 19, seed: int = 1) -> Tensor:
    """Returns tokens_BT of the vocabulary in `SIZES`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(SIZES["vocab_size"], (num_sequences, num_tokens), generator=generator)


@torch.no_grad()
def reference_logits(model: PreTrainedModel, tokens_BT: Tensor) -> Tensor:
    logits: Tensor = model(tokens_BT).logits
    return logits


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Returns every tensor of a checkpoint, read by safetensors."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, Tensor], num_files: int = 1) -> None:
    """Writes weights through safetensors itself, in place of those that are there; dealt to files in turn."""
    for file in folder.glob("model*.safetensors*"):
        file.unlink()
    if num_files == 1:
        save_file(dict(tensors), folder / "model.safetensors", {"format": "pt"})
        return
    weight_map: dict[str, Any] = {}
    for number in range(num_files):
        names = list(tensors)[number::num_files]
        file_name = f"model-{number + 1:05}-of-{num_files:05}.safetensors"
        save_file({name: tensors[name] for name in names}, folder / file_name, {"format": "pt"})
        weight_map |= dict.fromkeys(names, file_name)
    index = {"metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def edit_json(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes what a JSON file holds."""
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def mtp_tensors(folder: Path, depth: int = 1, seed: int = 5) -> dict[str, Tensor]:
    """Returns MTP modules for a checkpoint whose files have none, under the released names."""
    config, tensors = json.loads((folder / "config.json").read_text()), read_tensors(folder)
    generator = torch.Generator().manual_seed(seed)
    layers, hidden = config["num_hidden_layers"], config["hidden_size"]
    template = {name.removeprefix(f"model.layers.{layers - 1}."): tensor for name, tensor in tensors.items()}
    added: dict[str, Tensor] = {}
    for layer in range(layers, layers + depth):
        prefix = f"model.layers.{layer}."
        for name, tensor in template.items():
            if not name.startswith(("model.", "lm_head.")):
                added[prefix + name] = torch.empty_like(tensor).uniform_(-0.4, 0.4, generator=generator)
        for name in ("enorm", "hnorm", "shared_head.norm"):
            added[f"{prefix}{name}.weight"] = torch.empty(hidden).uniform_(0.5, 1.5, generator=generator)
        added[f"{prefix}eh_proj.weight"] = torch.empty(hidden, 2 * hidden).uniform_(-0.3, 0.3, generator=generator)
        added[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        added[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return added


def quantized(tensors: Mapping[str, Tensor], seed: int = 6) -> dict[str, Tensor]:
    """Returns random FP8 codes and scales for the weights that released checkpoints have in FP8.

    The rest is bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if is_quantized(name):
            codes = torch.randint(0, 256, tensor.shape, generator=generator, dtype=torch.uint8)
            codes[(codes & 0x7F) == 0x7F] = 0
            made[name] = codes.view(torch.float8_e4m3fn)
            scales = torch.empty(scale_shape(tuple(tensor.shape)))
            made[scale_name(name)] = scales.uniform_(2.0**-12, 2.0**-9, generator=generator)
        else:
            made[name] = tensor if name.endswith("bias") else tensor.bfloat16()
    return made


def dequantized(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns every weight in float32, by fixed blocks of 128, element by element."""
    made: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith("_scale_inv"):
            continue
        if tensor.dtype == torch.float8_e4m3fn:
            scales = tensors[scale_name(name)]
            rows, columns = (torch.arange(size) // 128 for size in tensor.shape)
            made[name] = tensor.float() * scales[rows[:, None], columns[None, :]]
        else:
            made[name] = tensor.float()
    return made


FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def save_checkpoint(folder: Path, *, fp8: bool = False, num_files: int = 1, **changes: Any) -> dict[str, Tensor]:
    """Saves a random checkpoint with an MTP module, in float32 or in FP8; returns its tensors by name."""
    reference_model(**changes).save_pretrained(folder)
    tensors = read_tensors(folder) | mtp_tensors(folder)
    if fp8:
        tensors = quantized(tensors)
        edit_json(folder / "config.json", lambda keys: keys.update(dtype="bfloat16", quantization_config=FP8_CONFIG))
    write_tensors(folder, tensors, num_files)
    return tensors


def assert_same_tensors(made: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Asserts the same names, and the same type, shape and bytes for every tensor."""
    assert made.keys() == expected.keys()
    for name, tensor in expected.items():
        assert made[name].dtype == tensor.dtype, name
        assert made[name].shape == tensor.shape, name
        assert torch.equal(made[name].view(torch.uint8), tensor.view(torch.uint8)), name
