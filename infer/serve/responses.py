"""Builds answers of `/v1/responses`: a list of items, whole or as named events. Imports no torch."""

import secrets
from collections.abc import Iterator
from typing import Any

from infer.serve.answers import Reply
from infer.serve.calls import ApiCall, ServedModel
from infer.serve.fields import ApiError

_PREFIXES = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
"""First characters of an item's id, by its type."""
_PARTS: dict[str, dict[str, Any]] = {
    "message": {"type": "output_text", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text"},
}
"""The one part of an item's content, by the item's type, without its text."""
_BEGINNINGS: dict[str, dict[str, Any]] = {"message": {"role": "assistant"}, "reasoning": {"summary": []}}
_DEFAULTS: dict[str, Any] = {
    **dict.fromkeys(("error", "incomplete_details", "instructions", "max_output_tokens", "previous_response_id")),
    **{"metadata": {}, "parallel_tool_calls": True, "tool_choice": "auto", "tools": [], "truncation": "disabled"},
    **{"temperature": 1.0, "text": {"format": {"type": "text"}}, "top_p": 1.0},
}
"""Fields of a response that repeat the request, unless it has them."""

_USAGE = {"prompt_tokens": "input_tokens", "completion_tokens": "output_tokens", "total_tokens": "total_tokens"}
_UNCOUNTED = {
    "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
    "output_tokens_details": {"reasoning_tokens": 0},
}


class ResponseReply(Reply):
    """The answer to a call of `/v1/responses`, which has one choice."""

    def __init__(self, call: ApiCall, served: ServedModel) -> None:
        super().__init__(call, served)
        self.id = f"resp_{secrets.token_hex(12)}"
        self._items: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._num_events = 0

    def events(self, choice: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yields the events of a choice. Serialize each before the next, which changes its items."""
        if not self._num_events:
            yield self._event("created", response=self._response())
            yield self._event("in_progress", response=self._response())
        delta = choice["delta"]
        for kind, name in (("reasoning", "reasoning_content"), ("message", "content")):
            if delta.get(name):
                yield from self._extend_text(kind, delta[name])
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                values = {"call_id": call["id"], "name": call["function"]["name"], "arguments": ""}
                yield from self._begin("function_call", values)
            if arguments := call["function"]["arguments"]:
                self._items[-1]["arguments"] += arguments
                yield self._item_event("function_call_arguments.delta", delta=arguments)
        if choice["finish_reason"] is not None:
            self._status = "incomplete" if choice["finish_reason"] == "length" else "completed"
            yield from self._end(self._status)
            yield self._event(self._status, response=self._response())

    def last_events(self) -> Iterator[dict[str, Any]]:
        """Yields nothing: the event of the end has the usage."""
        yield from ()

    def error_event(self, error: ApiError) -> dict[str, Any]:
        """Returns the event of an error that ends a stream."""
        return {"type": "error", "sequence_number": self._num_events, **error.values["error"], **error.values}

    def whole(self) -> dict[str, Any]:
        """Returns the answer as one object."""
        choice = self.answers[0].take()
        assert choice is not None, "the answer has ended"
        *_, last = self.events(choice)
        return dict(last["response"])

    def _extend_text(self, kind: str, text: str) -> Iterator[dict[str, Any]]:
        """Adds text to an item, which begins if it is not the last."""
        if not self._items or self._items[-1]["type"] != kind:
            yield from self._begin(kind, {**_BEGINNINGS[kind], "content": []})
            self._items[-1]["content"].append({**_PARTS[kind], "text": ""})
            yield self._item_event("content_part.added", part=self._part)
        self._part["text"] += text
        yield self._item_event(f"{self._part['type']}.delta", delta=text, **_scores_of(self._part))

    def _begin(self, kind: str, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        yield from self._end("completed")
        identity = f"{_PREFIXES[kind]}_{secrets.token_hex(12)}"
        self._items.append({"id": identity, "type": kind, "status": "in_progress", **values})
        yield self._item_event("output_item.added", item=self._items[-1])

    def _end(self, status: str) -> Iterator[dict[str, Any]]:
        """Ends the last item, if there is one."""
        if not self._items:
            return
        item = self._items[-1]
        if item["type"] == "function_call":
            yield self._item_event("function_call_arguments.done", arguments=item["arguments"], name=item["name"])
        else:
            yield self._item_event(f"{self._part['type']}.done", text=self._part["text"], **_scores_of(self._part))
            yield self._item_event("content_part.done", part=self._part)
        item["status"] = status
        yield self._item_event("output_item.done", item=item)

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._items[-1]["content"][0]
        return part

    def _event(self, kind: str, **values: object) -> dict[str, Any]:
        self._num_events += 1
        return {"type": f"response.{kind}", "sequence_number": self._num_events - 1, **values}

    def _item_event(self, kind: str, **values: object) -> dict[str, Any]:
        """Returns an event of the last item."""
        place: dict[str, Any] = {"output_index": len(self._items) - 1}
        if not kind.startswith("output_item"):
            place["item_id"] = self._items[-1]["id"]
        if "content" in self._items[-1] and "item_id" in place:
            place["content_index"] = 0
        return self._event(kind, **place, **values)

    def _response(self) -> dict[str, Any]:
        repeated = {name: (self.call.response or {}).get(name, value) for name, value in _DEFAULTS.items()}
        if self._status == "incomplete":
            repeated["incomplete_details"] = {"reason": "max_output_tokens"}
        usage = {_USAGE[name]: count for name, count in self.usage.items()} | _UNCOUNTED
        return {
            **{"id": self.id, "object": "response", "status": self._status, "store": False, **repeated},
            **{"created_at": self.head["created"], "model": self.head["model"], "output": self._items},
            "usage": None if self._status == "in_progress" else usage,
        }


def _scores_of(part: dict[str, Any]) -> dict[str, Any]:
    return {"logprobs": part["logprobs"]} if "logprobs" in part else {}
