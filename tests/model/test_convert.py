"""Checkpoints of transformers, loaded and written: logits, cached decoding and gradients are the same.

Shape legend: B sequences, T tokens, V vocabulary.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import DeepseekV3ForCausalLM

from model.hf.convert import load_hf, save_hf
from model.transformer import Transformer, named_tensors
from tests.model.hf_checkpoints import (
    YARN,
    assert_same_tensors,
    random_tokens,
    read_tensors,
    reference_logits,
    reference_model,
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
    "one group": {"n_group": 1, "topk_group": 1, "num_experts_per_tok": 3},
    "all groups": {"n_group": 4, "topk_group": 4},
    "top-k not divisible by groups": {"topk_group": 3, "num_experts_per_tok": 4},
    "top-k below groups": {"topk_group": 3, "num_experts_per_tok": 2},
    "groups of four": {"n_group": 2, "topk_group": 1, "num_experts_per_tok": 4},
    "no dense layer": {"first_k_dense_replace": 0},
    "all dense": {"first_k_dense_replace": 3},
    "more dense layers than layers": {"num_hidden_layers": 2, "first_k_dense_replace": 3},
    "no shared expert": {"n_shared_experts": 0},
    "three shared experts": {"n_shared_experts": 3},
    "one layer": {"num_hidden_layers": 1, "first_k_dense_replace": 0},
    "big eps": {"rms_norm_eps": 0.3},
    "other scaling of routes": {"routed_scaling_factor": 1.0},
    "other base": {"rope_theta": 50.0},
    "wide values": {"v_head_dim": 24, "qk_nope_head_dim": 4},
    "yarn released": RELEASED_YARN,
    "yarn of transformers 5": NEW_YARN,
    "yarn without mscale": yarn(),
    "yarn with all_dim only": yarn(mscale_all_dim=0.7),
    "yarn with mscale only": yarn(mscale=0.5),
    "yarn with two mscales": yarn(mscale=0.5, mscale_all_dim=0.8),
    "yarn with attention factor": yarn(mscale=0.5, mscale_all_dim=0.8, attention_factor=1.7),
    "yarn with zero mscale": yarn(mscale=0.0, mscale_all_dim=1.0),
    "yarn with other betas": yarn(beta_fast=4, beta_slow=2, factor=32.0),
    "yarn of factor one": yarn(factor=1.0, mscale=1.0, mscale_all_dim=1.0),
}


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


@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None}, RELEASED_YARN], ids=["plain", "full query", "yarn"])
def test_cached_decoding_of_transformers_equals_our_logits(changes: dict[str, Any], tmp_path: Path) -> None:
    reference, tokens_BT = reference_model(**changes), random_tokens()
    reference.save_pretrained(tmp_path)
    with torch.no_grad():
        logits_BTV = load_hf(tmp_path, torch.float32)(tokens_BT)
        read = reference(tokens_BT[:, :7], use_cache=True)
        steps = [read.logits]
        for position in range(7, tokens_BT.shape[1]):
            read = reference(
                tokens_BT[:, position : position + 1], past_key_values=read.past_key_values, use_cache=True
            )
            steps.append(read.logits)
    torch.testing.assert_close(logits_BTV, torch.cat(steps, 1), rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("name", ["released", "full query", "top-k not divisible by groups", "yarn released"])
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


@pytest.mark.parametrize("n_shared_experts", [0, 1])
def test_a_model_made_here_loads_in_transformers_with_equal_logits(n_shared_experts: int, tmp_path: Path) -> None:
    reference_model(n_shared_experts=n_shared_experts).save_pretrained(tmp_path / "source")
    loaded = load_hf(tmp_path / "source", torch.float32)
    model = Transformer(loaded.config, loaded.dispatcher, torch.float32)
    for name, tensor in named_tensors(model).items():
        tensor.copy_(named_tensors(loaded)[name])
    save_hf(model, tmp_path / "export")
    exported, info = DeepseekV3ForCausalLM.from_pretrained(tmp_path / "export", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokens_BT = random_tokens()
    with torch.no_grad():
        logits_BTV = model(tokens_BT)
    torch.testing.assert_close(logits_BTV, reference_logits(exported, tokens_BT), rtol=1e-4, atol=1e-4)
