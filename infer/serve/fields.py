"""Errors in the form of OpenAI's API, and readers of the fields of a request's body. Imports no torch."""

import json
import logging
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from data.chat.messages import read_messages, read_tools
from data.corpus import (
    Reader,
    choice_of,
    decode_json,
    describe,
    list_of,
    number_of,
    object_of,
    refusal,
    shorten,
    text_of,
)
from kernels.ranges import Between

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


def read_body(content: bytes, readers: Mapping[str, Reader | None], needed: str) -> dict[str, Any]:
    """Returns the fields of a body that are not null; raises ApiError, or DataError."""
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
    return object_of(values, BODY, readers, required=(needed,))


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
    if isinstance(message.get("content"), list):
        readers: dict[str, Reader | None] = {"type": partial(choice_of, choices=["text"]), "text": text_of}
        read = partial(object_of, readers=readers, required=("type", "text"))
        message["content"] = "".join(part["text"] for part in list_of(message["content"], f"{place}.content", read))
    return message


def _number(low: float, high: float) -> Reader:
    return partial(number_of, limits=Between(low, high))


def _integer(low: int, high: int) -> Reader:
    return partial(integer_of, low=low, high=high)


def _raw(value: object, place: str) -> object:
    return value


def _neutral(values: Mapping[str, object]) -> dict[str, Reader | None]:
    """Returns readers of fields that must have the value which changes nothing."""

    def reader(neutral: object) -> Reader:
        def read(value: object, place: str) -> object:
            is_flag = isinstance(value, bool) == isinstance(neutral, bool)
            if value != neutral or not is_flag:
                raise refusal(place, f"must be {json.dumps(neutral)}", describe(value), json.dumps(neutral))
            return value

        return read

    return {name: reader(neutral) for name, neutral in values.items()}


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
    "reasoning_effort": partial(choice_of, choices=["none", "minimal", "low", "medium", "high", "xhigh"]),
    "response_format": partial(object_of, readers=_FORMAT, required=("type",)),
    "chat_template_kwargs": partial(object_of, readers={"thinking": _flag_of, "enable_thinking": _flag_of}),
}
