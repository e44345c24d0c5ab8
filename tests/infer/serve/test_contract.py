"""The client of OpenAI's package against a server: every feature that the server claims, as a client uses it."""

import json
import math
import re
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

import httpx
import openai
import pytest
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.chat.encode import encode_prompt
from data.chat.messages import user
from data.chat.templates import CHAT_TEMPLATES, template_jinja
from infer.engines.local import LocalModel
from infer.protocol import TargetSequence
from infer.serve.calls import Endpoint, read_call
from infer.serve.fields import ApiError
from tests.infer.continuing import generate
from tests.infer.models import make_model
from tests.infer.serve.servers import MODEL, TOKENIZER, RunningServer, describe, make_engine, serving

PROMPT = "The server"
MESSAGES: Any = [{"role": "user", "content": "hello"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a place",
        "parameters": {
            "type": "object",
            "properties": {"day": {"enum": ["today"]}},
            "required": ["day"],
            "additionalProperties": False,
        },
    },
}
SCHEMA: Any = {
    "type": "object",
    "properties": {"a": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["a"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    torch.set_num_threads(1)
    with serving(make_engine()) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def greedy(prompt: list[int], max_new_tokens: int = 12) -> list[int]:
    made = generate(
        make_model(MODEL),
        [prompt],
        max_new_tokens=max_new_tokens,
        stop=[TOKENIZER.special.eos],
        speculative=False,
    )
    return list(made.continuations[0].tokens)


def complete(client: openai.OpenAI, **options: Any) -> Any:
    return client.completions.create(
        **{"model": "tiny", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **options}
    )


def chat(client: openai.OpenAI, **options: Any) -> Any:
    defaults = {"model": "tiny", "messages": MESSAGES, "temperature": 0, "max_tokens": 12}
    return client.chat.completions.create(**{**defaults, **options})


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_completion_is_the_text_of_generate(client: openai.OpenAI) -> None:
    answer = complete(client)
    ids = TOKENIZER.prompt(PROMPT)
    assert answer.choices[0].text == TOKENIZER.decode(greedy(ids))
    assert answer.choices[0].finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(ids), 12)
    assert answer.object == "text_completion"


def test_prompts_may_be_token_ids(client: openai.OpenAI) -> None:
    assert complete(client, prompt=TOKENIZER.prompt(PROMPT)).choices[0].text == complete(client).choices[0].text


@pytest.mark.parametrize("as_ids", [False, True])
def test_several_prompts_are_answered_in_order(client: openai.OpenAI, as_ids: bool) -> None:
    texts = ["hello", "world", "weather"]
    prompts = [TOKENIZER.prompt(text) for text in texts] if as_ids else texts
    answer = complete(client, prompt=prompts)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    alone = [complete(client, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in answer.choices] == alone


def test_streamed_text_is_the_whole_text(client: openai.OpenAI) -> None:
    events = list(complete(client, stream=True))
    assert "".join(event.choices[0].text for event in events) == complete(client).choices[0].text
    assert [event.choices[0].finish_reason for event in events][-1] == "length"
    assert len(events) > 3


def test_stream_ends_with_done(server: RunningServer) -> None:
    body = {"prompt": "hello", "max_tokens": 2, "stream": True}
    lines = httpx.post(f"{server.url}/v1/completions", json=body).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]


def test_stream_has_usage_if_requested(client: openai.OpenAI) -> None:
    events = list(complete(client, stream=True, stream_options={"include_usage": True}))
    assert events[-1].choices == []
    assert events[-1].usage.completion_tokens == 12
    assert all(event.usage is None for event in events[:-1])


def test_stop_string_across_tokens_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = complete(client, max_tokens=24).choices[0].text
    stop = whole[6:10]
    answer = complete(client, max_tokens=24, stop=["never there", stop])
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    events = list(complete(client, max_tokens=24, stop=stop, stream=True))
    assert "".join(event.choices[0].text for event in events) == answer.choices[0].text


def test_one_of_several_answers_stops_alone(client: openai.OpenAI) -> None:
    both = complete(client, n=2, temperature=1, seed=3, max_tokens=24).choices
    stop = both[0].text[4:7]
    answers = complete(client, n=2, temperature=1, seed=3, max_tokens=24, stop=stop).choices
    assert [answer.text for answer in answers] == [choice.text.split(stop)[0] for choice in both]


def test_seed_reproduces_samples(client: openai.OpenAI) -> None:
    first, again, other = (complete(client, temperature=1, seed=seed).choices[0].text for seed in (5, 5, 6))
    assert first == again != other


def test_answers_differ_without_a_seed(client: openai.OpenAI) -> None:
    assert len({complete(client, temperature=1).choices[0].text for _ in range(3)}) == 3


def test_n_answers_have_different_random_numbers(client: openai.OpenAI) -> None:
    answer = complete(client, n=3, temperature=1, seed=1)
    assert len({choice.text for choice in answer.choices}) == 3
    assert answer.usage.prompt_tokens == len(TOKENIZER.prompt(PROMPT))
    assert answer.choices[0].text == complete(client, temperature=1, seed=1).choices[0].text


def test_best_of_other_than_n_is_refused(client: openai.OpenAI) -> None:
    assert len(complete(client, n=2, best_of=2, temperature=1).choices) == 2
    with pytest.raises(openai.BadRequestError, match="best_of"):
        complete(client, n=1, best_of=2)


def log_probs(ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return make_model(MODEL)(torch.tensor([ids]))[0].log_softmax(-1)


def test_logprobs_are_those_of_the_model(client: openai.OpenAI) -> None:
    scores = complete(client, logprobs=3, temperature=0.5, seed=2).choices[0].logprobs
    assert len(scores.tokens) == len(scores.token_logprobs) == len(scores.text_offset) == 12
    prompt = TOKENIZER.prompt(PROMPT)
    logs_V = log_probs(prompt)[-1]
    top = sorted(scores.top_logprobs[0].values(), reverse=True)
    assert top[:3] == pytest.approx(logs_V.topk(3).values.tolist(), abs=1e-9)
    assert any(math.isclose(scores.token_logprobs[0], value, abs_tol=1e-9) for value in logs_V.tolist())


def test_logprobs_0_gives_the_chosen_tokens_alone(client: openai.OpenAI) -> None:
    scores = complete(client, logprobs=0).choices[0].logprobs
    assert [list(top.values()) for top in scores.top_logprobs] == [[value] for value in scores.token_logprobs]


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_the_prompt(client: openai.OpenAI, max_tokens: int) -> None:
    ids = TOKENIZER.prompt("hello, world; 你好")
    choice = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=max_tokens).choices[0]
    assert choice.text.startswith("hello, world; 你好")
    assert len(choice.logprobs.tokens) == len(ids) + max_tokens
    expected = log_probs(ids)[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-9)
    best = [max(top.values()) for top in choice.logprobs.top_logprobs[1 : len(ids)]]
    assert best == pytest.approx(log_probs(ids)[:-1].max(-1).values.tolist(), abs=1e-9)


def parsed_by_harness(answer: dict[str, Any], context_lengths: list[int]) -> list[tuple[float, bool]]:
    """Returns what `local-completions` of lm-evaluation-harness 0.4.13 reads, by its own code where it is installed."""
    try:
        from lm_eval.models.openai_completions import LocalCompletionsAPI
    except ImportError:
        pass
    else:
        return LocalCompletionsAPI.parse_logprobs(answer, ctxlens=context_lengths)
    parsed = []
    for choice, length in zip(answer["choices"], context_lengths, strict=True):
        scores = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        is_greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
        parsed.append((sum(scores), is_greedy))
    return parsed


def test_harness_reads_the_scores_of_an_evaluation(server: RunningServer) -> None:
    context = TOKENIZER.prompt("The server answers")
    likely = [*context, *greedy(context, 3)]
    sequences = [likely, [*context, *TOKENIZER.encode(": hello")], [*context, *TOKENIZER.encode(" 你好")]]
    lengths = [len(context)] * 3
    body = {"prompt": sequences, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    answer = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", **body}).json()
    targets = [TargetSequence(tokens=tuple(ids), num_targets=len(ids) - len(context)) for ids in sequences]
    scores = LocalModel(make_model(MODEL), batch_size=4).score(targets)
    expected = [(pytest.approx(sum(score.log_probs), abs=1e-9), all(score.are_greedy)) for score in scores]
    assert parsed_by_harness(answer, lengths) == expected
    assert [is_greedy for _, is_greedy in expected] == [True, False, False]


def test_token_that_ends_a_scored_answer_is_listed(client: openai.OpenAI) -> None:
    """lm-evaluation-harness drops the last token of the list as the generated one."""
    ids = TOKENIZER.prompt(PROMPT)
    end = {str(TOKENIZER.special.eos): 100}
    choice = complete(client, prompt=ids, echo=True, logprobs=1, max_tokens=4, logit_bias=end).choices[0]
    assert (choice.text, choice.finish_reason) == (PROMPT, "stop")
    assert len(choice.logprobs.tokens) == len(ids) + 1
    assert complete(client, max_tokens=4, logit_bias=end).choices[0].text == ""


def test_echo_alone_prefixes_the_prompt(client: openai.OpenAI) -> None:
    assert complete(client, echo=True).choices[0].text == PROMPT + complete(client).choices[0].text


def test_logit_bias_forces_and_forbids(client: openai.OpenAI) -> None:
    (number,) = TOKENIZER.encode("W")
    assert complete(client, logit_bias={str(number): 100}, max_tokens=3).choices[0].text == "WWW"
    first = greedy(TOKENIZER.prompt(PROMPT), 1)[0]
    biased = complete(client, logit_bias={str(first): -100}, max_tokens=1, logprobs=0).choices[0]
    assert biased.text != TOKENIZER.decode([first])


def test_frequency_penalty_changes_repetition(client: openai.OpenAI) -> None:
    (number,) = TOKENIZER.encode("W")
    answer = complete(client, logit_bias={str(number): 4}, frequency_penalty=2, max_tokens=12).choices[0].text
    assert answer.count("W") < complete(client, logit_bias={str(number): 4}, max_tokens=12).choices[0].text.count("W")


def test_chat_is_the_greedy_answer_to_the_template(client: openai.OpenAI) -> None:
    answer = chat(client)
    template = describe().template
    assert template is not None
    ids = encode_prompt([user("hello")], template, TOKENIZER)
    assert answer.choices[0].message.content == TOKENIZER.decode(greedy(ids))
    assert answer.choices[0].message.role == "assistant"
    assert answer.usage.prompt_tokens == len(ids)


def test_chat_content_may_be_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    answers = [chat(client, messages=[{"role": "user", "content": content}]) for content in ("hello", parts)]
    assert answers[0].choices[0].message.content == answers[1].choices[0].message.content


def test_streamed_chat_is_the_whole_answer(client: openai.OpenAI) -> None:
    events = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == chat(client).choices[0].message.content
    assert events[-1].usage.total_tokens > 12


def test_chat_logprobs_have_bytes_and_alternatives(client: openai.OpenAI) -> None:
    answer = chat(client, logprobs=True, top_logprobs=2)
    content = answer.choices[0].logprobs.content
    assert len(content) == 12
    assert [len(item.top_logprobs) for item in content] == [2] * 12
    # A greedy token is the most probable one.
    assert [item.logprob for item in content] == [item.top_logprobs[0].logprob for item in content]
    text = b"".join(bytes(item.bytes) for item in content).decode(errors="replace")
    assert text == answer.choices[0].message.content


def test_max_completion_tokens_limits_a_chat(client: openai.OpenAI) -> None:
    answer = chat(client, max_completion_tokens=5, max_tokens=None)
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "length"


def test_thoughts_are_reasoning_content(client: openai.OpenAI) -> None:
    end = TOKENIZER.special_id("</think>")
    options = {"chat_template_kwargs": {"thinking": True}}
    thinking = chat(client, extra_body=options).choices[0].message
    assert thinking.reasoning_content
    assert not thinking.content
    message = chat(client, extra_body=options, logit_bias={str(end): 100}, max_tokens=3).choices[0].message
    assert message.content == "</think></think>"
    assert not hasattr(message, "reasoning_content")


def test_json_schema_limits_the_answer(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA, "strict": True}}
    answer = chat(client, response_format=form, max_tokens=60).choices[0]
    assert json.loads(answer.message.content)["a"] in range(1, 10)
    assert answer.finish_reason == "stop"


def test_choice_and_regex_limit_a_completion(client: openai.OpenAI) -> None:
    options: list[tuple[dict[str, Any], list[str]]] = [
        ({"guided_choice": ["yes", "no"]}, ["yes", "no"]),
        ({"structured_outputs": {"regex": "a{3}b"}}, ["aaab"]),
    ]
    for body, texts in options:
        answer = complete(client, extra_body=body, temperature=1).choices[0]
        assert answer.text in texts
        assert answer.finish_reason == "stop"


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_tool_choice_demands_a_call(client: openai.OpenAI, choice: Any, streamed: bool) -> None:
    options = {"tools": [WEATHER], "tool_choice": choice, "max_tokens": 150, "temperature": 1, "seed": 1}
    if streamed:
        calls = [
            call for event in chat(client, stream=True, **options) for call in event.choices[0].delta.tool_calls or []
        ]
        assert [call.function.name for call in calls if call.id] == ["weather"]
        arguments = "".join(call.function.arguments for call in calls)
    else:
        answer = chat(client, **options).choices[0]
        assert answer.finish_reason == "tool_calls"
        assert answer.message.content is None
        (call,) = answer.message.tool_calls
        assert call.function.name == "weather"
        arguments = call.function.arguments
    assert json.loads(arguments) == {"day": "today"}


def test_call_and_output_of_a_tool_continue_the_chat(client: openai.OpenAI) -> None:
    options = {"tools": [WEATHER], "tool_choice": "required", "max_tokens": 150, "seed": 1}
    message = chat(client, **options).choices[0].message
    output = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "sunny"}
    answer = chat(client, messages=[*MESSAGES, message.model_dump(), output], tools=[WEATHER])
    assert answer.choices[0].message.content


@pytest.mark.parametrize("streamed", [False, True])
def test_parallel_tool_calls_false_gives_the_first_call_alone(client: openai.OpenAI, streamed: bool) -> None:
    form = CHAT_TEMPLATES.get("v3_1").tools
    names = ("calls_begin", "call_begin", "separator", "call_end", "calls_end")
    begin, call, middle, end, last = (
        "".join(f"<[{TOKENIZER.special_id(piece)}]>" for piece in getattr(form, name)) for name in names
    )
    calls = "".join(f'{call} "{name}" {middle} "{{}}" {end}' for name in ("one", "two"))
    options = {"tools": [WEATHER], "extra_body": {"guided_grammar": f"start: {begin} {calls} {last}"}, "max_tokens": 60}
    for is_parallel, expected in ((True, ["one", "two"]), (False, ["one"])):
        answer = chat(client, **options, parallel_tool_calls=is_parallel, stream=streamed)
        if streamed:
            deltas = [event.choices[0].delta for event in answer]
            parts = [part for delta in deltas for part in delta.tool_calls or ()]
            assert [part.index for part in parts if part.id] == list(range(len(expected)))
        else:
            parts = answer.choices[0].message.tool_calls
        assert [part.function.name for part in parts if part.function.name] == expected


def test_reasoning_effort_chooses_whether_answers_begin_with_thoughts(client: openai.OpenAI) -> None:
    assert chat(client, reasoning_effort="low").choices[0].message.reasoning_content
    assert not hasattr(chat(client, reasoning_effort="none").choices[0].message, "reasoning_content")


def test_suffix_is_asked_for_as_training_cuts_documents(client: openai.OpenAI) -> None:
    (begin, hole, end) = TOKENIZER.special.fim or ()
    ids = [begin, *TOKENIZER.encode("hello"), hole, *TOKENIZER.encode("world"), end]
    texts = [
        complete(client, **prompt).choices[0].text
        for prompt in ({"prompt": "hello", "suffix": "world"}, {"prompt": TOKENIZER.prompt(ids)})
    ]
    assert texts[0] == texts[1] != complete(client, prompt="hello").choices[0].text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt": [5, 6], "suffix": "world"}, "prompt: must be text, is "),
        ({"max_completion_tokens": 0}, "max_completion_tokens: must be at least 1"),
        ({"reasoning_effort": "low"}, "reasoning_effort: must be none, .* is low; nearest valid: none"),
        ({"chat_template_kwargs": {"thinking": True}}, "chat_template_kwargs.thinking: must be false, "),
    ],
)
def test_refusals_name_the_field_and_its_nearest_value(changes: dict[str, Any], message: str) -> None:
    endpoint: Endpoint = "completions" if "prompt" in changes else "chat/completions"
    body = changes if "prompt" in changes else {"messages": MESSAGES, **changes}
    with pytest.raises(ApiError) as refused:
        read_call(describe("v3"), endpoint, json.dumps(body).encode())
    assert re.match(message, refused.value.message), refused.value.message


