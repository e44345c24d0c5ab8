"""Reads requests of completions and chats into prompts for an engine. Imports no torch."""

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from data.chat.encode import encode_any_prompt
from data.chat.messages import ToolDefinition
from data.chat.templates import ChatTemplate, Pieces
from data.corpus import DataError, describe, list_of, object_of, refusal
from data.tokenizer import Tokenizer
from infer.config import GenerateError, Sampling
from infer.protocol import Request, TokenConstraint
from infer.serve.constraint import Grammars, Structure
from infer.serve.fields import (
    BODY,
    CHAT_FIELDS,
    COMPLETION_FIELDS,
    DETOKENIZE_FIELDS,
    RESPONSE_FIELDS,
    STRUCTURES,
    TOKENIZE_FIELDS,
    ApiError,
    as_chat,
    decode_body,
    integer_of,
)

Endpoint = Literal["completions", "chat/completions", "responses"]
_READERS = {
    "completions": (COMPLETION_FIELDS, ["prompt"]),
    "chat/completions": (CHAT_FIELDS, ["messages"]),
    "responses": (RESPONSE_FIELDS, ["input"]),
}
"""Fields of each endpoint, and those that must be given."""
CONVERSIONS = {"tokenize": (TOKENIZE_FIELDS, []), "detokenize": (DETOKENIZE_FIELDS, ["tokens"])}
_NEEDED = {"stream_options": "stream", "top_logprobs": "logprobs"}
"""Fields that need another one."""
_MOST_CALLS = 2**31
_PIECE_CHARACTERS = 2**16


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedModel:
    """What requests need to know of the model.

    Attributes:
        template: of chats; None: the model answers no chats.
        thinking: whether answers to chats begin with thoughts; None follows the template.
        end_ids: token ids that end an answer.
        max_tokens: maximum number of tokens of a prompt and its answer.
        most_choices: maximum number of answers of a request.
    """

    name: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    thinking: bool | None
    end_ids: tuple[int, ...]
    vocab_size: int
    max_tokens: int
    most_choices: int
    grammars: Grammars

    def read_token(self, value: object, place: str) -> int:
        """Returns a token id of the vocabulary."""
        return integer_of(value, place, 0, self.vocab_size - 1)

    def check_name(self, name: str) -> None:
        """Rejects the name of another model."""
        if name != self.name:
            message = f"the model {name[:80]!r} does not exist; this server has {self.name!r}"
            raise ApiError(404, message, "model", "model_not_found")

    def check_length(self, *strings: str | None) -> None:
        """Rejects strings that have far too many tokens, before all of them are encoded."""
        if sum(len(text or "") for text in strings) <= 8 * self.max_tokens:
            return
        num_tokens = 0
        for text in filter(None, strings):
            for at in range(0, len(text), _PIECE_CHARACTERS):
                # The ends of pieces add a few tokens, and twice the maximum leaves room for them.
                num_tokens += len(self.tokenizer.encode(text[at : at + _PIECE_CHARACTERS]))
                if num_tokens > 2 * self.max_tokens:
                    raise self._too_long(f"more than {2 * self.max_tokens} tokens")

    def check_count(self, num_tokens: int, num_new: int) -> None:
        """Rejects more tokens than the model or its cache takes."""
        if num_tokens + num_new > self.max_tokens:
            raise self._too_long(f"{num_tokens} tokens and {num_new} new ones")

    def _too_long(self, lengths: str) -> ApiError:
        message = f"max_tokens: a prompt of {lengths} must fit into the maximum of {self.max_tokens} tokens"
        return ApiError(400, message, "max_tokens", "context_length_exceeded")


