"""Defines messages, conversations and pairs of answers, and reads them from JSON. Imports no torch.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "tools": [...]}
    {"prompt": ..., "answer": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}

A prompt or an answer is a string, or a list of messages. Other fields of the object are ignored.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

from base.ranges import Range
from data.corpus import (
    DataError,
    Reader,
    describe,
    list_of,
    nearest_name,
    number_of,
    object_of,
    optional,
    refusal,
    text_of,
)
from data.special_tokens import END_THINK, THINK

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)
_ANSWERS = ("chosen", "rejected")


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolCall:
    """A call of a tool by the assistant: its name, and its arguments as JSON text."""

    name: str
    arguments: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ChatMessage:
    """A message of a conversation."""

    role: Role  # author of the message
    content: str  # text; for a tool, its output
    thoughts: str | None = None  # reasoning of the assistant before `content`; None: it did not think
    tool_calls: tuple[ToolCall, ...] = ()  # calls of the assistant after `content`


@dataclass(frozen=True, kw_only=True, slots=True)
class ToolDefinition:
    """A tool that the assistant may call: its name, its description, and its parameters as JSON text."""

    name: str
    description: str = ""
    parameters: str = "{}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversation:
    """Messages in order, of which the assistant's are trained."""

    # system messages, then user, tools and assistant; the last one is the assistant's.
    messages: tuple[ChatMessage, ...]
    tools: tuple[ToolDefinition, ...] = ()  # tools that the assistant may call
    num_context: int = 0  # number of first messages that are not trained, even if the assistant wrote them

    @property
    def trained_turns(self) -> tuple[int, ...]:
        """Numbers of the assistant's messages that are trained."""
        numbered = enumerate(self.messages[self.num_context :], self.num_context)
        return tuple(number for number, message in numbered if message.role == "assistant")


@dataclass(frozen=True, kw_only=True, slots=True)
class AnswerPair:
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Conversation  # the prompt with the preferred answer
    rejected: Conversation  # the prompt with the other answer
    margin: float = 0.0  # how much better the preferred answer is


def user(content: str) -> ChatMessage:
    """Returns a message of the user."""
    return ChatMessage(role="user", content=content)


def assistant(content: str, thoughts: str | None = None) -> ChatMessage:
    """Returns a message of the assistant."""
    return ChatMessage(role="assistant", content=content, thoughts=thoughts)


def check_order(messages: Sequence[ChatMessage], place: str = "") -> None:
    """Rejects the first message that is out of order, by DataError with its place and valid roles."""
    before: Role | None = None
    has_calls = False
    for number, message in enumerate(messages):
        match message.role:
            case "system" if before not in (None, "system"):
                broken = ("a system message must be before all others", "user")
            case "assistant" if before not in ("user", "tool"):
                broken = ("an assistant's message must follow a user's or a tool's", "user")
            case "tool" if before != "tool" and not has_calls:
                broken = ("a tool's output must follow an assistant's message with tool_calls", "user or assistant")
            case "user" if before == "tool":
                broken = ("a tool's output must be followed by the assistant", "assistant")
            case "user" if has_calls:
                broken = ("tool_calls must be followed by a tool's output", "tool")
            case _:
                before = message.role
                has_calls = bool(message.tool_calls)
                continue
        rule, valid = broken
        raise refusal(f"{place}messages[{number}].role", rule, f"{message.role!r} after {before or 'nothing'!r}", valid)


def check_role(messages: Sequence[ChatMessage], number: int, place: str, what: str, roles: Sequence[Role]) -> None:
    """Rejects a message of a list that has another role than these."""
    role = messages[number].role
    if role not in roles:
        authors = " or ".join(f"{'the' if role == 'assistant' else 'a'} {role}'s" for role in roles)
        subject = f"{place}[{number % len(messages)}].role"
        raise refusal(subject, f"the {what} must be {authors}", repr(role), roles[0])


_THOUGHTS = ("thoughts", "reasoning_content")
_COMMON_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
_CONVERSATION_HINTS = {
    "rejected": "data=preferences, which reads pairs",
    "conversations": '"messages" instead of "conversations", with "role" and "content"',
}
_FIELDS = ("messages", "tools", "prompt", "answer", "tests", *_ANSWERS, *_THOUGHTS)
_PAIR_HINTS = dict.fromkeys(("messages", "answer"), "data=chat, which reads conversations")


