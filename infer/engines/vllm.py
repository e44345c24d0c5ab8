"""Continues prompts with vLLM, an optional package, from an exported Hugging Face folder.

Needs vLLM 0.11 or later (`pip install vllm`), which brings its own torch. Token ids go in and come out.
"""

from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor

from infer.config import Finish, GenerateError, Sampling, Statistics, check
from infer.engines.weight_digests import ServedDigests, check_digests
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
        ours = {name: tensor for name, tensor in tensors if not self._is_mtp(name)}
        workers = self._llm.apply_model(ServedDigests({name: tuple(tensor.shape) for name, tensor in ours.items()}))
        if len(workers) > 1:
            raise GenerateError(
                f"vllm: tensor_parallel_size must be 1 to compare weights, because shards have other hashes, is "
                f"{len(workers)}; nearest valid: 1"
            )
        check_digests(ours.items(), workers)

    def generate(self, prompts: Sequence[NumberedPrompt], request: Request) -> Rollouts:
        """Implements `Engine.generate`."""
        if request.record_routes:
            raise GenerateError(
                "record_routes: must be false with vllm, which does not report experts, is true; nearest valid: false"
            )
        tokens = [prompt.tokens for prompt in prompts]
        check(self._config, tokens, request.max_new_tokens, speculative=False, batch_size=1)
        _check_sampling(request.sampling)
        parameters = [self._parameters(prompt, request) for prompt in prompts]
        inputs = [{"prompt_token_ids": list(prompt.tokens)} for prompt in prompts]
        outputs = self._llm.generate(inputs, parameters, use_tqdm=False)
        rollouts = [
            _rollout(prompt, sample, each)
            for prompt, output in zip(prompts, outputs, strict=True)
            for sample, each in enumerate(sorted(output.outputs, key=lambda each: each.index))
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

    def _is_mtp(self, name: str) -> bool:
        parts = name.split(".")
        return parts[:2] == ["model", "layers"] and int(parts[2]) >= self._config.num_layers


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
        raise GenerateError(
            f"{changed}: must be {getattr(plain, changed)} with vllm, which reports log-probabilities after it, is "
            f"{getattr(sampling, changed)}; nearest valid: {getattr(plain, changed)}"
        )


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