@dataclass(frozen=True, kw_only=True, slots=True)
class ApiCall:
    """A request that was read: its prompts, and how each is continued and answered.

    Attributes:
        scored_ends: token ids that end an answer and are listed with their log-probabilities, as harnesses count on.
        template: by which answers are parsed; None: they are text.
        opens_thoughts: whether the prompt ends where thoughts begin.
        most_calls: maximum number of calls of tools in an answer, which become fields; later ones are dropped.
        structure: grammar of each answer.
        response: fields that the answer repeats, of `/v1/responses`; None for other endpoints.
    """

    prompts: tuple[tuple[int, ...], ...]
    request: Request
    num_choices: int
    stop_strings: tuple[str, ...]
    is_streamed: bool
    includes_usage: bool
    echo: bool = False
    scored_ends: frozenset[int] = frozenset()
    template: ChatTemplate | None = None
    opens_thoughts: bool = False
    most_calls: int = 0
    structure: Structure | None = None
    response: Mapping[str, Any] | None = None

    def submissions(
        self, constraint: Callable[[], TokenConstraint] | None
    ) -> Iterator[tuple[tuple[int, ...], Request]]:
        """Yields the prompt and the request of each answer, with random numbers of its number."""
        for prompt in self.prompts:
            for number in range(self.num_choices):
                yield prompt, replace(self.request, step=number, constraint=constraint)


def read_call(served: ServedModel, endpoint: Endpoint, content: bytes) -> ApiCall:
    """Reads the body of a request, or raises ApiError."""
    try:
        values = decode_body(content)
        fields = object_of(values, BODY, *_READERS[endpoint])
        if endpoint == "responses":
            fields = as_chat(fields)
        served.check_name(fields.get("model", served.name))
        for field, needed in _NEEDED.items():
            if fields.get(field) and not fields.get(needed):
                raise refusal(field, f"must be absent unless {needed} is true", "given", f"{needed}=true")
        call = _read_completion(served, fields) if endpoint == "completions" else _read_chat(served, fields)
        if endpoint == "responses":
            call = replace(call, response=values)
        if call.request.max_new_tokens == 0 and not call.echo:
            field = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
            raise refusal(field, "must be at least 1 without echo", 0, 1)
    except (DataError, GenerateError) as error:
        raise ApiError.of_field(error) from error
    served.check_count(max(map(len, call.prompts)), call.request.max_new_tokens)
    return call


def convert(served: ServedModel, endpoint: str, content: bytes) -> dict[str, Any]:
    """Returns the token ids of a text or of a chat's prompt, or the text of token ids, in vLLM's form."""
    try:
        fields = object_of(decode_body(content), BODY, *CONVERSIONS[endpoint])
        served.check_name(fields.get("model", served.name))
        if endpoint == "detokenize":
            served.check_count(len(fields["tokens"]) if isinstance(fields["tokens"], list) else 0, 0)
            ids = [*list_of(fields["tokens"], "tokens", served.read_token, can_be_empty=True)]
            return {"prompt": served.tokenizer.decode(ids)}
        if ("prompt" in fields) == ("messages" in fields):
            raise refusal("prompt", "must be given without messages, or messages without it", "not", "prompt alone")
        if "messages" in fields:
            ids = [*_read_chat(served, fields).prompts[0]]
        else:
            served.check_length(fields["prompt"])
            encode = served.tokenizer.prompt if fields.get("add_special_tokens", True) else served.tokenizer.encode
            ids = encode(fields["prompt"])
    except DataError as error:
        raise ApiError.of_field(error) from error
    names = [served.tokenizer.decode([number]) for number in ids] if fields.get("return_token_strs") else None
    return {"count": len(ids), "max_model_len": served.max_tokens, "tokens": ids, "token_strs": names}


def _read_completion(served: ServedModel, fields: Mapping[str, Any]) -> ApiCall:
    prompts = _read_prompts(served, fields)
    num_choices = fields.get("n", 1)
    if fields.get("best_of", num_choices) != num_choices:
        raise refusal("best_of", "must equal n, because every answer is returned", fields["best_of"], num_choices)
    structure = _read_structure(served, fields, ())
    request = _read_request(served, fields, fields.get("max_tokens", 16), fields.get("logprobs"))
    call = ApiCall(
        prompts=prompts, request=request, echo=fields.get("echo", False), structure=structure, **_read_form(fields)
    )
    if request.num_alternatives is None:
        return call
    scored = replace(request, scores_prompt=call.echo, stop=frozenset())
    return replace(call, request=scored, scored_ends=request.stop)