def read_conversation(values: Mapping[str, Any], place: str) -> Conversation:
    """Returns the conversation of an object, or raises DataError with place, field, rule and value."""
    tools = read_tools(values.get("tools"), f"{place}: tools")
    if "messages" in values:
        messages = read_messages(values["messages"], f"{place}: messages")
        return _checked(Conversation(messages=messages, tools=tools), place)
    form = ' in an object with "messages", or with "prompt" and "answer"'
    require_fields(values, place, ("prompt", "answer"), form, _CONVERSATION_HINTS)
    prompt = read_prompt(values["prompt"], f"{place}: prompt")
    answer = _read_answer(values["answer"], f"{place}: answer")
    thoughts = _read_thoughts(values, f"{place}: ")
    if thoughts is not None:
        if len(answer) > 1:
            rule = "must be a field of a message if the answer is a list of messages"
            raise refusal(f"{place}: thoughts", rule, "a field next to it", "answer[0].thoughts")
        answer = (assistant(answer[0].content, thoughts),)
    return _checked(Conversation(messages=(*prompt, *answer), tools=tools, num_context=len(prompt)), place)


def read_pair(values: Mapping[str, Any], place: str) -> AnswerPair:
    """Returns the two answers of an object, in which a number `margin` is optional."""
    require_fields(
        values, place, ("prompt", *_ANSWERS), ' in an object with "prompt", "chosen" and "rejected"', _PAIR_HINTS
    )
    tools = read_tools(values.get("tools"), f"{place}: tools")
    prompt = read_prompt(values["prompt"], f"{place}: prompt")
    pair = []
    for name in _ANSWERS:
        messages = (*prompt, *_read_answer(values[name], f"{place}: {name}"))
        conversation = Conversation(messages=messages, tools=tools, num_context=len(prompt))
        pair.append(_checked(conversation, f"{place}: {name}"))
    if pair[0] == pair[1]:
        raise refusal(f"{place}: rejected", "must differ from chosen", "equal", "leave the line out")
    margin = _read_margin(values.get("margin"), f"{place}: margin")
    return AnswerPair(chosen=pair[0], rejected=pair[1], margin=margin or 0.0)


def read_prompt(value: object, place: str) -> tuple[ChatMessage, ...]:
    """Returns the messages of a prompt: a string is one message of the user."""
    if isinstance(value, str):
        return (user(value),)
    messages = read_messages(value, place)
    check_role(messages, -1, place, "last message of a prompt", ("user", "tool"))
    return messages


def require_fields(
    values: Mapping[str, Any],
    place: str,
    required: Sequence[str],
    form: str = "",
    hints: Mapping[str, str] | None = None,
) -> None:
    """Rejects an object without one of the fields; hints are what is nearest if it has another field."""
    missing = next((name for name in required if name not in values), None)
    if missing is not None:
        near = missing.split()[0]
        if others := [name for name in values if name not in _FIELDS]:
            near = f"{near} instead of {nearest_name(near, others)}"
        near = next((hint for name, hint in (hints or {}).items() if name in values), near)
        raise DataError(
            f"{place}: {missing}: must be given{form}, has the fields {', '.join(list(values)[:8]) or 'none'}; "
            f"nearest valid: {near}"
        )


def _checked(conversation: Conversation, place: str) -> Conversation:
    check_order(conversation.messages, f"{place}: ")
    check_role(conversation.messages, -1, f"{place}: messages", "last message", ("assistant",))
    return conversation


def _read_answer(value: object, place: str) -> tuple[ChatMessage, ...]:
    if isinstance(value, str):
        return (assistant(_checked_content(value, place)),)
    messages = read_messages(value, place)
    check_role(messages, 0, place, "first message of an answer", ("assistant",))
    return messages


def read_messages(value: object, place: str) -> tuple[ChatMessage, ...]:
    """Returns messages in any order."""
    if isinstance(value, str | dict):
        raise refusal(place, "must be a list of messages", describe(value), '[{"role": "user", "content": "..."}]')
    return list_of(value, place, _read_message)