def test_top_p_0_keeps_the_most_probable_token(client: openai.OpenAI) -> None:
    assert complete(client, top_p=0, temperature=1).choices[0].text == complete(client).choices[0].text


def test_unknown_model_is_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        chat(client, model="gpt")
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"


def test_unsupported_field_is_named(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, extra_body={"temperatur": 1})
    assert caught.value.param == "temperatur"
    assert "nearest valid: temperature" in str(caught.value)
    assert chat(client, user="me", store=False, metadata={"a": "b"}).choices


def test_too_long_request_names_the_limit(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, max_tokens=10**6)
    assert caught.value.code == "context_length_exceeded"


def test_async_client_runs_requests_together(server: RunningServer) -> None:
    import asyncio

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            calls = [client.completions.create(model="tiny", prompt=text, temperature=0) for text in "abcdef"]
            return [answer.choices[0].text for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask()) == [TOKENIZER.decode(greedy(TOKENIZER.prompt(text), 16)) for text in "abcdef"]


def test_metrics_and_lines_count_requests_without_their_text(server: RunningServer, client: openai.OpenAI) -> None:
    answer = complete(client, prompt="secret words")
    text = httpx.get(f"{server.url}/metrics").text
    assert 'serve_requests_total{endpoint="completions",status="200"}' in text
    assert "serve_first_token_seconds_bucket" in text
    (line,) = [line for line in server.lines if line.startswith(answer.id)]
    assert f"completions 200, {answer.usage.prompt_tokens} tokens in, 12 out" in line
    assert "secret" not in "".join(server.lines)
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "roles",
    [
        ("user", "system"),
        ("assistant", "user"),
        ("user", "assistant", "assistant", "user"),
        ("user", "assistant"),
        ("system",),
        ("tool",),
        ("user", "assistant", "tool", "user"),
    ],
)
def test_messages_in_any_order_are_the_text_of_the_template(roles: tuple[str, ...]) -> None:
    messages = [{"role": role, "content": f"{role} {number}"} for number, role in enumerate(roles)]
    served = describe()
    assert served.template is not None
    (prompt,) = read_call(served, "chat/completions", json.dumps({"messages": messages}).encode()).prompts
    tokens = {
        "bos_token": TOKENIZER.decode([TOKENIZER.special.bos or 0]),
        "eos_token": TOKENIZER.decode([TOKENIZER.special.eos]),
    }
    text = ImmutableSandboxedEnvironment().from_string(template_jinja(served.template))
    assert TOKENIZER.decode(prompt) == text.render(messages=messages, add_generation_prompt=True, **tokens)


