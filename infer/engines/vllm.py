"""Continues prompts with vLLM, an optional package, from an exported Hugging Face folder.

Needs vLLM 0.11 or later (`pip install vllm`), which brings its own torch. Token ids go in and come out.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from infer.config import Finish, GenerateError, Sampling, Statistics, check
from infer.protocol import NumberedPrompt, Request, Rollouts, Sample
from model.hf.config import read_config


class VllmEngine:
    """An engine that hands prompts to vLLM in this process.

    Its numbers differ from those of training in the last bits, and a seed draws other tokens than with the other
    engines.
    """

    def __init__(self, folder: Path, dtype: str = "bfloat16", options: Mapping[str, Any] | None = None) -> None:
        """Loads the weights into vLLM, or raises `GenerateError` if it is not installed."""
        self._vllm = _import()
        self._config = read_config(folder)
        self._llm = self._vllm.LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            dtype=dtype,
            enable_prefix_caching=False,
            logprobs_mode="processed_logprobs",
            **(options or {}),
        )

    def check_weights(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Compares the weights of vLLM with others, except for MTP modules, which vLLM leaves out.

        Raises `GenerateError` for the first tensor that differs or is missing, or if tensors are sharded over several
        GPUs.
        """
        layers = tuple(f"model.layers.{layer}." for layer in range(self._config.num_layers))
        ours = {
            name: tensor for name, tensor in tensors if name.startswith(layers) or not name.startswith("model.layers.")
        }
        workers = self._llm.apply_model(ServedDigests({name: tuple(tensor.shape) for name, tensor in ours.items()}))
        if len(workers) > 1:
            rule = "tensor_parallel_size must be 1 to compare weights, because shards have other hashes"
            raise GenerateError.broken("vllm", rule, len(workers), "1")
        for name, tensor in ours.items():
            expected = TensorDigest.of(tensor)
            digest = workers[0].get(name)
            if digest != expected:
                holds = "no such tensor" if digest is None else str(digest)
                raise GenerateError(f"weights: worker 0 must hold {name} as {expected}, holds {holds}")

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`."""
        if request.record_routes:
            raise GenerateError(
                "record_routes: must be false with vllm, which does not report experts, is true; nearest valid: false"
            )
        plain = Request(samples=1, max_new_tokens=0, sampling=request.sampling)
        for name in ("logit_bias", "constraint", "num_alternatives", "scores_prompt"):
            if getattr(request, name) != getattr(plain, name):
                raise GenerateError(f"{name}: must be left out with vllm, whose adapter does not pass it on")
        tokens = [prompt.tokens for prompt in prompts]
        check(self._config, tokens, request.max_new_tokens, speculative=False, batch_size=1)
        _check_sampling(request.sampling)
        parameters = [self._parameters(prompt, request) for prompt in prompts]
        inputs = [{"prompt_token_ids": list(prompt.tokens)} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        rollouts = [
            _rollout(prompt, sample, completion)
            for prompt, output in zip(prompts, outputs, strict=True)
            for sample, completion in enumerate(sorted(output.outputs, key=lambda output: output.index))
        ]
        count = sum(len(rollout.tokens) for rollout in rollouts)
        return Rollouts(rollouts=tuple(rollouts), statistics=Statistics(passes=count, tokens=count))

    def _parameters(self, prompt: NumberedPrompt, request: Request) -> Any:
        sampling = request.sampling
        return self._vllm.SamplingParams(
            n=request.samples,
            temperature=sampling.temperature,
            top_k=sampling.top_k or 0,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
            repetition_penalty=sampling.repetition_penalty,
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            max_tokens=min(request.max_new_tokens, self._config.max_position_tokens - len(prompt.tokens)),
            stop_token_ids=sorted(request.stop),
            ignore_eos=True,
            seed=(sampling.seed + prompt.number * 0x9E3779B97F4A7C15 + request.step * 0x8CB92BA72F3D8DD7) % 2**63,
            logprobs=0,
            detokenize=False,
        )


def _import() -> ModuleType:
    try:
        return import_module("vllm")
    except ImportError as error:
        raise GenerateError(
            f"engine: vllm must be installed, cannot be imported ({error}); nearest valid: local or pipelined"
        ) from error


def _check_sampling(sampling: Sampling) -> None:
    """Rejects a sampling whose log-probabilities vLLM reports only after filters."""
    plain = Sampling(temperature=sampling.temperature, seed=sampling.seed)
    changed = next((name for name in Sampling.__slots__ if getattr(sampling, name) != getattr(plain, name)), None)
    if changed is not None:
        rule = f"must be {getattr(plain, changed)} with vllm, which reports log-probabilities after it"
        raise GenerateError.broken(changed, rule, getattr(sampling, changed), getattr(plain, changed))


def _rollout(prompt: NumberedPrompt, sample: int, output: Any) -> Sample:
    finish: Finish = "stop" if output.finish_reason == "stop" else "length"
    tokens = tuple(output.token_ids)
    return Sample(
        prompt=prompt.number,
        sample=sample,
        tokens=tokens,
        log_probs=tuple(by_token[token].logprob for token, by_token in zip(tokens, output.logprobs, strict=True)),
        finish=finish,
    )


_FUSED_EXPERTS = re.compile(r"(.*\.experts)(?:\.\w+)*\.(w13|w2)_weight")
_FUSED_PAIR = re.compile(r"(.*)\.gate_up_proj\.weight")
_FUSED_LATENT = re.compile(r"(.*)\.(?:fused_qkv_a_proj|fused_qkv_a_proj_with_mqa)\.weight")


@dataclass(frozen=True, slots=True)
class TensorDigest:
    """SHA-256 of a tensor's bytes in row-major order, with its type and shape."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)} with SHA-256 {self.sha256[:12]}..."

    @classmethod
    def of(cls, tensor: Tensor) -> "TensorDigest":
        """Hashes a tensor of any device."""
        content = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy().tobytes()
        return cls(str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), hashlib.sha256(content).hexdigest())


@dataclass(frozen=True, slots=True)
class ServedDigests:
    """Function that hashes a served model's weights under the names of a Hugging Face folder."""

    shapes: Mapping[str, tuple[int, ...]]

    def __call__(self, model: nn.Module) -> dict[str, TensorDigest]:
        """Returns the digests of the tensors that the model holds, by name."""
        digests = {}
        for fused_name, fused in chain(model.named_parameters(), model.named_buffers()):
            for name, tensor in _split(fused_name, fused, self.shapes):
                if name in self.shapes:
                    shape = self.shapes[name]
                    # A parameter may be padded with rows.
                    digests[name] = TensorDigest.of(tensor[: shape[0]] if tensor.shape[1:] == shape[1:] else tensor)
        return digests


def _split(name: str, tensor: Tensor, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a Hugging Face folder that a parameter holds, some side by side."""
    if match := _FUSED_EXPERTS.fullmatch(name):
        for expert, weight in enumerate(tensor):
            prefix = f"{match[1]}.{expert}"
            if match[2] == "w2":
                yield f"{prefix}.down_proj.weight", weight
            else:
                yield from _rows(weight, f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight", shapes)
    elif match := _FUSED_PAIR.fullmatch(name):
        yield from _rows(tensor, f"{match[1]}.gate_proj.weight", f"{match[1]}.up_proj.weight", shapes)
    elif match := _FUSED_LATENT.fullmatch(name):
        yield from _rows(tensor, f"{match[1]}.q_a_proj.weight", f"{match[1]}.kv_a_proj_with_mqa.weight", shapes)
    else:
        yield name, tensor


def _rows(
    tensor: Tensor, first: str, second: str, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, Tensor]]:
    if first in shapes:
        yield first, tensor[: shapes[first][0]]
        yield second, tensor[shapes[first][0] :]
