"""Adapts a model to lm-evaluation-harness, an optional package (`pip install '.[lm-eval]'`).

Its tasks then run on the project's own checkpoints, with the numbers that its `hf` model has on the exported folder.
Source: EleutherAI/lm-evaluation-harness 0.4.13, `lm_eval/api/model.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from data.tokenizer import Tokenizer
from evaluation.answers import Answerer
from evaluation.protocol import (
    ContinuationRequest,
    DocumentRequest,
    EvaluationAnswer,
    EvaluationError,
    EvaluationRequest,
    GenerationAnswer,
    GenerationRequest,
    LikelihoodAnswer,
)
from evaluation.run import REQUESTS_TOGETHER
from infer.config import Sampling

MAX_NEW_TOKENS = 256  # maximum number of new tokens if a task does not say it, as in the package's `hf` model
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


class HarnessModel(TemplateLM):  # type: ignore[misc]
    """A model with its tokenizer, as the package's tasks use it."""

    def __init__(self, answerer: Answerer, tokenizer: Tokenizer, *, seed: int = 0, name: str = "") -> None:
        super().__init__()
        self._answerer = answerer
        self._tokenizer = tokenizer
        self._seed = seed
        self._name = name

    @property
    def eot_token_id(self) -> int:
        """Id of the token that ends a document."""
        return self._tokenizer.special.eos

    @property
    def prefix_token_id(self) -> int:
        """Id of the token before every context: begin of sentence, or its end if the tokenizer has no begin."""
        begin = self._tokenizer.special.bos
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        """A name that differs for different tokenizers, for the package's caches."""
        return self._tokenizer.fingerprint

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the package writes into its results."""
        return {"model_name": self._name}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:  # noqa: FBT001
        """Returns the token ids of a text, after the begin of sentence unless `add_special_tokens` is false."""
        begin = self._tokenizer.special.bos
        ids = self._tokenizer.encode(string)
        return ids if begin is None or add_special_tokens is False else [begin, *ids]

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        # Contexts begin with the token that the answerer puts before them.
        asked = [
            ContinuationRequest(
                context=tuple(context[context[:1] == [self.prefix_token_id] :]),
                continuation=tuple(continuation),
                place=f"request {number}",
            )
            for number, (_, context, continuation) in enumerate(requests)
        ]
        results: list[tuple[float, bool]] = []
        for request, answer in zip(requests, self._answers(asked), strict=True):
            assert isinstance(answer, LikelihoodAnswer)
            results.append((answer.log_likelihood, answer.is_greedy))
            if request[0] is not None:
                self.cache_hook.add_partial("loglikelihood", request[0], results[-1])
        return results

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:  # noqa: FBT001, FBT002
        """Returns the log-likelihood of each document, in windows of the model's length."""
        results: list[float] = []
        asked = [DocumentRequest(text=request.args[0]) for request in requests]
        for request, answer in zip(requests, self._answers(asked), strict=True):
            assert isinstance(answer, LikelihoodAnswer)
            results.append(answer.log_likelihood)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, answer.log_likelihood)
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:  # noqa: FBT001, FBT002
        """Returns a continuation of each prompt, up to a stop string, which may be inside a token."""
        results: list[str] = []
        asked = [self._generation(*request.args) for request in requests]
        for request, answer in zip(requests, self._answers(asked), strict=True):
            assert isinstance(answer, GenerationAnswer)
            results.append(answer.continuations[0])
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """Refuses, because text never contains special tokens here."""
        rule = "must be false, as special tokens are placed by id and not by text"
        near = "the tasks maths and code of launch.evaluate with chat_template"
        raise EvaluationError.broken("apply_chat_template", rule, "true", near)

    def _generation(self, prompt: str, settings: Mapping[str, Any]) -> GenerationRequest:
        left = dict(settings)
        until = left.pop("until", None) or []
        lengths = [left.pop(name) for name in _LENGTHS if left.get(name) is not None]
        values = {name: left.pop(name) for name in _SAMPLING if left.get(name) is not None}
        samples = left.pop("do_sample", values.get("temperature", 0) > 0)
        unknown = [name for name, value in left.items() if value is not None and name not in _LENGTHS]
        if unknown:
            valid = ", ".join(("until", "do_sample", *_LENGTHS, *_SAMPLING))
            problem = f"must be some of {valid}, has {unknown[0]!r}"
            raise EvaluationError(f"generation_kwargs: {problem}; nearest valid: without")
        temperature = float(values.pop("temperature", 1.0))
        return GenerationRequest(
            prompt=prompt,
            max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            sampling=Sampling(**values, temperature=temperature if samples else 0.0, seed=self._seed),
            shows_special=False,
        )

    def _answers(self, requests: Sequence[EvaluationRequest]) -> Iterator[EvaluationAnswer]:
        for first in range(0, len(requests), REQUESTS_TOGETHER):
            part = requests[first : first + REQUESTS_TOGETHER]
            yield from self._answerer.answer(list(enumerate(part, first)))