def _read_message(value: object, place: str) -> ChatMessage:
    fields = object_of(value, place, _MESSAGE_READERS, ["role"])
    role = fields["role"]
    calls = fields.get("tool_calls", ())
    thoughts = _read_thoughts(fields, f"{place}.")
    for name, is_present in (("tool_calls", bool(calls)), ("thoughts", thoughts is not None)):
        if is_present and role != "assistant":
            raise refusal(f"{place}.{name}", f"must be absent for the role {role}", "given", "role assistant")
    if "content" not in fields and not calls:
        near = ", ".join(fields)
        raise DataError(f"{place}.content: must be given, has the fields {near}; nearest valid: content")
    content = fields.get("content")
    text = text_of("" if content is None and calls else content, f"{place}.content")
    checked = _checked_content(text, f"{place}.content") if role == "assistant" else text
    return ChatMessage(role=role, content=checked, thoughts=thoughts, tool_calls=calls)


def _read_role(value: object, place: str) -> str:
    if value in ROLES:
        return str(value)
    name = value if isinstance(value, str) else ""
    near = _COMMON_ROLES.get(name) or nearest_name(name, ROLES, "user")
    raise refusal(place, f"must be one of {', '.join(ROLES)}", json.dumps(value), near)


def _checked_content(text: str, place: str) -> str:
    """Rejects thoughts within an answer's text, which would be trained as text instead of special tokens."""
    if text.lstrip().startswith(THINK) and END_THINK in text:
        rule = f"must not begin with {THINK}, because text never becomes special tokens"
        raise DataError(f'{place}: {rule}, does; nearest valid: a field "thoughts" with the text before {END_THINK}')
    return text


def _read_thoughts(values: Mapping[str, Any], prefix: str) -> str | None:
    names = [name for name in _THOUGHTS if values.get(name) is not None]
    if len(names) > 1:
        raise refusal(f"{prefix}{names[1]}", f"must be absent if {names[0]} is given", "given", f"{names[0]} alone")
    return text_of(values[names[0]], f"{prefix}{names[0]}") if names else None


def _function_of(value: object, place: str, readers: Mapping[str, Reader | None], required: Sequence[str]) -> Any:
    """Returns the fields of an object, or of the object that its field `function` is."""
    if not (isinstance(value, dict) and "function" in value):
        return object_of(value, place, {"type": None, **readers}, required)
    function = partial(object_of, readers=readers, required=required)
    return object_of(value, place, {"type": None, **dict.fromkeys(readers), "function": function})["function"]


def _json_text(value: object, place: str) -> str:
    if not isinstance(value, dict):
        raise refusal(place, "must be an object", describe(value), "{}")
    return json.dumps(value, ensure_ascii=False)


def _read_call(value: object, place: str) -> ToolCall:
    return ToolCall(**_function_of(value, place, _CALL_READERS, ("name", "arguments")))


def _read_tool(value: object, place: str) -> ToolDefinition:
    return ToolDefinition(**_function_of(value, place, _TOOL_READERS, ("name",)))


_CALL_READERS: Mapping[str, Reader | None] = {
    "id": None,
    "index": None,
    "name": text_of,
    "arguments": lambda value, place: (_json_text if isinstance(value, dict) else text_of)(value, place),
}
_TOOL_READERS: Mapping[str, Reader | None] = {
    "name": text_of,
    "description": lambda value, place: text_of(value or "", place),
    "parameters": lambda value, place: _json_text(value or {}, place),
    "strict": None,
}
_MESSAGE_READERS: Mapping[str, Reader | None] = {
    "role": _read_role,
    "content": optional(text_of),
    **dict.fromkeys(_THOUGHTS, optional(text_of)),
    "tool_calls": partial(list_of, read=_read_call, can_be_empty=True),
    "tool_call_id": None,
    "name": None,
}
read_tools = partial(list_of, read=_read_tool, can_be_empty=True)
_read_margin = optional(partial(number_of, limits=Range("that is finite", lambda value: True)))
