"""Defines messages, conversations and pairs of answers, and reads them from JSON. Imports no torch.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}], "tools": [...]}
    {"prompt": ..., "answer": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}

A prompt or an answer is a string, or a list of messages. Other fields of the object are ignored.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from data.corpus import DataError, describe, list_of, nearest_name, object_of, text_of
from data.special_tokens import END_THINK, THINK

Role = Literal["system", "user", "assistant", "tool"]
ROLES: tuple[Role, ...] = get_args(Role)


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
    description: str
    parameters: str


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


def order_problem(messages: tuple[ChatMessage, ...]) -> tuple[int, str, str] | None:
    """Returns the number of the first message out of order, the rule, and valid roles, or None."""
    before = None
    for number, message in enumerate(messages):
        role = message.role
        if role == "system" and before not in (None, "system"):
            return number, "a system message must be before all others", "user"
        if role == "assistant" and before not in ("user", "tool"):
            return number, "an assistant's message must follow a user's or a tool's", "user"
        if role == "tool" and before != "tool" and not (number and messages[number - 1].tool_calls):
            return number, "a tool's output must follow an assistant's message with tool_calls", "user or assistant"
        if role == "user" and before == "tool":
            return number, "a tool's output must be followed by the assistant", "assistant"
        if before == "assistant" and messages[number - 1].tool_calls and role != "tool":
            return number, "tool_calls must be followed by a tool's output", "tool"
        before = role
    return None


THOUGHTS_FIELDS = ("thoughts", "reasoning_content")
MESSAGE_FIELDS = ("role", "content", *THOUGHTS_FIELDS, "tool_calls", "tool_call_id", "name")
CONVERSATION_FORM = 'an object with "messages", or with "prompt" and "answer"'
PAIR_FORM = 'an object with "prompt", "chosen" and "rejected"'


def read_conversation(values: Mapping[str, Any], place: str) -> Conversation:
    """Returns the conversation of an object, or raises DataError with place, field, rule and value."""
    tools = _read_tools(values.get("tools"), f"{place}: tools")
    if "messages" in values:
        messages = _read_messages(values["messages"], f"{place}: messages")
        conversation = Conversation(messages=messages, tools=tools)
    else:
        for name in ("prompt", "answer"):
            if name not in values:
                raise _no_form(values, place, CONVERSATION_FORM, name, ("messages", "prompt", "answer"))
        prompt = read_prompt(values["prompt"], f"{place}: prompt")
        answer = _read_answer(values["answer"], f"{place}: answer")
        thoughts = _read_thoughts(values, f"{place}: ")
        if thoughts is not None and len(answer) > 1:
            raise DataError(
                f"{place}: thoughts: must be a field of a message if the answer is a list of messages, is a field next "
                f"to it; nearest: answer[0].thoughts"
            )
        if thoughts is not None:
            answer = (ChatMessage(role="assistant", content=answer[0].content, thoughts=thoughts),)
        conversation = Conversation(messages=(*prompt, *answer), tools=tools, num_context=len(prompt))
    _check(conversation, place)
    return conversation


def read_pair(values: Mapping[str, Any], place: str) -> AnswerPair:
    """Returns the two answers of an object, in which a number `margin` is optional."""
    for name in ("prompt", "chosen", "rejected"):
        if name not in values:
            raise _no_form(values, place, PAIR_FORM, name, ("prompt", "chosen", "rejected"))
    tools = _read_tools(values.get("tools"), f"{place}: tools")
    prompt = read_prompt(values["prompt"], f"{place}: prompt")
    pair = []
    for name in ("chosen", "rejected"):
        messages = (*prompt, *_read_answer(values[name], f"{place}: {name}"))
        conversation = Conversation(messages=messages, tools=tools, num_context=len(prompt))
        _check(conversation, f"{place}: {name}")
        pair.append(conversation)
    if pair[0] == pair[1]:
        raise DataError(f"{place}: rejected: must differ from chosen, is equal; nearest: leave the line out")
    return AnswerPair(chosen=pair[0], rejected=pair[1], margin=_read_margin(values.get("margin"), f"{place}: margin"))


def _no_form(values: Mapping[str, Any], place: str, form: str, missing: str, names: tuple[str, ...]) -> DataError:
    others = [name for name in values if name not in names]
    field_names = ", ".join(list(values)[:8]) or "none"
    hint = f"; nearest: {missing} instead of {nearest_name(missing, others)}" if others else f"; nearest: {missing}"
    if {"chosen", "rejected"} <= set(values) and "answer" in names:
        hint = "; nearest: data=preferences, which reads pairs"
    elif "messages" in values or "answer" in values:
        hint = "; nearest: data=chat, which reads conversations"
    elif "conversations" in values and "messages" in names:
        hint = '; nearest: "messages" instead of "conversations", with "role" and "content"'
    return DataError(f"{place}: {missing}: must be given in {form}, has the fields {field_names}{hint}")


def _check(conversation: Conversation, place: str) -> None:
    messages = conversation.messages
    problem = order_problem(messages)
    if problem is not None:
        number, rule, valid = problem
        before = messages[number - 1].role if number else "nothing"
        raise DataError(
            f"{place}: messages[{number}].role: {rule}, is {messages[number].role!r} after {before!r}; nearest: {valid}"
        )
    if messages[-1].role != "assistant":
        raise DataError(
            f"{place}: messages[{len(messages) - 1}].role: the last message must be the assistant's, "
            f"is {messages[-1].role!r}; nearest: assistant"
        )


def read_prompt(value: object, place: str) -> tuple[ChatMessage, ...]:
    """Returns the messages of a prompt: a string is one message of the user."""
    if isinstance(value, str):
        return (ChatMessage(role="user", content=text_of(value, place)),)
    messages = _read_messages(value, place)
    if messages[-1].role not in ("user", "tool"):
        raise DataError(
            f"{place}[{len(messages) - 1}].role: the last message of a prompt must be a user's or a tool's, "
            f"is {messages[-1].role!r}; nearest: user"
        )
    return messages


def _read_answer(value: object, place: str) -> tuple[ChatMessage, ...]:
    if isinstance(value, str):
        return (ChatMessage(role="assistant", content=_checked_content(text_of(value, place), place)),)
    messages = _read_messages(value, place)
    if messages[0].role != "assistant":
        raise DataError(
            f"{place}[0].role: the first message of an answer must be the assistant's, is {messages[0].role!r}; "
            f"nearest: assistant"
        )
    return messages


def _read_messages(value: object, place: str) -> tuple[ChatMessage, ...]:
    if isinstance(value, str | dict):
        raise DataError(
            f"{place}: must be a list of messages, is {describe(value)}; "
            f'nearest: [{{"role": "user", "content": "..."}}]'
        )
    return tuple(_read_message(item, f"{place}[{index}]") for index, item in enumerate(list_of(value, place)))


def _read_message(value: object, place: str) -> ChatMessage:
    values = object_of(value, place, MESSAGE_FIELDS, required=("role",))
    role = _read_role(values["role"], f"{place}.role")
    calls = _read_calls(values.get("tool_calls"), f"{place}.tool_calls")
    thoughts = _read_thoughts(values, f"{place}.")
    for name, is_present in (("tool_calls", bool(calls)), ("thoughts", thoughts is not None)):
        if is_present and role != "assistant":
            raise DataError(f"{place}.{name}: must be absent for the role {role}, is given; nearest: role assistant")
    content = values.get("content")
    if content is None and calls:
        content = ""
    if "content" not in values and not calls:
        raise DataError(f"{place}.content: must be given, has the fields {', '.join(values)}; nearest: content")
    text = text_of(content, f"{place}.content")
    if role == "assistant":
        _checked_content(text, f"{place}.content")
    return ChatMessage(role=role, content=text, thoughts=thoughts, tool_calls=calls)


def _read_role(value: object, place: str) -> Role:
    for role in get_args(Role):
        if value == role:
            valid_role: Role = role
            return valid_role
    common = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant", "function": "tool"}
    name = value if isinstance(value, str) else ""
    hint = common.get(name) or nearest_name(name, ROLES, "user")
    raise DataError(f"{place}: must be one of {', '.join(ROLES)}, is {json.dumps(value)}; nearest: {hint}")


def _checked_content(text: str, place: str) -> str:
    """Rejects thoughts within an answer's text, which would be trained as text instead of special tokens."""
    if text.lstrip().startswith(THINK) and END_THINK in text:
        raise DataError(
            f"{place}: must not begin with {THINK}, because text never becomes special tokens, does; "
            f'nearest: a field "thoughts" with the text between {THINK} and {END_THINK}'
        )
    return text


