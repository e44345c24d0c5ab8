"""Checkpoints of transformers, loaded and written: logits, MTP modules, decoding, gradients and stored types.

Shape legend: B sequences, T tokens, D hidden size, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, DeepseekV3ForCausalLM

from model.hf.names import copied_from
from model.objective import CrossEntropy, LossSums, MicroBatch, loss_names
from model.pretrained import load_hf, save_hf
from model.transformer import Transformer, named_tensors
from tests.model.hf_checkpoints import (
    FP8_CONFIG,
    YARN,
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

RELEASED_YARN: dict[str, Any] = {"rope_scaling": dict(YARN)}

NEW_YARN: dict[str, Any] = {
    "rope_parameters": {
        **{key: value for key, value in YARN.items() if key != "type"},
        "rope_type": "yarn",
        "rope_theta": 10000.0,
    }
}


def yarn(**changes: Any) -> dict[str, Any]:
    plain = {key: value for key, value in YARN.items() if key not in ("mscale", "mscale_all_dim")}
    return {"rope_scaling": {**plain, **changes}}


SHAPES: dict[str, dict[str, Any]] = {
    "released": {},
    "full query": {"q_lora_rank": None},
    "one group, big eps": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3, "rms_norm_eps": 0.3},
    "top-k below groups": {"topk_group": 3, "num_experts_per_tok": 2},
    "no dense layer": {"first_k_dense_replace": 0, "n_shared_experts": 3, "v_head_dim": 24, "qk_nope_head_dim": 4},
    "all dense": {"num_hidden_layers": 2, "first_k_dense_replace": 3, "rope_theta": 50.0},
    "no shared expert": {"n_shared_experts": 0, "routed_scaling_factor": 1.0, "topk_group": 3},
    "yarn released": RELEASED_YARN,
    "yarn of transformers 5": NEW_YARN,
    "yarn without mscale": yarn(),
    "yarn with mscale only": yarn(mscale=0.5),
    "yarn with two mscales": yarn(mscale=0.5, mscale_all_dim=0.8),
    "yarn with zero mscale": yarn(mscale=0.0, mscale_all_dim=1.0),
    "yarn with other betas": yarn(beta_fast=4, beta_slow=2, factor=32.0),
}


@pytest.mark.slow
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_logits_equal_those_of_transformers_both_ways(changes: dict[str, Any], tmp_path: Path) -> None:
    reference, tokens_BT = reference_model(**changes), random_tokens()
    reference.save_pretrained(tmp_path / "source")
    expected_BTV = reference_logits(reference, tokens_BT)
    assert expected_BTV.abs().amax() > 0.5
    model = load_hf(tmp_path / "source", torch.float32)
    with torch.no_grad():
        logits_BTV = model(tokens_BT)
    assert logits_BTV.dtype == torch.float32
    torch.testing.assert_close(logits_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
    save_hf(model, tmp_path / "export")
    assert_same_tensors(read_tensors(tmp_path / "export"), read_tensors(tmp_path / "source"))
    exported_BTV = reference_logits(DeepseekV3ForCausalLM.from_pretrained(tmp_path / "export"), tokens_BT)
    torch.testing.assert_close(exported_BTV, expected_BTV, rtol=1e-6, atol=1e-6)


def reference_gradients(reference: DeepseekV3ForCausalLM) -> dict[str, Tensor]:
    """Returns gradients by released name: transformers stacks a layer's experts in two tensors, gate rows first."""
    gradients: dict[str, Tensor] = {}
    for name, weight in reference.named_parameters():
        assert weight.grad is not None, name
        prefix, _, kind = name.rpartition(".experts.")
        if kind == "gate_up_proj":
            for expert, gradient in enumerate(weight.grad):
                gate, up = gradient.chunk(2)
                gradients[f"{prefix}.experts.{expert}.gate_proj.weight"] = gate
                gradients[f"{prefix}.experts.{expert}.up_proj.weight"] = up
        elif kind == "down_proj":
            for expert, gradient in enumerate(weight.grad):
                gradients[f"{prefix}.experts.{expert}.down_proj.weight"] = gradient
        else:
            gradients[name] = weight.grad
    return gradients


def our_gradients(model: Transformer) -> dict[str, Tensor]:
    """Returns gradients by released name, from a model whose weights are replaced by their gradients."""
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    with torch.no_grad():
        for name, weight in model.named_parameters():
            gradient = gradients[name]
            assert gradient is not None, name
            weight.copy_(gradient)
    return {name: tensor for name, tensor in named_tensors(model).items() if not name.endswith("bias")}


@pytest.mark.parametrize("name", ["full query", "yarn released"])
def test_gradients_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    reference, tokens_BT = reference_model(**SHAPES[name]), random_tokens(3, 23)
    reference.save_pretrained(tmp_path)
    reference(tokens_BT, labels=tokens_BT).loss.backward()
    model = load_hf(tmp_path, torch.float32)
    logits_BTV = model(tokens_BT)
    functional.cross_entropy(logits_BTV[:, :-1].flatten(0, 1), tokens_BT[:, 1:].flatten()).backward()
    expected, made = reference_gradients(reference), our_gradients(model)
    assert made.keys() == expected.keys()
    for key, gradient in expected.items():
        assert gradient.abs().amax() > 0, key
        torch.testing.assert_close(made[key], gradient, rtol=1e-3, atol=1e-3 * float(gradient.abs().amax()), msg=key)