def test_last_message_of_the_assistant_is_continued() -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "wor"}]
    options = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    (prompt,) = read_call(describe(), "chat/completions", json.dumps(options).encode()).prompts
    assert TOKENIZER.decode(prompt).endswith("wor")
    for broken in ({"add_generation_prompt": True}, {"messages": MESSAGES}):
        with pytest.raises(ApiError):
            read_call(describe(), "chat/completions", json.dumps({**options, **broken}).encode())


def test_fields_are_accepted_at_values_that_change_nothing() -> None:
    common = {"skip_special_tokens": True, "min_tokens": 0, "priority": 0, "cache_salt": "a"}
    in_chats = {"verbosity": "medium", "modalities": ["text"], "functions": [], "add_special_tokens": False}
    read_call(describe(), "completions", json.dumps({"prompt": "a", **common}).encode())
    read_call(describe(), "chat/completions", json.dumps({"messages": MESSAGES, **common, **in_chats}).encode())
    for name, value in {
        "skip_special_tokens": False,
        "min_tokens": 1,
        "priority": False,
        "modalities": ["audio"],
    }.items():
        with pytest.raises(ApiError) as refused:
            read_call(describe(), "chat/completions", json.dumps({"messages": MESSAGES, name: value}).encode())
        assert refused.value.param == name