def _read_thoughts(values: Mapping[str, Any], prefix: str) -> str | None:
    names = [name for name in THOUGHTS_FIELDS if values.get(name) is not None]
    if len(names) > 1:
        raise DataError(f"{prefix}{names[1]}: must be absent if {names[0]} is given; nearest: {names[0]} alone")
    return text_of(values[names[0]], f"{prefix}{names[0]}") if names else None


def _read_calls(value: object, place: str) -> tuple[ToolCall, ...]:
    if value is None or value == []:
        return ()
    return tuple(_read_call(item, f"{place}[{index}]") for index, item in enumerate(list_of(value, place)))


def _read_call(value: object, location: str) -> ToolCall:
    names = ("id", "index", "type", "function", "name", "arguments")
    values = object_of(value, location, names)
    if "function" in values:
        location = f"{location}.function"
        values = object_of(values["function"], location, ("name", "arguments"), required=("name", "arguments"))
    else:
        object_of(values, location, names, required=("name", "arguments"))
    arguments = values["arguments"]
    if isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(
        name=text_of(values["name"], f"{location}.name"), arguments=text_of(arguments, f"{location}.arguments")
    )


def _read_tools(value: object, place: str) -> tuple[ToolDefinition, ...]:
    if value is None or value == []:
        return ()
    return tuple(_read_tool(item, f"{place}[{index}]") for index, item in enumerate(list_of(value, place)))


def _read_tool(value: object, location: str) -> ToolDefinition:
    names = ("name", "description", "parameters")
    values = object_of(value, location, ("type", "function", *names))
    if "function" in values:
        location = f"{location}.function"
        values = object_of(values["function"], location, (*names, "strict"), required=("name",))
    else:
        object_of(values, location, ("type", *names), required=("name",))
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise DataError(f"{location}.parameters: must be an object, is {describe(parameters)}; nearest: {{}}")
    return ToolDefinition(
        name=text_of(values["name"], f"{location}.name"),
        description=text_of(values.get("description") or "", f"{location}.description"),
        parameters=json.dumps(parameters, ensure_ascii=False),
    )


def _read_margin(value: object, place: str) -> float:
    if value is None:
        return 0.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise DataError(f"{place}: must be a finite number, is {describe(value)}; nearest: 0")
    return float(value)