IGNORED = -100


def norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * weight


def mtp_by_hand(
    reference: DeepseekV3ForCausalLM, tensors: dict[str, Tensor], tokens_BT: Tensor, depth: int
) -> list[tuple[Tensor, Tensor]]:
    """Returns for each depth the head's input (BTD) and logits (BTV); the block is a layer of transformers."""
    layers = reference.config.num_hidden_layers
    length = tokens_BT.shape[1] - depth
    with torch.no_grad():
        hidden_BTD = reference.model(tokens_BT).last_hidden_state[:, :length]
    made = []
    for number in range(depth):
        prefix = f"model.layers.{layers + number}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        ahead_BT = tokens_BT[:, number + 1 : number + 1 + length]
        embedded_BTD = functional.embedding(ahead_BT, own["embed_tokens.weight"])
        both = torch.cat((norm(embedded_BTD, own["enorm.weight"]), norm(hidden_BTD, own["hnorm.weight"])), -1)
        block_output_BTD = run_block(reference, own, both @ own["eh_proj.weight"].T)
        hidden_BTD = norm(block_output_BTD, own["shared_head.norm.weight"])
        made.append((hidden_BTD, hidden_BTD @ own["shared_head.head.weight"].T))
    return made


@torch.no_grad()
def run_block(reference: DeepseekV3ForCausalLM, own: dict[str, Tensor], x_BTD: Tensor) -> Tensor:
    """Runs the last layer of transformers' model with other weights; its experts are stacked, gate rows first."""
    layer: nn.Module = reference.model.layers[-1]
    experts = [name for name in own if name.startswith("mlp.experts.")]
    number = 1 + max(int(name.split(".")[2]) for name in experts)
    state = {name: tensor for name, tensor in own.items() if name not in experts and name in layer.state_dict()}
    state["mlp.experts.gate_up_proj"] = torch.stack(
        [
            torch.cat([own[f"mlp.experts.{expert}.{kind}_proj.weight"] for kind in ("gate", "up")])
            for expert in range(number)
        ]
    )
    state["mlp.experts.down_proj"] = torch.stack(
        [own[f"mlp.experts.{expert}.down_proj.weight"] for expert in range(number)]
    )
    saved = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    layer.load_state_dict(state)
    positions = torch.arange(x_BTD.shape[1])[None]
    mask = torch.full((x_BTD.shape[1],) * 2, -torch.inf).triu(1)[None, None]
    rotation = reference.model.rotary_emb(x_BTD, positions)
    out: Tensor = layer(x_BTD, attention_mask=mask, position_ids=positions, position_embeddings=rotation)
    layer.load_state_dict(saved)
    return out


def test_mtp_logits_equal_the_formula_by_hand(tmp_path: Path) -> None:
    """Compares position by position.

    The loss of one target, and in the head's gradient the probability of every token, must be equal.
    """
    depth = 2
    reference = reference_model(num_nextn_predict_layers=depth)
    reference.save_pretrained(tmp_path)
    tensors = read_tensors(tmp_path) | mtp_tensors(tmp_path, depth)
    write_tensors(tmp_path, tensors, num_files=3)
    model = load_hf(tmp_path, torch.float32)
    assert model.config.mtp_depth == depth
    tokens_BT = random_tokens(1, 15)
    length = tokens_BT.shape[1] - depth
    inputs_BT = tuple(tokens_BT[:, number : number + length] for number in range(depth + 1))
    for number, (hidden_BTD, logits_BTV) in enumerate(mtp_by_hand(reference, tensors, tokens_BT, depth), start=1):
        factors = tuple(float(other == number) for other in range(depth + 1))
        for position in range(0, length, 4):
            targets = [torch.full((1, length), IGNORED) for _ in range(depth + 1)]
            target = (7 * position + number) % logits_BTV.shape[-1]
            targets[number][0, position] = target
            loss = model.loss(
                MicroBatch(inputs_BT=inputs_BT, targets_BT=tuple(targets)),
                CrossEntropy(factors=factors, balance=0.0),
                LossSums(loss_names(depth)),
            )
            expected_V = logits_BTV[0, position].log_softmax(-1)
            assert loss.item() == pytest.approx(-expected_V[target].item(), abs=1e-4)
            (made_VD,) = torch.autograd.grad(loss, [model.head_weight])
            error_V = expected_V.exp() - functional.one_hot(torch.tensor(target), len(expected_V))
            torch.testing.assert_close(
                made_VD, error_V[:, None] * hidden_BTD[0, position].float(), rtol=1e-4, atol=1e-4
            )


@pytest.mark.parametrize(("num_files", "depth"), [(1, 0), (5, 2)])
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
        (torch.float16, torch.float32),
        (torch.float32, torch.float64),
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


def test_fp8_weights_are_saved_unchanged_if_loaded_in_bf16(tmp_path: Path) -> None:
    tensors = save_checkpoint(tmp_path / "source", fp8=True, num_files=2, **RAGGED)
    save_hf(load_hf(tmp_path / "source", torch.bfloat16), tmp_path / "export")
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
