"""Tests the adapter of vLLM against a module that stores weights and answers as vLLM does.

vLLM itself is not installed here, so that it really runs is not tested.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from infer.config import GenerateError, Sampling
from infer.engines.local import LocalEngine
from infer.engines.vllm import VllmEngine
from infer.protocol import NumberedPrompt, Request
from model.hf.convert import save_hf
from model.transformer import Transformer, named_tensors
from tests.infer.models import SMALL, make_model

PROMPTS = [NumberedPrompt(number=4, tokens=(5, 9)), NumberedPrompt(number=7, tokens=(1, 2, 3))]
REQUEST = Request(samples=2, max_new_tokens=5, sampling=Sampling(temperature=0.0), stop=frozenset((50,)))


def fused_weights(model: Transformer) -> dict[str, Tensor]:
    """Returns the weights of the main model as vLLM stores them: pairs and experts stacked, the vocabulary padded."""
    ours = {name: tensor for name, tensor in named_tensors(model).items() if f"layers.{SMALL.num_layers}." not in name}
    fused: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        prefix, _, last = name.removesuffix(".weight").rpartition(".")
        experts, _, _ = prefix.rpartition(".")
        if last == "gate_proj":
            both = torch.cat((tensor, ours[f"{prefix}.up_proj.weight"]))
            if experts.endswith(".experts"):
                fused[f"{experts}.w13_weight"] = stacked(fused.get(f"{experts}.w13_weight"), both)
            else:
                fused[f"{prefix}.gate_up_proj.weight"] = both
        elif last == "down_proj" and experts.endswith(".experts"):
            fused[f"{experts}.w2_weight"] = stacked(fused.get(f"{experts}.w2_weight"), tensor)
        elif last == "q_a_proj":
            both = torch.cat((tensor, ours[f"{prefix}.kv_a_proj_with_mqa.weight"]))
            fused[f"{prefix}.fused_qkv_a_proj.weight"] = both
        elif name in ("model.embed_tokens.weight", "lm_head.weight"):
            fused[name] = torch.cat((tensor, torch.zeros(64, tensor.shape[1], dtype=tensor.dtype)))
        elif last not in ("up_proj", "kv_a_proj_with_mqa"):
            fused[name] = tensor
    return {name: tensor.clone() for name, tensor in fused.items()}


def stacked(before: Tensor | None, tensor: Tensor) -> Tensor:
    return tensor[None] if before is None else torch.cat((before, tensor[None]))


class ServedModel:
    """What a worker's model offers to a function: parameters and buffers by dotted names."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.weights = weights

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter((name, nn.Parameter(tensor)) for name, tensor in self.weights.items())

    def named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())


class FakeLlm:
    """Answers as `vllm.LLM`, by the local engine."""

    def __init__(self, weights: Transformer, /, **arguments: Any) -> None:
        self.weights, self.arguments, self.served = weights, arguments, [ServedModel(fused_weights(weights))]

    def apply_model(self, act: Callable[[Any], Any]) -> list[Any]:
        return [act(each) for each in self.served]

    def generate(self, inputs: list[dict[str, list[int]]], parameters: list[Any], *, use_tqdm: bool) -> list[Any]:
        outputs = []
        for each, given in zip(inputs, parameters, strict=True):
            request = Request(
                samples=given.n,
                max_new_tokens=given.max_tokens,
                sampling=Sampling(temperature=given.temperature, seed=given.seed),
                stop=frozenset(given.stop_token_ids),
            )
            prompt = NumberedPrompt(number=0, tokens=tuple(each["prompt_token_ids"]))
            made = LocalEngine(self.weights, speculative=False).generate([prompt], request).rollouts
            completions = [
                SimpleNamespace(
                    index=rollout.sample,
                    token_ids=list(rollout.tokens),
                    finish_reason=rollout.finish,
                    logprobs=[
                        {token: SimpleNamespace(logprob=value), -1: SimpleNamespace(logprob=0.0)}
                        for token, value in zip(rollout.tokens, rollout.log_probs, strict=True)
                    ],
                )
                for rollout in made
            ]
            outputs.append(SimpleNamespace(outputs=completions[::-1]))
        return outputs


