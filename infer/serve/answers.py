"""Builds answers of OpenAI's API from the tokens of an engine, whole or as events. Imports no torch."""

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from data.tokenizer import Tokenizer
from infer.protocol import REPLACEMENT, ChosenToken, TextStream
from infer.serve.calls import ApiCall, ServedModel
from infer.serve.fields import ApiError
from infer.serve.turn import TurnMarks, TurnParser, TurnPiece

if TYPE_CHECKING:
    from infer.continuous import SequenceUpdate

_LEAST_LOG_PROB = -9999.0  # JSON has no infinity
_RECORDS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
"""Names of the lists about tokens in `/v1/completions`."""


class AnswerBuilder:
    """One answer of a call, which grows."""

    def __init__(self, call: ApiCall, served: ServedModel, index: int, marks: TurnMarks | None) -> None:
        tokenizer = served.tokenizer
        self.index = index
        self.num_tokens = 0
        self.finish: str | None = None
        self._call = call
        self._tokenizer = tokenizer
        self._prompt = call.prompts[index // call.num_choices]
        decode = tokenizer.decode if marks is None else marks.decode
        context = tokenizer.text_context(self._prompt)
        self._stream = TextStream(decode, call.stop_strings, context)
        self._whole = TextStream(decode, (), context)  # text up to each token, for offsets
        self._offset = 0
        self._parser = None
        if marks is not None:
            self._parser = TurnParser(marks, opens_thoughts=call.opens_thoughts, parses_calls=call.most_calls > 0)
        self._has_begun = False
        self._num_calls = 0
        # What was not taken yet.
        self._text = ""
        self._tokens: list[ChosenToken] = []
        self._prompt_scores: Sequence[ChosenToken] = ()

    def push(self, news: "SequenceUpdate") -> None:
        """Adds tokens; those after a stop string or an ending token are dropped."""
        self._prompt_scores = news.prompt_scores or self._prompt_scores
        is_stopped = False
        for token in news.tokens:
            self._tokens.append(token)
            is_stopped = token.token in self._call.scored_ends
            if not is_stopped:
                self.num_tokens += 1
                self._text += self._stream.push(token.token)
                is_stopped = self._stream.is_stopped
            if is_stopped:
                break
        if news.finish is not None or is_stopped:
            self._text += self._stream.close()
            self.finish = "stop" if is_stopped else news.finish

    def take(self) -> dict[str, Any] | None:
        """Returns the choice of an event with what is new, or None if nothing can be sent yet."""
        has_scores = self._call.request.num_alternatives is not None
        if self._parser is None:
            values = self._take_text(has_scores=has_scores)
            is_new = bool(values["text"] or (has_scores and (self._tokens or not self._has_begun)))
        else:
            values = self._take_turn(self._parser, has_scores=has_scores)
            is_new = bool(values["delta"] or (has_scores and self._tokens))
        self._text = ""
        self._tokens = []
        self._has_begun = True
        if not is_new and self.finish is None:
            return None
        return {"index": self.index, **values, "finish_reason": self.finish}

    def _take_text(self, *, has_scores: bool) -> dict[str, Any]:
        text = self._text
        records: list[tuple[object, ...]] = []
        if self._call.echo and not self._has_begun:
            text = self._tokenizer.decode(self._prompt, skip_special_tokens=True) + text
            if has_scores:
                records += self._prompt_records()
        if has_scores:
            records += self._records(self._tokens, self._whole)
        lists = {name: [record[at] for record in records] for at, name in enumerate(_RECORDS)}
        return {"text": text, "logprobs": lists if has_scores else None}

    def _take_turn(self, parser: TurnParser, *, has_scores: bool) -> dict[str, Any]:
        delta = self._delta(parser.push(self._text, is_last=self.finish is not None))
        if not self._has_begun:
            delta = {"role": "assistant", "content": "", **delta}
        if self.finish == "stop" and self._num_calls:
            self.finish = "tool_calls"
        scores = {"content": [self._chat_score(token) for token in self._tokens], "refusal": None}
        return {"delta": delta, "logprobs": scores if has_scores else None}

    def _prompt_records(self) -> Iterator[tuple[object, ...]]:
        """Yields one record per prompt token; the first has no log-probability."""
        first = self._prompt[0]
        yield _token_text(self._tokenizer, first), None, None, 0
        stream = TextStream(lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True))
        self._offset += len(stream.push(first))
        yield from self._records(self._prompt_scores, stream)
        self._offset += len(stream.close())

    def _records(self, tokens: Iterable[ChosenToken], stream: TextStream) -> Iterator[tuple[object, ...]]:
        """Yields an item for each list of `_RECORDS` for each token."""
        for token in tokens:
            # The chosen token is among its alternatives. Of two tokens with one text, the more probable one counts.
            top: dict[str, float] = {}
            for number, value in (*token.alternatives, (token.token, token.log_prob)):
                top.setdefault(_token_text(self._tokenizer, number), _log_prob(value))
            yield _token_text(self._tokenizer, token.token), _log_prob(token.log_prob), top, self._offset
            self._offset += len(stream.push(token.token))

    def _delta(self, pieces: Iterable[TurnPiece]) -> dict[str, Any]:
        delta: dict[str, Any] = {}
        for kind, text in pieces:
            if kind in ("content", "thoughts"):
                name = "content" if kind == "content" else "reasoning_content"
                delta[name] = delta.get(name, "") + text
                continue
            self._num_calls += kind == "name"
            if self._num_calls > self._call.most_calls:
                continue
            calls = delta.setdefault("tool_calls", [])
            if kind == "name":
                begin = {"id": f"call_{secrets.token_hex(12)}", "type": "function"}
                calls.append({"index": self._num_calls - 1, **begin, "function": {"name": text, "arguments": ""}})
            elif calls:
                calls[-1]["function"]["arguments"] += text
            else:
                calls.append({"index": self._num_calls - 1, "function": {"arguments": text}})
        return delta

    def _chat_score(self, token: ChosenToken) -> dict[str, Any]:
        def score(number: int, log_prob: float) -> dict[str, Any]:
            content = self._tokenizer.token_bytes(number)
            text = self._tokenizer.decode([number])
            return {"token": text, "logprob": _log_prob(log_prob), "bytes": list(content)}

        top = [score(number, value) for number, value in token.alternatives]
        return {**score(token.token, token.log_prob), "top_logprobs": top}


