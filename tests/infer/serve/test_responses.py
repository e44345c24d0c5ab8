"""`/v1/responses` against the client of OpenAI's package and its published schema."""

import json
from collections.abc import Iterator
from typing import Any
from unittest.mock import Mock

import httpx
import openai
import pytest
import torch
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from infer.serve.calls import read_call
from infer.serve.fields import ApiError
from tests.infer.serve.servers import TOKENIZER, RunningServer, describe, make_engine, serving

PARAMETERS: Any = {
    "type": "object",
    "properties": {"day": {"enum": ["today"]}},
    "required": ["day"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": True}
CALL: Any = {"type": "function_call", "call_id": "call_1", "name": "weather", "arguments": '{"day":"today"}'}
OUTPUT: Any = {"type": "function_call_output", "call_id": "call_1", "output": "sunny"}
TEXT_EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    torch.set_num_threads(1)
    with serving(make_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def respond(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(
        **{"model": "tiny", "input": "hello", "temperature": 0, "max_output_tokens": 12, **options}
    )


def chat(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=12, **options
    ).choices[0]


def events_of(server: RunningServer, **options: Any) -> list[dict[str, Any]]:
    """Returns the events of a stream, each checked against the published schema and the name in its `event:` line."""
    body = {"input": "hello", "temperature": 0, "max_output_tokens": 12, "stream": True, **options}
    *blocks, end = httpx.post(f"{server.url}/v1/responses", json=body).text.split("\n\n")
    assert end == ""
    events = []
    for number, block in enumerate(blocks):
        name, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert (name, event["sequence_number"]) == (f"event: {event['type']}", number)
        TypeAdapter(ResponseStreamEvent).validate_python(event, strict=True)
        events.append(event)
    return events


def without_repeats(names: list[str]) -> list[str]:
    return [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]]


def test_response_is_the_answer_of_the_chat(client: openai.OpenAI) -> None:
    answer = respond(client, instructions="Be brief.", metadata={"a": "b"})
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert answer.output_text == chat(client, messages).message.content
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"a": "b"}, 0)
    assert answer.usage.output_tokens == 12
    Response.model_validate(answer.model_dump(exclude_unset=True), strict=True)


def test_stream_has_the_events_of_a_text_in_order(server: RunningServer, client: openai.OpenAI) -> None:
    form = {"guided_regex": "[a-z]{9}"}
    events = events_of(server, **form)
    assert without_repeats([event["type"] for event in events]) == TEXT_EVENTS
    text = "".join(event["delta"] for event in events if event["type"].endswith("delta"))
    assert text == events[-1]["response"]["output"][0]["content"][0]["text"]
    whole = respond(client, extra_body=form)
    assert (text, whole.status) == (whole.output_text, "completed")
    arguments: Any = {"model": "tiny", "input": "hello", "temperature": 0}
    with client.responses.stream(**arguments, extra_body=form) as stream:
        assert stream.get_final_response().output_text == text


def test_thoughts_are_an_item_before_the_text(server: RunningServer) -> None:
    end = {str(TOKENIZER.special_id("</think>")): 2}
    options = {"temperature": 1, "seed": 1, "max_output_tokens": 60}
    events = events_of(server, reasoning={"effort": "low"}, logit_bias=end, **options)
    kinds = [item["type"] for item in events[-1]["response"]["output"]]
    assert kinds == ["reasoning", "message"]
    names = [event["type"].removeprefix("response.") for event in events]
    assert "reasoning_text.delta" in names
    assert names.index("reasoning_text.done") < names.index("output_text.delta")


def test_call_of_a_tool_is_an_item(server: RunningServer, client: openai.OpenAI) -> None:
    options: Any = {"tools": [WEATHER], "tool_choice": {"type": "function", "name": "weather"}}
    (item,) = respond(client, **options, max_output_tokens=150).output
    assert (item.type, item.name, json.loads(item.arguments)) == ("function_call", "weather", {"day": "today"})
    events = events_of(server, **options, max_output_tokens=150)
    arguments = [event["delta"] for event in events if event["type"] == "response.function_call_arguments.delta"]
    assert "".join(arguments) == item.arguments
    assert events[-1]["response"]["tools"] == [WEATHER]


def test_body_is_decoded_once_and_repeated_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Mock(side_effect=json.loads)
    monkeypatch.setattr("infer.serve.fields.decode_json", decode)
    body = {"input": "hello", "tools": [WEATHER], "metadata": {"a": None}, "top_p": None}
    call = read_call(describe(), "responses", json.dumps(body).encode())
    assert decode.call_count == 1
    assert call.response == {name: value for name, value in body.items() if name != "top_p"}


def test_input_has_the_prompt_of_the_chat() -> None:
    items = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "input_text", "text": "hello"}]},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I look"}]},
        {**CALL, "id": "fc_1", "status": "completed"},
        CALL,
        OUTPUT,
        OUTPUT,
        {"type": "reasoning", "summary": [], "encrypted_content": None},
    ]
    call = {"type": "function", "id": "call_1", "function": {"name": "weather", "arguments": CALL["arguments"]}}
    turn = {"role": "assistant", "content": "I look", "reasoning_content": "hm", "tool_calls": [call, call]}
    output = {"role": "tool", "tool_call_id": "call_1", "content": "sunny"}
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}, turn, output, output]
    bodies = {"responses": {"input": items}, "chat/completions": {"messages": messages}}
    prompts = [
        read_call(describe(), endpoint, json.dumps(body).encode()).prompts  # type: ignore[arg-type]
        for endpoint, body in bodies.items()
    ]
    assert prompts[0] == prompts[1]


def test_schema_limits_the_text(client: openai.OpenAI) -> None:
    form: Any = {"format": {"type": "json_schema", "name": "a", "schema": PARAMETERS, "strict": True}}
    answer = respond(client, text=form, max_output_tokens=60)
    assert json.loads(answer.output_text) == {"day": "today"}
    assert answer.text.format.name == "a"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id: must be null, because no answer is stored"),
        ({"conversation": {"id": "a"}}, "conversation: must be null, because no answer is stored"),
        ({"background": True}, "background: must be false"),
        ({"tools": [WEATHER, {"type": "web_search"}]}, r"tools[1].type: must be function, is web_search"),
        ({"input": [{"type": "item_reference", "id": "a"}]}, "input[0].type: must be message or function_call"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0]"),
        ({"input": [7]}, "input[0]: must be an object"),
        ({"input": []}, "input: must have at least one item"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema: must be given"),
        ({"include": ["message.output_text.logprobs"]}, "include[0]: must be reasoning.encrypted_content"),
    ],
)
def test_what_is_not_served_is_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ApiError) as refused:
        read_call(describe(), "responses", json.dumps({"input": "a", **changes}).encode())
    assert refused.value.status == 400
    assert refused.value.message.startswith(message), refused.value.message
    assert "\n" not in refused.value.message


def test_error_within_a_stream_is_raised_by_the_client(client: openai.OpenAI) -> None:
    body = {"guided_regex": "(a?){5000}a{5000}"}
    with pytest.raises(openai.APIError, match="no token can follow"):
        list(respond(client, stream=True, extra_body=body))
