"""Errors in the form of OpenAI's API, and readers of the fields of a request's body. Imports no torch."""

import json
import logging
import math
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from base.ranges import Between
from data.chat.messages import ChatMessage, ToolDefinition, read_messages, read_tools
from data.corpus import (
    Reader,
    choice_of,
    decode_json,
    describe,
    list_of,
    number_of,
    object_of,
    optional,
    refusal,
    shorten,
    text_of,
)

BODY = "body: "
MOST_ALTERNATIVES = 20
STRUCTURES = ("json", "regex", "choice", "grammar")
_MOST_DEPTH = 64
_MOST_REASON = 500  # characters
_MOST_BRACKETS = 2**18  # also within strings; Python decodes a million of lists without a pause for others
_TOO_DEEP = f"it is nested more than {_MOST_DEPTH} deep"


@dataclass(eq=False)
class ApiError(Exception):
    """An error that a client receives: HTTP status, message, the field that caused it, and a code."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None

    @classmethod
    def of_field(cls, error: ValueError) -> "ApiError":
        """Returns the error about a field, which a reader refused."""
        message = str(error).removeprefix(BODY)
        field = re.match(r"[\w.\[\]]+(?=: )", message)
        return cls(400, message, None if field is None else field[0])

    @property
    def values(self) -> dict[str, Any]:
        """The error in the form of OpenAI's API."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def internal_error(status: int, sentence: str, code: str, reason: object, param: str | None = None) -> ApiError:
    """Returns an error without its reason, which is logged under an id that the client also receives."""
    number = secrets.token_hex(4)
    logging.getLogger("serve").error("error %s: %s", number, " ".join(str(reason).split())[:_MOST_REASON])
    return ApiError(status, f"{sentence}; the server's log has the reason of error {number}", param, code)


def decode_body(content: bytes) -> Any:
    """Returns the JSON of a body, of an object without the fields that are null; raises ApiError."""
    try:
        if content.count(b"[") + content.count(b"{") > _MOST_BRACKETS:
            raise ValueError(f"it has more than {_MOST_BRACKETS} lists and objects")
        values = decode_json(content)
        _check_values(values, 0)
    except (ValueError, RecursionError) as error:
        problem = _TOO_DEEP if isinstance(error, RecursionError) else shorten(str(error))
        raise ApiError(400, f"the body must be JSON: {problem}", code="invalid_json") from error
    if isinstance(values, dict):
        values = {name: value for name, value in values.items() if value is not None}
    return values


def _check_values(value: object, depth: int) -> None:
    """Rejects numbers that JSON does not have, and deep nesting, which recursive readers could not follow."""
    if depth > _MOST_DEPTH:
        raise ValueError(_TOO_DEEP)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is no finite number")
    for item in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        if isinstance(item, dict | list | float):
            _check_values(item, depth + 1)


def integer_of(value: object, place: str, low: int, high: int) -> int:
    """Returns an integer within limits."""
    if type(value) is not int or not low <= value <= high:
        raise refusal(place, f"must be an integer from {low} to {high}", shorten(repr(value)), low)
    return value


def _flag_of(value: object, place: str) -> bool:
    if not isinstance(value, bool):
        raise refusal(place, "must be true or false", shorten(repr(value)), "true")
    return value


def _strings_of(value: object, place: str, most: int) -> tuple[str, ...]:
    """Returns a string, or some, none of which is empty."""
    strings = list_of([value] if isinstance(value, str) else value, place, text_of, can_be_empty=True)
    if len(strings) > most or "" in strings:
        raise refusal(place, f"must be a string that is not empty, or at most {most}", len(strings), "one string")
    return strings


def _message_of(value: Any, place: str) -> Any:
    """Returns a message of OpenAI's API in the form of this project's chats."""
    if not isinstance(value, Mapping):
        return value
    absent = ("annotations", "refusal", "audio", "function_call")
    message = {name: item for name, item in value.items() if item is not None and (item or name not in absent)}
    if message.get("role") == "developer":
        message["role"] = "system"
    if "content" in message:
        message["content"] = _content_of(message["content"], f"{place}.content", ["text"])
    return message


def _content_of(value: object, place: str, kinds: Sequence[str]) -> object:
    """Returns the text of parts that have one of some types; other values are not changed."""
    if not isinstance(value, list):
        return value
    readers: dict[str, Reader | None] = {"type": partial(choice_of, choices=kinds), "text": text_of}
    readers |= dict.fromkeys(("annotations", "logprobs"))
    parts = list_of(value, place, partial(object_of, readers=readers, required=("type", "text")))
    return "".join(part["text"] for part in parts)