def test_structured_output_has_no_white_space(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
    for seed in range(4):
        content = (
            chat(client, response_format=form, temperature=1.5, seed=seed, max_tokens=30).choices[0].message.content
        )
        assert re.fullmatch(r'{"a":[1-9]}', content), content


@pytest.mark.parametrize("adds", [True, False])
def test_tokens_of_a_text_and_back(server: RunningServer, adds: bool) -> None:
    body = {"model": "tiny", "prompt": "hello 你好", "add_special_tokens": adds, "return_token_strs": True}
    answer = httpx.post(f"{server.url}/tokenize", json=body).json()
    ids = TOKENIZER.prompt("hello 你好") if adds else TOKENIZER.encode("hello 你好")
    names = [TOKENIZER.decode([number]) for number in ids]
    expected = {"count": len(ids), "max_model_len": MODEL.max_position_tokens, "tokens": ids, "token_strs": names}
    assert answer == expected
    body = {"model": "tiny", "tokens": ids}
    assert httpx.post(f"{server.url}/detokenize", json=body).json() == {"prompt": TOKENIZER.decode(ids)}


def test_tokens_of_a_chat_are_its_prompt(server: RunningServer, client: openai.OpenAI) -> None:
    answer = httpx.post(f"{server.url}/tokenize", json={"messages": MESSAGES}).json()
    assert answer["count"] == len(answer["tokens"]) == chat(client).usage.prompt_tokens


@pytest.mark.parametrize(
    ("route", "body", "param"),
    [
        ("tokenize", {}, "prompt"),
        ("tokenize", {"prompt": "a", "messages": MESSAGES}, "prompt"),
        ("tokenize", {"prompt": "a" * 10_000}, "max_tokens"),
        ("tokenize", {"prompt": "a", "model": "other"}, "model"),
        ("detokenize", {}, "tokens"),
        ("detokenize", {"tokens": [1, 10**9]}, "tokens[1]"),
        ("detokenize", {"tokens": "a"}, "tokens"),
        ("detokenize", {"tokens": [1] * 600}, "max_tokens"),
    ],
)
def test_wrong_text_and_tokens_are_refused(server: RunningServer, route: str, body: Any, param: str) -> None:
    response = httpx.post(f"{server.url}/{route}", json=body)
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param


def test_version_is_that_of_the_project(server: RunningServer) -> None:
    assert httpx.get(f"{server.url}/version").json() == {"version": version("dualpipe-trainer")}


def test_page_is_one_file_that_loads_nothing_else(server: RunningServer) -> None:
    page = httpx.get(server.url)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert "connect-src 'self'" in page.headers["content-security-policy"]
    assert not re.search(r"https?:|src=|href=|@import|url\(|innerHTML", page.text)
    assert set(re.findall(r'fetch\("([^"]*)"', page.text)) == {"v1/models", "v1/chat/completions"}
