"""The official SDK, synchronous, against a real model: every shape it knows comes, and each turn is metered exactly."""

import json
from typing import Any

import pytest
from openai import OpenAI

from tests.engine.system import MODEL, System, now

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "Where is the Eiffel tower?"}]
CITY: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "known": {"type": "boolean"}},
    "required": ["city", "known"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Paris", "Oslo"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


def test_models_are_listed_and_shown_without_what_the_engine_leaks(client: OpenAI) -> None:
    listed = {model.id: model for model in client.models.list()}
    shown = client.models.retrieve(MODEL)
    assert shown == listed[MODEL]
    facts = shown.model_dump()
    assert (facts["object"], facts["available"], facts["context_length"]) == ("model", True, 8192)
    assert not {"root", "permission", "parent"} & facts.keys()


def test_a_whole_chat_is_metered_as_it_says(client: OpenAI, system: System) -> None:
    begun = now()
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=MESSAGES, max_tokens=8)
    chat = raw.parse()
    assert raw.headers["x-request-id"].startswith("req_")
    assert raw.headers["x-request-id"] in chat.id
    (choice,) = chat.choices
    assert choice.message.role == "assistant"
    assert choice.message.content
    assert choice.finish_reason in ("stop", "length")
    assert chat.usage is not None
    assert chat.usage.total_tokens == chat.usage.prompt_tokens + chat.usage.completion_tokens
    row = system.row(begun)
    assert row.tokens == (chat.usage.prompt_tokens, chat.usage.completion_tokens)
    assert (row.outcome, row.status, row.stream, row.estimated) == ("finished", 200, False, False)
    assert row.amount_nano > 0
    assert chat.model_dump()["cost_halala"] >= 1


def test_a_stream_without_usage_is_metered_all_the_same(client: OpenAI, system: System) -> None:
    begun = now()
    with client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, stream=True) as stream:
        chunks = list(stream)
    assert all(chunk.choices and chunk.usage is None for chunk in chunks)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] in (
        ["stop"],
        ["length"],
    )
    row = system.row(begun)
    assert (row.outcome, row.stream, row.estimated) == ("finished", True, False)
    assert 0 < row.completion_tokens <= 12
    assert row.prompt_tokens > 0
    assert row.ttft_ms is not None


def test_a_requested_usage_is_the_last_chunk_and_what_is_recorded(client: OpenAI, system: System) -> None:
    begun = now()
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=12, stream=True, stream_options={"include_usage": True}
    ) as stream:
        *chunks, last = list(stream)
    assert all(chunk.usage is None for chunk in chunks)
    assert last.choices == []
    assert last.usage is not None
    assert last.model_dump()["cost_halala"] >= 1
    assert system.row(begun).tokens == (last.usage.prompt_tokens, last.usage.completion_tokens)


def test_the_sdks_own_stream_collects_a_whole_chat(client: OpenAI) -> None:
    """It parses what it collects, and takes an answer that was cut for an error: so this one stops by itself."""
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=200, stop=["e", "a"]
    ) as stream:
        kinds = {event.type for event in stream}
        chat = stream.get_final_completion()
    assert {"chunk", "content.done"} <= kinds
    assert chat.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("is_stream", [False, True])
def test_several_answers_are_counted_together_and_their_prompt_once(
    client: OpenAI, system: System, *, is_stream: bool
) -> None:
    begun = now()
    asked: dict[str, Any] = {"model": MODEL, "messages": MESSAGES, "max_tokens": 8, "n": 2}
    if is_stream:
        with client.chat.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        ) as stream:
            *chunks, last = list(stream)
        finished = [choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason]
        usage = last.usage
    else:
        chat = client.chat.completions.create(**asked)
        finished, usage = [choice.index for choice in chat.choices], chat.usage
    assert sorted(finished) == [0, 1]
    assert 2 <= usage.completion_tokens <= 16
    assert system.row(begun).tokens == (usage.prompt_tokens, usage.completion_tokens)


def test_logprobs_come_for_each_token(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=2
    )
    logprobs = chat.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert chat.usage is not None
    assert len(logprobs.content) == chat.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in logprobs.content)


def test_a_stop_string_ends_the_answer_and_is_not_in_it(client: OpenAI) -> None:
    chat = client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=200, stop=["e", "a"])
    (choice,) = chat.choices
    assert choice.finish_reason == "stop"
    assert not set(choice.message.content or "") & {"e", "a"}


def test_a_seed_is_taken(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=4, seed=7, temperature=1.0
    )
    assert chat.system_fingerprint
    assert chat.choices[0].message.content