def _input_of(value: object, place: str) -> tuple[ChatMessage, ...]:
    """Returns the messages of items, of which thoughts, text and calls of the assistant become one."""
    items = [{"role": "user", "content": value}] if isinstance(value, str) else value
    messages: list[dict[str, Any]] = []
    for message in filter(None, list_of(items, place, _item_of)):
        last = messages[-1] if messages and messages[-1]["role"] == message["role"] == "assistant" else {}
        calls = message.get("tool_calls", [])
        if last and (calls or not (last["content"] or last.get("tool_calls"))):
            last.setdefault("tool_calls", []).extend(calls)  # not copied: there may be many
            last.update({name: item for name, item in message.items() if item and name != "tool_calls"})
        else:
            messages.append(message)
    return read_messages([_message_of(message, place) for message in messages], place)


def _item_of(value: Any, place: str) -> dict[str, Any] | None:
    """Returns an item of `/v1/responses` as a message, or None if it has no text."""
    kind = value.get("type", "message") if isinstance(value, dict) else "message"
    readers = _ITEMS[choice_of(kind, f"{place}.type", list(_ITEMS))]
    required = [name for name in readers if kind != "reasoning"]
    item = object_of(value, place, {**dict.fromkeys(_ITEM_NOTES), **readers}, required)
    if kind == "function_call":
        return {"role": "assistant", "content": "", "tool_calls": [item]}
    if kind == "function_call_output":
        return {"role": "tool", "content": item["output"]}
    if kind == "reasoning":
        thoughts = item.get("content")
        return {"role": "assistant", "content": "", "thoughts": thoughts} if thoughts else None
    return item


def _format_of(value: Any, place: str) -> dict[str, Any]:
    """Returns the field `text.format` as `response_format`."""
    has_schema = isinstance(value, dict) and value.get("type") == "json_schema"
    required = ("type", "schema") if has_schema else ("type",)
    form = object_of(value, place, {**_SCHEMA, "type": _FORMAT["type"]}, required)
    return {"type": form["type"], **({"json_schema": {"schema": form["schema"]}} if "schema" in form else {})}


def _functions_of(value: Any, place: str) -> tuple[ToolDefinition, ...]:
    for number, tool in enumerate(value if isinstance(value, list) else ()):
        choice_of(tool.get("type") if isinstance(tool, dict) else tool, f"{place}[{number}].type", ["function"])
    return read_tools(value, place)


def _refuse_stored(value: object, place: str) -> None:
    raise refusal(place, "must be null, because no answer is stored", describe(value), "input with all messages")