class Reply:
    """The answers to a call, as one object or as events."""

    def __init__(self, call: ApiCall, served: ServedModel) -> None:
        self.call = call
        is_chat = call.template is not None
        self.id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._kind = "chat.completion" if is_chat else "text_completion"
        self.head = {"created": int(time.time()), "model": served.name}
        marks = None if call.template is None else TurnMarks(call.template, served.tokenizer)
        count = len(call.prompts) * call.num_choices
        self.answers = [AnswerBuilder(call, served, index, marks) for index in range(count)]

    @property
    def usage(self) -> dict[str, int]:
        """Tokens so far; a prompt with several answers counts once."""
        prompt_tokens = sum(map(len, self.call.prompts))
        completion_tokens = sum(answer.num_tokens for answer in self.answers)
        total = prompt_tokens + completion_tokens
        return {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": total}

    def events(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a choice."""
        kind = self._kind + (".chunk" if self.call.template is not None else "")
        usage = {"usage": None} if self.call.includes_usage else {}
        yield {"id": self.id, "object": kind, **self.head, "choices": [choice], **usage}

    def last_events(self) -> Iterator[dict[str, Any]]:
        """Yields the event of the usage, if it was requested."""
        if self.call.includes_usage:
            yield {**next(self.events({})), "choices": [], "usage": self.usage}

    def error_event(self, error: ApiError) -> dict[str, Any]:
        """Returns the event of an error that ends a stream."""
        return error.values

    def whole(self) -> dict[str, Any]:
        """Returns all answers as one object."""
        choices = [choice for answer in self.answers if (choice := answer.take()) is not None]
        if self.call.template is not None:
            choices = [_as_message(choice) for choice in choices]
        return {"id": self.id, "object": self._kind, **self.head, "choices": choices, "usage": self.usage}


def _as_message(choice: dict[str, Any]) -> dict[str, Any]:
    delta = choice.pop("delta")
    calls = [{name: value for name, value in call.items() if name != "index"} for call in delta.pop("tool_calls", [])]
    content = delta["content"] or (None if calls else "")
    message = {**delta, "content": content, **({"tool_calls": calls} if calls else {})}
    return {"index": choice["index"], "message": message, **choice}


def _log_prob(value: float) -> float:
    return max(value, _LEAST_LOG_PROB)


def _token_text(tokenizer: Tokenizer, number: int) -> str:
    """Returns a token's text, or its bytes in hexadecimal digits if they are no whole characters."""
    text = tokenizer.decode([number])
    if REPLACEMENT not in text:
        return text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in tokenizer.token_bytes(number))
