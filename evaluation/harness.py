"""Adapts a model to lm-evaluation-harness, an optional package (`pip install '.[lm-eval]'`).

Its tasks then run on the project's own checkpoints, with the numbers that its `hf` model has on the exported folder.
Chats are rendered by the project's templates: the package passes their text around, and the adapter reads their token
ids. Source: EleutherAI/lm-evaluation-harness 0.4.13, `lm_eval/api/model.py`.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lm_eval.api.model import TemplateLM

from base.decode import decode
from data.chat.encode import encode_any_prompt
from data.chat.messages import ChatMessage
from data.chat.templates import ChatTemplate, template_jinja
from data.tokenizer import Tokenizer
from evaluation.answers import Answerer, SharedAnswerer
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
    """A model with its tokenizer, as the package's tasks use it. Without a template it refuses chats."""

    def __init__(
        self,
        answerer: Answerer | SharedAnswerer,
        tokenizer: Tokenizer,
        *,
        seed: int = 0,
        name: str = "",
        template: ChatTemplate | None = None,
    ) -> None:
        super().__init__()
        self._answerer = answerer
        self._tokenizer = tokenizer
        self._seed = seed
        self._name = name
        self._template = template
        self._chats: dict[str, tuple[int, ...]] = {}  # token ids of rendered chats, by their text

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
        """A name that differs for different tokenizers and chat templates, for the package's caches."""
        template = "" if self._template is None else template_jinja(self._template)
        return hashlib.sha256((self._tokenizer.fingerprint + template).encode()).hexdigest()

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

    def chat_template(self, chat_template: bool | str = False) -> str:  # noqa: FBT001, FBT002
        """Returns the chat template as Jinja, or nothing if chats are off, for the package's results."""
        return template_jinja(self._chat_template()) if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:  # noqa: FBT001, FBT002
        """Returns the text of a chat, of which requests read the token ids.

        Special tokens are placed by id, so text that spells one stays text.
        """
        messages = [decode(ChatMessage, message, f"messages[{n}]") for n, message in enumerate(chat_history)]
        template = self._chat_template()
        ids = encode_any_prompt(messages, template, self._tokenizer, continues=not add_generation_prompt)
        text = self._tokenizer.decode(ids)
        if self._chats.setdefault(text, tuple(ids)) != tuple(ids):
            rule = "must not spell special tokens, as two chats with different tokens have the same text"
            raise EvaluationError.broken("apply_chat_template", rule, text[:100], "other documents")
        return text

    def _chat_template(self) -> ChatTemplate:
        if self._template is None:
            rule = "must be false with weights of which no chat template is known"
            raise EvaluationError.broken("apply_chat_template", rule, "true", "chat=NAME of a template")
        return self._template

    def _chat_ids(self, text: str) -> tuple[int, ...] | None:
        """Returns the token ids of a rendered chat, or None for plain text."""
        if self._template is not None and text not in self._chats and self._is_rendered(text):
            rule = "must be false with chat templates, as cached requests have no token ids"
            raise EvaluationError.broken("cache_requests", rule, "true", "false")
        return self._chats.get(text)

    def _is_rendered(self, text: str) -> bool:
        begin = self._tokenizer.token_names["bos_token"]
        return begin is not None and text.startswith(begin)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ids = self._chat_ids(context)
        if ids is None:
            return super()._encode_pair(context, continuation)  # type: ignore[no-any-return]
        return list(ids), self._tokenizer.encode(continuation)

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
            prompt=self._chat_ids(prompt) or prompt,
            max_new_tokens=int(lengths[0]) if lengths else MAX_NEW_TOKENS,
            stop=tuple(stop for stop in ([until] if isinstance(until, str) else until) if stop),
            sampling=Sampling(**values, temperature=temperature if samples else 0.0, seed=self._seed),
            shows_special=False,
        )

    def _answers(self, requests: Sequence[EvaluationRequest]) -> Iterator[EvaluationAnswer]:
        for first in range(0, len(requests), REQUESTS_TOGETHER):
            part = requests[first : first + REQUESTS_TOGETHER]
            yield from self._answerer.answer(list(enumerate(part, first)))