def as_chat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns fields of `/v1/responses` as those of a chat."""
    instructions = [ChatMessage(role="system", content=text) for text in (fields.get("instructions"),) if text]
    values = {
        **fields,
        "messages": (*instructions, *fields["input"]),
        "max_tokens": fields.get("max_output_tokens"),
        "response_format": fields.get("text", {}).get("format"),
        "reasoning_effort": fields.get("reasoning", {}).get("effort"),
    }
    return {name: value for name, value in values.items() if value is not None}


def _number(low: float, high: float) -> Reader:
    return partial(number_of, limits=Between(low, high))


def _integer(low: int, high: int) -> Reader:
    return partial(integer_of, low=low, high=high)


def _raw(value: object, place: str) -> object:
    return value


def _neutral_reader(neutral: object) -> Reader:
    """Returns the reader of a field that must have the value which changes nothing."""

    def read(value: object, place: str) -> object:
        is_flag = isinstance(value, bool) == isinstance(neutral, bool)
        if value != neutral or not is_flag:
            raise refusal(place, f"must be {json.dumps(neutral)}", describe(value), json.dumps(neutral))
        return value

    return read


def _neutral(values: Mapping[str, object]) -> dict[str, Reader | None]:
    return {name: _neutral_reader(neutral) for name, neutral in values.items()}


# Fields that change no answer here; clients send them by default or for bookkeeping.
_IGNORED = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"),
    *("request_id", "cache_salt"),
)
# Fields that are accepted at the value that changes nothing.
_NEUTRAL: Mapping[str, object] = {
    "skip_special_tokens": True,
    "spaces_between_special_tokens": True,
    "include_stop_str_in_output": False,
    "detokenize": True,
    "min_tokens": 0,
    "priority": 0,
    "length_penalty": 1,
    "use_beam_search": False,
    "return_token_ids": False,
    "return_tokens_as_token_ids": False,
    "bad_words": [],
}
_NEUTRAL_IN_CHATS: Mapping[str, object] = {
    "verbosity": "medium",
    "modalities": ["text"],
    "functions": [],
    "function_call": "auto",
    "best_of": 1,
    "echo": False,
    "add_special_tokens": False,
    "documents": [],
}
_LEAST_TOP_P = 1e-6  # keeps the most probable token alone; 0 means this
_TOKENS = _integer(0, 2**31)
_SEED = _integer(-(2**63), 2**63 - 1)
_EFFORT = partial(choice_of, choices=["none", "minimal", "low", "medium", "high", "xhigh"])
_SCHEMA: dict[str, Reader | None] = {"schema": _raw, "name": None, "description": None, "strict": None}
_FORMAT: dict[str, Reader | None] = {
    "type": partial(choice_of, choices=["text", "json_object", "json_schema"]),
    "json_schema": partial(object_of, readers=_SCHEMA, required=("schema",)),
}
_COMMON: dict[str, Reader | None] = {
    **dict.fromkeys(_IGNORED),
    **_neutral(_NEUTRAL),
    "model": text_of,
    "max_tokens": _TOKENS,
    "temperature": _number(0, 2),
    "top_p": lambda value, place: max(number_of(value, place, limits=Between(0, 1)), _LEAST_TOP_P),
    "top_k": _integer(-1, 2**31),
    "min_p": _number(0, 1),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "logit_bias": _raw,
    "seed": _SEED,
    "n": _integer(1, 128),
    "stop": partial(_strings_of, most=16),
    "stop_token_ids": _raw,
    "ignore_eos": _flag_of,
    "stream": _flag_of,
    "stream_options": partial(object_of, readers={"include_usage": _flag_of, "include_obfuscation": None}),
    **{f"guided_{name}": _raw for name in STRUCTURES},
    "structured_outputs": partial(object_of, readers={**dict.fromkeys(STRUCTURES, _raw), "json_object": _flag_of}),
}
COMPLETION_FIELDS: dict[str, Reader | None] = {
    **_COMMON,
    "prompt": _raw,
    "suffix": text_of,
    "echo": _flag_of,
    "logprobs": _integer(0, MOST_ALTERNATIVES),
    "best_of": _integer(1, 128),
    **_neutral({"add_special_tokens": True}),
}
CHAT_FIELDS: dict[str, Reader | None] = {
    **_COMMON,
    **_neutral(_NEUTRAL_IN_CHATS),
    "add_generation_prompt": _flag_of,
    "continue_final_message": _flag_of,
    "messages": lambda value, place: read_messages([*list_of(value, place, _message_of)], place),
    "max_completion_tokens": _TOKENS,
    "logprobs": _flag_of,
    "top_logprobs": _integer(0, MOST_ALTERNATIVES),
    "tools": read_tools,
    "tool_choice": _raw,
    "parallel_tool_calls": _flag_of,
    "reasoning_effort": _EFFORT,
    "response_format": partial(object_of, readers=_FORMAT, required=("type",)),
    "chat_template_kwargs": partial(object_of, readers={"thinking": _flag_of, "enable_thinking": _flag_of}),
}
_ITEM_NOTES = ("type", "id", "call_id", "status", "phase", "summary", "encrypted_content")
_ITEMS: dict[str, dict[str, Reader | None]] = {
    "message": {"role": _raw, "content": partial(_content_of, kinds=["input_text", "output_text"])},
    "function_call": {"name": text_of, "arguments": text_of},
    "function_call_output": {"output": partial(_content_of, kinds=["input_text"])},
    "reasoning": {"content": partial(_content_of, kinds=["reasoning_text"])},
}
"""Fields of items of `/v1/responses`, by the item's type."""
RESPONSE_FIELDS: dict[str, Reader | None] = {
    **{name: read for name, read in _COMMON.items() if name not in ("n", "max_tokens")},
    **_neutral({"background": False, "truncation": "disabled", "top_logprobs": 0}),
    **dict.fromkeys(("previous_response_id", "conversation"), _refuse_stored),
    "input": _input_of,
    "instructions": text_of,
    "max_output_tokens": _integer(1, 2**31),
    "max_tool_calls": None,  # of tools that a server runs
    "include": partial(list_of, read=partial(choice_of, choices=["reasoning.encrypted_content"]), can_be_empty=True),
    "tools": _functions_of,
    "tool_choice": lambda value, place: {"function": value} if isinstance(value, dict) else value,
    "parallel_tool_calls": _flag_of,
    "text": partial(
        object_of, readers={"format": optional(_format_of), "verbosity": optional(_neutral_reader("medium"))}
    ),
    "reasoning": partial(
        object_of,
        readers={"effort": optional(_EFFORT), "summary": None, "generate_summary": None},
    ),
    "chat_template_kwargs": CHAT_FIELDS["chat_template_kwargs"],
}
TOKENIZE_FIELDS: dict[str, Reader | None] = {
    **{name: CHAT_FIELDS[name] for name in ("model", "messages", "tools", "chat_template_kwargs")},
    **{name: CHAT_FIELDS[name] for name in ("add_generation_prompt", "continue_final_message")},
    **dict.fromkeys(("add_special_tokens", "return_token_strs"), _flag_of),
    "prompt": text_of,
}
DETOKENIZE_FIELDS: dict[str, Reader | None] = {"model": text_of, "tokens": _raw}