@pytest.fixture
def model() -> Transformer:
    return make_model(dtype=torch.bfloat16)


@pytest.fixture
def engine(model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    module = ModuleType("vllm")
    module.LLM = lambda **arguments: FakeLlm(model, **arguments)  # type: ignore[attr-defined]
    module.SamplingParams = SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    save_hf(model, tmp_path / "hf")
    return VllmEngine(tmp_path / "hf")


def served(engine: VllmEngine) -> list[ServedModel]:
    return engine._llm.served  # type: ignore[no-any-return]


def test_rollouts_are_those_of_vllm_by_prompt_and_sample(engine: VllmEngine, model: Transformer) -> None:
    made = engine.generate(PROMPTS, REQUEST).rollouts
    expected = LocalEngine(model, speculative=False).generate(PROMPTS, REQUEST).rollouts
    assert made == expected
    assert [(each.prompt, each.sample) for each in made] == [(4, 0), (4, 1), (7, 0), (7, 1)]


def test_equal_weights_pass_although_vllm_stacks_and_pads_them(engine: VllmEngine, model: Transformer) -> None:
    engine.check_weights(named_tensors(model).items())


@pytest.mark.parametrize(
    ("name", "place", "ours"),
    [
        ("model.layers.1.mlp.experts.w13_weight", (5, -1, 0), "model.layers.1.mlp.experts.5.up_proj.weight"),
        ("model.layers.1.mlp.experts.w2_weight", (2, 0, 0), "model.layers.1.mlp.experts.2.down_proj.weight"),
        ("model.layers.0.mlp.gate_up_proj.weight", (0, 0), "model.layers.0.mlp.gate_proj.weight"),
        (
            "model.layers.0.self_attn.fused_qkv_a_proj.weight",
            (-1, 0),
            "model.layers.0.self_attn.kv_a_proj_with_mqa.weight",
        ),
        ("lm_head.weight", (0, 3), "lm_head.weight"),
    ],
)
def test_flipped_bit_is_found_in_every_kind_of_tensor(
    engine: VllmEngine, model: Transformer, name: str, place: tuple[int, ...], ours: str
) -> None:
    served(engine)[0].weights[name].view(torch.int16)[place] ^= 1
    with pytest.raises(GenerateError, match=rf"^weights: worker 0 must hold {ours} as bfloat16 \["):
        engine.check_weights(named_tensors(model).items())


def test_missing_tensor_and_sharded_weights_are_refused(engine: VllmEngine, model: Transformer) -> None:
    served(engine).append(served(engine)[0])
    with pytest.raises(GenerateError, match=r"^vllm: tensor_parallel_size must be 1 .* is 2; nearest valid: 1$"):
        engine.check_weights(named_tensors(model).items())
    del served(engine)[1], served(engine)[0].weights["model.norm.weight"]
    with pytest.raises(GenerateError, match=r"^weights: worker 0 must hold model\.norm\.weight .* no such tensor$"):
        engine.check_weights(named_tensors(model).items())


def test_sampling_whose_log_probs_vllm_changes_is_refused(engine: VllmEngine) -> None:
    request = Request(samples=1, max_new_tokens=1, sampling=Sampling(temperature=1.0, top_p=0.9))
    with pytest.raises(GenerateError, match=r"^top_p: must be 1\.0 with vllm, .* is 0\.9; nearest valid: 1\.0$"):
        engine.generate(PROMPTS, request)


def test_engine_without_vllm_is_refused_with_other_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(GenerateError, match=r"^engine: vllm must be installed, .*; nearest valid: local or pipelined$"):
        VllmEngine(tmp_path)
