"""Types in which tensors are stored: what is loaded and written again has the same bytes, and FP8 its fixed blocks.

Shape legend: B sequences, T tokens.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, DeepseekV3ForCausalLM

from model.hf.convert import load_hf, save_hf
from model.hf.names import copied_from
from model.transformer import named_tensors
from tests.model.hf_checkpoints import (
    FP8_CONFIG,
    assert_same_tensors,
    dequantized,
    edit_json,
    mtp_tensors,
    random_tokens,
    read_tensors,
    reference_logits,
    reference_model,
    save_checkpoint,
    write_tensors,
)


@pytest.mark.parametrize("num_files", [1, 5])
@pytest.mark.parametrize("depth", [0, 1, 2])
def test_tensors_come_out_as_they_went_in(num_files: int, depth: int, tmp_path: Path) -> None:
    source, export = tmp_path / "source", tmp_path / "export"
    reference_model(num_nextn_predict_layers=max(depth, 1)).save_pretrained(source)
    tensors = read_tensors(source) | mtp_tensors(source, depth)
    write_tensors(source, tensors, num_files)
    model = load_hf(source, torch.float32)
    assert model.config.mtp_depth == depth
    save_hf(model, export, max_shard_bytes=30_000)
    assert len(list(export.glob("model-*-of-*.safetensors"))) > 2
    assert_same_tensors(read_tensors(export), tensors)
    again = load_hf(export, torch.float32)
    assert_same_tensors(named_tensors(again), named_tensors(model))
    assert again.config == model.config


@pytest.mark.parametrize(
    ("dtype", "loaded"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float32, torch.float64),
        (torch.float64, torch.float64),
    ],
)
def test_every_type_comes_out_as_it_went_in(dtype: torch.dtype, loaded: torch.dtype, tmp_path: Path) -> None:
    source, export = tmp_path / "source", tmp_path / "export"
    reference_model().save_pretrained(source)
    tensors = {
        name: tensor if index % 5 == 0 and loaded != torch.bfloat16 else tensor.to(dtype)
        for index, (name, tensor) in enumerate(read_tensors(source).items())
    }
    write_tensors(source, tensors)
    edit_json(source / "config.json", lambda config: config.update(dtype=str(dtype).removeprefix("torch.")))
    save_hf(load_hf(source, loaded), export)
    assert_same_tensors(read_tensors(export), tensors)
    assert_same_tensors(named_tensors(load_hf(export, loaded)), named_tensors(load_hf(source, loaded)))


RAGGED: dict[str, Any] = {
    "hidden_size": 136,
    "kv_lora_rank": 184,  # with 8 rotated values kv_a_proj has 192 rows: blocks of 128 and 64
    "q_lora_rank": 130,
    "moe_intermediate_size": 132,
    "intermediate_size": 260,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "n_group": 2,
    "topk_group": 1,
}


@pytest.mark.parametrize("rows", [192, 576])
def test_ragged_fp8_weights_are_dequantized_in_blocks_of_128(rows: int, tmp_path: Path) -> None:
    """Checks 576 rows with 5 rows of scales and 192 with 2.

    The dequantization of transformers rejects or misreads them.
    """
    changes = RAGGED | {"kv_lora_rank": rows - 8}
    source, plain, export = tmp_path / "source", tmp_path / "plain", tmp_path / "export"
    tensors = save_checkpoint(source, fp8=True, num_files=3, **changes)
    assert tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"].shape == ((rows + 127) // 128, 2)
    wide = dequantized(tensors)
    reference_model(**changes).save_pretrained(plain)
    write_tensors(plain, {name: tensor for name, tensor in wide.items() if "layers.2" not in name})
    model = load_hf(source, torch.float32)
    for name, tensor in named_tensors(model).items():
        assert torch.equal(tensor, wide[name]), name
    tokens_BT = random_tokens()
    reference = DeepseekV3ForCausalLM.from_pretrained(plain, dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(tokens_BT), reference_logits(reference, tokens_BT), rtol=1e-4, atol=1e-4)
    save_hf(model, export)
    assert_same_tensors(read_tensors(export), tensors)
    assert AutoConfig.from_pretrained(export).quantization_config["weight_block_size"] == [128, 128]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fp8_weights_are_saved_unchanged_for_every_type_of_loading(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path / "source", fp8=True, num_files=2, **RAGGED)
    save_hf(load_hf(tmp_path / "source", dtype), tmp_path / "export")
    assert_same_tensors(read_tensors(tmp_path / "export"), tensors)


def test_one_trained_weight_takes_the_whole_out_of_fp8(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path / "source", fp8=True, **RAGGED)
    model = load_hf(tmp_path / "source", torch.float32)
    named = named_tensors(model)
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    named[name][131, 135] *= 1.01
    save_hf(model, tmp_path / "export")
    exported = read_tensors(tmp_path / "export")
    assert not any(key.endswith("scale_inv") for key in exported)
    for key, tensor in exported.items():
        kept = tensors[key].dtype if tensors[key].dtype != torch.float8_e4m3fn else torch.float32
        assert tensor.dtype == kept, key
        assert torch.equal(tensor, named[copied_from(key) or key].to(kept)), key
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "export"), "quantization_config")


def test_a_weight_that_its_type_no_longer_holds_is_written_in_the_models(tmp_path: Path) -> None:
    reference_model().save_pretrained(tmp_path / "source")
    tensors = {name: tensor.bfloat16() for name, tensor in read_tensors(tmp_path / "source").items()}
    write_tensors(tmp_path / "source", tensors)
    model = load_hf(tmp_path / "source", torch.float32)
    named_tensors(model)["model.norm.weight"][3] = 1 + 2.0**-20
    save_hf(model, tmp_path / "export")
    exported = read_tensors(tmp_path / "export")
    assert exported["model.norm.weight"].dtype == torch.float32
    assert exported.pop("model.norm.weight")[3] == 1 + 2.0**-20
    tensors.pop("model.norm.weight")
    assert_same_tensors(exported, tensors)


def test_a_model_put_in_fp8_is_near_what_it_was(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "source", **RAGGED)
    model = load_hf(tmp_path / "source", torch.float32)
    save_hf(model, tmp_path / "export", "fp8")
    exported = read_tensors(tmp_path / "export")
    released = save_checkpoint(tmp_path / "released", fp8=True, **RAGGED)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in exported.items()} == {
        name: (tensor.dtype, tensor.shape) for name, tensor in released.items()
    }
    for name, tensor in named_tensors(load_hf(tmp_path / "export", torch.float32)).items():
        original = named_tensors(model)[name]
        # Half a step of E4M3 is 2^-4 of a value; below the smallest normal code, half of 2^-9 of the block's scale.
        bound = original.abs() * 2.0**-4 + original.abs().amax() / 448 * 2.0**-10
        assert ((tensor - original).abs() <= bound).all(), name
    save_hf(load_hf(tmp_path / "export", torch.bfloat16), tmp_path / "again", "fp8")
    assert_same_tensors(read_tensors(tmp_path / "again"), exported)


def test_scales_are_powers_of_two_if_the_checkpoints_were(tmp_path: Path) -> None:
    reference_model(**RAGGED).save_pretrained(tmp_path / "source")
    edit_json(
        tmp_path / "source" / "config.json",
        lambda config: config.update(quantization_config={**FP8_CONFIG, "scale_fmt": "ue8m0"}),
    )
    save_hf(load_hf(tmp_path / "source", torch.float32), tmp_path / "export", "fp8")
    scales = {name: tensor for name, tensor in read_tensors(tmp_path / "export").items() if name.endswith("scale_inv")}
    assert scales
    for name, tensor in scales.items():
        assert (tensor.view(torch.int32) & 0x7FFFFF == 0).all(), name
    assert AutoConfig.from_pretrained(tmp_path / "export").quantization_config["scale_fmt"] == "ue8m0"


def test_a_type_that_is_asked_for_is_the_type_of_all_but_the_bias(tmp_path: Path) -> None:
    reference = reference_model()
    reference.config.bos_token_id, reference.config.eos_token_id = 5, [6, 7]
    reference.save_pretrained(tmp_path / "source")
    save_hf(load_hf(tmp_path / "source", torch.float32), tmp_path / "export", torch.bfloat16)
    exported, original = read_tensors(tmp_path / "export"), read_tensors(tmp_path / "source")
    assert_same_tensors(exported, {name: x if name.endswith("bias") else x.bfloat16() for name, x in original.items()})
    config = AutoConfig.from_pretrained(tmp_path / "export")
    assert config.dtype == torch.bfloat16
    assert (config.bos_token_id, config.eos_token_id) == (5, [6, 7])