def test_an_answer_keeps_to_a_schema(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=80,
        temperature=0,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": CITY, "strict": True}},
    )
    answer = json.loads(chat.choices[0].message.content or "")
    assert answer.keys() == {"city", "known"}
    assert answer["city"] in ("Paris", "Oslo")


def test_an_answer_is_an_object_when_asked_for_one(client: OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=8, temperature=0, response_format={"type": "json_object"}
    )
    assert (chat.choices[0].message.content or "").lstrip().startswith("{")


@pytest.mark.parametrize(("choice", "finish"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_tool_is_called_when_it_must_be(client: OpenAI, system: System, choice: Any, finish: str) -> None:
    """A tiny model: what it fills in is not looked at, and vLLM's finish reason of a named tool is its own."""
    begun = now()
    chat = client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=120, temperature=0, tools=[WEATHER], tool_choice=choice
    )
    (call,) = chat.choices[0].message.tool_calls or ()
    assert (call.type, chat.choices[0].finish_reason) == ("function", finish)
    assert call.function.name == "weather"
    assert isinstance(json.loads(call.function.arguments), (str, dict))
    assert chat.usage is not None
    assert system.row(begun).completion_tokens == chat.usage.completion_tokens


@pytest.mark.parametrize("choice", ["required", NAMED])
def test_a_called_tool_is_streamed(client: OpenAI, system: System, choice: Any) -> None:
    begun = now()
    with client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_tokens=48, temperature=0, tools=[WEATHER], tool_choice=choice, stream=True
    ) as stream:  # fmt: skip
        parts = [call for chunk in stream for call in chunk.choices[0].delta.tool_calls or ()]
    first, *rest = parts
    assert (first.index, first.function and first.function.name) == (0, "weather")
    assert first.id
    assert "".join((part.function and part.function.arguments) or "" for part in rest)
    row = system.row(begun)
    assert row.outcome == "finished"
    assert len(parts) <= row.completion_tokens <= 48


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_tool_may_be_left_alone(client: OpenAI, *, is_stream: bool) -> None:
    asked: dict[str, Any] = {
        "model": MODEL, "messages": MESSAGES, "max_tokens": 8, "temperature": 0, "tools": [WEATHER], "tool_choice": "auto",
    }  # fmt: skip
    if is_stream:
        with client.chat.completions.create(**asked, stream=True) as stream:
            assert list(stream)[-1].choices[0].finish_reason in ("stop", "length", "tool_calls")
    else:
        (choice,) = client.chat.completions.create(**asked).choices
        assert choice.message.content or choice.message.tool_calls


def test_prompts_are_completed_each_with_its_own_answer(client: OpenAI, system: System) -> None:
    begun = now()
    one = client.completions.create(model=MODEL, prompt="The capital of France", max_tokens=4)
    several = client.completions.create(model=MODEL, prompt=["One, two,", "Hello"], max_tokens=4, n=2)
    assert [choice.index for choice in one.choices] == [0]
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    usages = [answer.usage for answer in (one, several)]
    assert [row.tokens for row in system.rows(begun, 2)] == [
        (usage.prompt_tokens, usage.completion_tokens) for usage in usages if usage is not None
    ]


def test_a_completion_of_several_prompts_streams(client: OpenAI, system: System) -> None:
    begun = now()
    with client.completions.create(
        model=MODEL, prompt=["One, two,", "Hello"], max_tokens=6, stream=True, stream_options={"include_usage": True}
    ) as stream:  # fmt: skip
        *chunks, last = list(stream)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert last.usage is not None
    assert system.row(begun).tokens == (last.usage.prompt_tokens, last.usage.completion_tokens)


def test_a_response_is_made_whole(client: OpenAI, system: System) -> None:
    begun = now()
    response = client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=6)
    assert response.output_text
    assert response.usage is not None
    row = system.row(begun)
    assert row.tokens == (response.usage.input_tokens, response.usage.output_tokens)
    assert row.cached_tokens == response.usage.input_tokens_details.cached_tokens
    assert not row.estimated


def test_a_streamed_response_ends_at_completed(client: OpenAI, system: System) -> None:
    begun = now()
    with client.responses.create(model=MODEL, input="Say hello.", max_output_tokens=6, stream=True) as stream:
        events = list(stream)
    assert events[0].type == "response.created"
    assert events[-1].type == "response.completed"
    assert "response.output_text.delta" in {event.type for event in events}
    assert [event.sequence_number for event in events] == list(range(len(events)))
    usage = events[-1].response.usage
    assert usage is not None
    row = system.row(begun)
    assert row.tokens == (usage.input_tokens, usage.output_tokens)
    assert not row.estimated