def _read_chat(served: ServedModel, fields: Mapping[str, Any]) -> ApiCall:
    template = served.template
    if template is None:
        message = "this model has no chat template; start the server with chat=v3, or use /v1/completions"
        raise ApiError(400, message, "messages", "no_chat_template")
    _check_count(served, fields, 1)
    messages = fields["messages"]
    thinking = _read_thinking(served, template, fields)
    forced = _read_tool_choice(fields)
    tools = () if forced is None else fields.get("tools", ())
    calls = [call.arguments for message in messages for call in message.tool_calls]
    thoughts = [message.thoughts for message in messages]
    strings = [text for tool in tools for text in (tool.description, tool.parameters)]
    served.check_length(*(message.content for message in messages), *thoughts, *calls, *strings)
    continues = fields.get("continue_final_message", False)
    if fields.get("add_generation_prompt", not continues) == continues:
        rule = "must be true, unless continue_final_message is"
        raise refusal("add_generation_prompt", rule, json.dumps(continues), json.dumps(not continues))
    ids = encode_any_prompt(messages, template, served.tokenizer, thinking=thinking, tools=tools, continues=continues)
    prompt = tuple(ids)
    opens_thoughts = thinking and messages[-1].role != "tool" and not continues
    thoughts_end = template.thoughts.end if opens_thoughts and template.thoughts is not None else ()
    structure = _read_structure(served, fields, thoughts_end)
    if forced:
        if structure is not None:
            raise refusal("tool_choice", "must be auto or none with a structured answer", "given", "auto")
        structure = served.grammars.read_call(forced, template, thoughts_end)
    limit = max(served.max_tokens - len(prompt), 1)
    max_new_tokens = fields.get("max_completion_tokens", fields.get("max_tokens", limit))
    alternatives = fields.get("top_logprobs", 0) if fields.get("logprobs") else None
    return ApiCall(
        prompts=(prompt,),
        request=_read_request(served, fields, max_new_tokens, alternatives),
        structure=structure,
        **_read_form(fields),
        template=template,
        opens_thoughts=opens_thoughts,
        most_calls=0 if not tools else _MOST_CALLS if fields.get("parallel_tool_calls", True) else 1,
    )


