"""Defines messages, conversations and pairs of answers. Imports no torch."""

from dataclasses import dataclass
from typing import Literal, get_args

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