def _read_form(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the form of the answers."""
    return {
        "num_choices": fields.get("n", 1),
        "stop_strings": fields.get("stop", ()),
        "is_streamed": fields.get("stream", False),
        "includes_usage": fields.get("stream_options", {}).get("include_usage", False),
    }


def _check_count(served: ServedModel, fields: Mapping[str, Any], num_prompts: int) -> None:
    """Rejects calls that the queue can never hold, before their prompts are encoded."""
    count = num_prompts * fields.get("n", 1)
    if count > served.most_choices:
        raise refusal("n", f"must ask for at most {served.most_choices} answers in a request", count, 1)


def _read_prompts(served: ServedModel, fields: Mapping[str, Any]) -> tuple[tuple[int, ...], ...]:
    """Returns the token ids of a text, of several, of a list of token ids, or of several."""
    value = fields["prompt"]
    is_list = isinstance(value, list) and value and isinstance(value[0], list | str)
    values = value if is_list else [value]
    _check_count(served, fields, len(values))
    prompts = []
    for number, prompt in enumerate(values):
        field = f"prompt[{number}]" if is_list else "prompt"
        if isinstance(prompt, str):
            served.check_length(prompt, fields.get("suffix"))
            prompts.append(tuple(served.tokenizer.prompt(prompt, fields.get("suffix"))))
        elif isinstance(prompt, list) and prompt and "suffix" not in fields:
            served.check_count(len(prompt), 0)
            prompts.append(tuple(served.read_token(item, field) for item in prompt))
        else:
            rule = f"must be text{'' if 'suffix' in fields else ' or token ids'}"
            raise refusal(field, rule, describe(prompt), '"text"')
        served.check_count(len(prompts[-1]), 0)
    return tuple(prompts)


def _read_request(
    served: ServedModel,
    fields: Mapping[str, Any],
    max_new_tokens: int,
    alternatives: int | None,
) -> Request:
    names = ("top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
    seed = fields.get("seed")
    sampling = Sampling(
        temperature=fields.get("temperature", 1.0),
        top_k=fields["top_k"] if fields.get("top_k", 0) > 0 else None,
        seed=secrets.randbits(63) if seed is None else seed % 2**64,
        **{name: fields[name] for name in names if name in fields},
    )
    stop_ids = fields.get("stop_token_ids", [])
    if not isinstance(stop_ids, list):
        raise refusal("stop_token_ids", "must be a list", describe(stop_ids), [])
    ends = () if fields.get("ignore_eos", False) else served.end_ids
    return Request(
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        stop=frozenset((*(served.read_token(item, "stop_token_ids") for item in stop_ids), *ends)),
        logit_bias=_read_bias(served, fields.get("logit_bias", {})),
        num_alternatives=alternatives,
    )


def _read_bias(served: ServedModel, value: object) -> dict[int, float]:
    if not isinstance(value, dict):
        raise refusal("logit_bias", "must be an object", describe(value), {})
    bias: dict[int, float] = {}
    for name, item in value.items():
        token = int(name) if name.isascii() and name.isdigit() and len(name) < 10 else name
        if type(item) not in (int, float) or not -100 <= item <= 100:
            raise refusal("logit_bias", "must have numbers from -100 to 100", describe(item), 0)
        bias[served.read_token(token, "logit_bias")] = float(item)
    return bias


def _read_structure(served: ServedModel, fields: Mapping[str, Any], thoughts_end: Pieces) -> Structure | None:
    """Returns the grammar of the one field that demands a structure, or None."""
    demands = {f"guided_{name}": (name, fields.get(f"guided_{name}")) for name in STRUCTURES}
    options = fields.get("structured_outputs", {})
    demands |= {f"structured_outputs.{name}": (name, options.get(name)) for name in STRUCTURES}
    anything = {"type": "object"}
    if options.get("json_object"):
        demands["structured_outputs.json_object"] = ("json", anything)
    form = fields.get("response_format", {"type": "text"})
    if ("json_schema" in form) != (form["type"] == "json_schema"):
        raise refusal("response_format.json_schema", "must be given with the type json_schema", "not", "json_schema")
    if form["type"] != "text":
        demands["response_format"] = ("json", form.get("json_schema", {}).get("schema", anything))
    chosen = [(field, kind, value) for field, (kind, value) in demands.items() if value is not None]
    if len(chosen) > 1:
        raise refusal(chosen[1][0], f"must be absent with {chosen[0][0]}", "given", chosen[0][0])
    return served.grammars.read(*chosen[0], thoughts_end) if chosen else None


def _read_thinking(served: ServedModel, template: ChatTemplate, fields: Mapping[str, Any]) -> bool:
    options = fields.get("chat_template_kwargs", {})
    default = template.thinks if served.thinking is None else served.thinking
    if "reasoning_effort" in fields:  # templates have no degrees of thought
        default = fields["reasoning_effort"] != "none"
    thinking: bool = options.get("thinking", options.get("enable_thinking", default))
    if thinking and template.thoughts is None:
        place = "chat_template_kwargs.thinking" if options else "reasoning_effort"
        value = "true" if options else fields.get(place)
        near = "false" if options else "none"
        raise refusal(place, f"must be {near}, because the model's template has no thoughts", value, near)
    return thinking


def _read_tool_choice(fields: Mapping[str, Any]) -> tuple[ToolDefinition, ...] | None:
    """Returns the tools of which one must be called; none: the model chooses. None: no tool may be called."""
    value = fields.get("tool_choice", "auto")
    if value in ("auto", "none"):
        return () if value == "auto" else None
    tools: Sequence[ToolDefinition] = fields.get("tools", ())
    function = value.get("function") if isinstance(value, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    chosen = tuple(tool for tool in tools if value == "required" or tool.name == name)
    if not chosen:
        raise refusal("tool_choice", "must be none, auto, required or one of the tools", describe(value), "auto")
    return chosen
