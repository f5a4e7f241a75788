"""Streams in any pieces: what goes out, what is counted and what is held back never depends on where a piece ends."""

import re
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.relay.events import (
    USAGE,
    Tokens,
    add_cost,
    answer_tokens,
    first_event,
    plain_tokens,
    without_usage,
)
from gateway.relay.tap_complete import CompleteTap
from gateway.relay.tap_openai import OpenAITap
from gateway.relay.tap_responses import ResponsesTap
from gateway.relay.taps import Tap
from gateway.relay.tokens import count_prompt, count_tokens
from tests import captures_of

ASKED = [{"role": "user", "content": "What is the capital of France?"}]
DONE = b"data: [DONE]\n\n"
ERROR = (
    b'data: {"error": {"message": "it broke", "type": "InternalServerError", "param": null, "code": 500}}\n\n'
)


def event(
    content: str | None = None,
    *,
    index: int = 0,
    finish: str | None = None,
    usage: tuple[int, int] | None = None,
    cached: int | None = None,
) -> bytes:
    """A chat event as vLLM frames it, with continuous usage if asked for; no content and no finish: the last usage."""
    delta = {"index": index, "delta": {"content": content}, "logprobs": None, "finish_reason": finish}
    fields: dict[str, Any] = {"id": "c", "choices": [delta] if content is not None or finish else []}
    if usage is not None:
        prompt, completion = usage
        fields["usage"] = {
            "prompt_tokens": prompt, "total_tokens": prompt + completion, "completion_tokens": completion,
            "prompt_tokens_details": None if cached is None else {"cached_tokens": cached},
        }  # fmt: skip
    return b"data: " + orjson.dumps(fields) + b"\n\n"


def told(tap: Tap, pieces: Iterable[bytes]) -> tuple[Any, ...]:
    """Everything that a tap says of a stream in these pieces."""
    out = b"".join([tap.feed(piece) for piece in pieces])
    finishes = getattr(tap, "finishes", None)
    return out, tap.tokens, tap.error, tap.is_done, tap.is_whole, tap.ending(7), finishes


def openai(**of: Any) -> OpenAITap:
    return OpenAITap(**{"wants_usage": False, "asked": ASKED} | of)


SHORT = event("") + b"".join(
    (
        b": keep-alive\n\n",
        event("H\u00e9", usage=(9, 1)),
        event('"usage":{', usage=(9, 2)),
        event("x", finish="stop", usage=(9, 3)),
        event(usage=(9, 3), cached=4),
        DONE,
    )
)
BROKEN = event("", usage=(9, 0)) + event("one", usage=(9, 1)) + ERROR + DONE

TAPS: dict[str, Callable[[], Tap]] = {
    "asked for": lambda: openai(wants_usage=True),
    "stripped": openai,
    "continuous": lambda: openai(wants_usage=True, wants_every=True),
    "complete": lambda: CompleteTap(ASKED),
}


def stream_of(name: str) -> bytes:
    return captures_of.load(name).body


def tap_of(name: str) -> Tap:
    exchange = captures_of.load(name)
    asked = orjson.loads(exchange.request_body)
    if exchange.path == "/v1/responses":
        return ResponsesTap(asked["input"])
    prompts = 1
    if isinstance(asked.get("prompt"), list):
        prompts = len(asked["prompt"])
    choices = prompts * asked.get("n", 1)
    usage = asked.get("stream_options") or {}
    return OpenAITap(
        wants_usage=usage.get("include_usage", False), wants_every=usage.get("continuous_usage_stats", False),
        choices=choices, prompts=prompts, asked=asked.get("messages") or asked.get("prompt"),
    )  # fmt: skip


INFERENCE = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
STREAMS = [
    name
    for name in captures_of.names()
    if (found := captures_of.load(name)).is_stream and found.path in INFERENCE
]


# --- pieces --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TAPS)
@pytest.mark.parametrize("body", [SHORT, BROKEN], ids=["good", "broken"])
def test_a_cut_at_any_byte_changes_nothing(name, body):
    expected = told(TAPS[name](), [body])
    for at in range(len(body) + 1):
        assert told(TAPS[name](), [body[:at], body[at:]]) == expected, at


@pytest.mark.parametrize("name", TAPS)
def test_single_bytes_change_nothing(name):
    assert told(TAPS[name](), [bytes([byte]) for byte in SHORT]) == told(TAPS[name](), [SHORT])


@pytest.mark.parametrize(
    "name", ["chat_stream_usage_continuous", "completion_stream_usage", "responses_stream"]
)
def test_a_captured_stream_cut_at_any_byte_is_the_same(name):
    body = stream_of(name)
    expected = told(tap_of(name), [body])
    for at in range(len(body) + 1):
        assert told(tap_of(name), [body[:at], body[at:]]) == expected, at


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(STREAMS), data=st.data())
def test_a_captured_stream_in_any_pieces_is_the_same(name, data):
    body = stream_of(name)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(body)), max_size=40)))
    pieces = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert told(tap_of(name), pieces) == told(tap_of(name), [body])


@pytest.mark.parametrize("name", STREAMS)
def test_what_goes_out_is_what_came_in_less_usage_and_plus_cost(name):
    exchange, tap = captures_of.load(name), tap_of(name)
    out = tap.feed(exchange.body) + tap.ending(7)
    came = exchange.body
    if tap.error is not None:
        came = came[: came.index(b'data: {"error"')]
        out = out.removesuffix(DONE)
    assert out.replace(b',"cost_halala":7}', b"}") == came


# --- plain events, which are looked at by their bytes alone ----------------------------------------------------------


def chunk(
    text: str = "x", counts: tuple[int, int, int] = (9, 11, 2), more: str = "", behind: str = ""
) -> bytes:
    """An event amid a stream as vLLM writes it: `more` follows its completion tokens, `behind` its usage."""
    return (
        b'data: {"id":"c","choices":[{"index":0,"delta":{"content":%b},"logprobs":null,"finish_reason":null,'
        b'"token_ids":null}],"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b}%b}\n\n'
        % (orjson.dumps(text), *counts, more.encode(), behind.encode())
    )


def the_full_way(tap: OpenAITap, events: Iterable[bytes]) -> tuple[Any, ...]:
    """What `told` says, but each event goes the way of any event."""
    out = b"".join([tap._events(each) for each in events])
    return out, tap.tokens, tap.error, tap.is_done, tap.is_whole, tap.ending(7), tap.finishes


COUNTED = b',"usage":{"prompt_tokens":9,"total_tokens":11,"completion_tokens":2}'
NULLS = ',"prompt_tokens_details":null,"completion_tokens_details":null'
CACHED = ',"prompt_tokens_details":{"cached_tokens":1}'
FEW = st.tuples(*[st.integers(8, 11)] * 3)
MANY = st.tuples(st.integers(0, 10**13), st.integers(0, 10**14), st.integers(0, 10**13))
NASTY = st.sampled_from(
    ["x", ',"usage":{"prompt_tokens":1', '"finish_reason":null', "}}", "data: [DONE]", '"choices":[]']
)
USUAL = st.one_of(
    st.builds(chunk, st.text(max_size=5), FEW),
    st.builds(
        chunk, NASTY, FEW, st.sampled_from(["", NULLS, CACHED]), st.sampled_from(["", ',"z":null', ',"z":[]'])
    ),
    st.sampled_from(
        [event(""), event("x"), event("x", usage=(9, 3)), event("x", finish="stop", usage=(9, 4))]
    ),
    st.sampled_from([event(usage=(9, 3), cached=1), b": ping\n\n", DONE, ERROR]),
)
ODD = st.builds(chunk, NASTY, MANY, st.sampled_from(["", NULLS, CACHED, ',"speed":1.5']))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(USUAL, ODD), max_size=8))
def test_an_event_is_what_the_full_way_makes_of_it(events):
    assert told(openai(), events) == the_full_way(openai(), events)


@settings(max_examples=200, deadline=None)
@given(events=st.lists(USUAL, max_size=8), data=st.data())
def test_events_in_any_pieces_are_what_the_full_way_makes_of_each(events, data):
    body = b"".join(events)
    borders = list(accumulate(map(len, events)))
    cuts = st.one_of(st.sampled_from([0, *borders]), st.integers(0, len(body)))
    at = sorted(data.draw(st.lists(cuts, max_size=4)))
    pieces = [body[start:end] for start, end in zip([0, *at], [*at, len(body)], strict=True)]
    assert told(openai(), pieces) == the_full_way(openai(), events)


@pytest.mark.parametrize("byte", [b'"', b"0", b",", b"\n", b"{", b"}", b"x", b"\\"])
@pytest.mark.parametrize("together", [False, True])
def test_an_event_that_is_almost_plain_is_what_the_full_way_makes_of_it(byte, together):
    """Whichever byte of it is another one: what is taken for plain must be what it would have become."""
    before, plain, behind = chunk("a", (10, 11, 1)), chunk("b", (10, 12, 2)), chunk("c", (10, 13, 3))
    for at in range(len(plain)):
        almost = plain[:at] + byte + plain[at + 1 :]
        whole = before + almost + behind
        pieces = [whole] if together else [each + b"\n\n" for each in whole.split(b"\n\n")[:-1]]
        try:
            expected = the_full_way(openai(), pieces)
        except orjson.JSONDecodeError:
            continue  # what breaks a turn is no plain event
        assert told(openai(), pieces) == expected, almost


@pytest.mark.parametrize(
    "almost",
    [
        chunk("b").replace(b'reason":null', b'reason":"stop"') + chunk("c"),
        chunk("b").replace(COUNTED, b"") + chunk("c"),
        ERROR + chunk("c"), DONE + chunk("c"), chunk("b") + chunk("c"), chunk("b") + DONE, b": ping\n\n" + chunk("c"),
        chunk("b", (9, 11, 10**12 - 1)), chunk("b", (9, 11, 10**12)), chunk("b", (9, 11, 10**13)),
        chunk("b", (9, 10**13, 3)), chunk("b", (8, 11, 3)), chunk("b", (19, 11, 3)),
        chunk("b", more=NULLS), chunk("b", more=CACHED),
    ],
    ids=range(15),
)  # fmt: skip
@pytest.mark.parametrize("behind", [b"", chunk("d")])
@pytest.mark.parametrize("together", [False, True])
def test_what_is_not_plain_among_plain_events_is_what_the_full_way_makes_of_it(almost, together, behind):
    before = [event(""), chunk("a", (9, 10, 1)), chunk("b")]
    body = b"".join(before) + almost + behind
    pieces = [body] if together else [*before, almost, behind]
    events = [each + b"\n\n" for each in body.split(b"\n\n")[:-1]]
    assert told(openai(), pieces) == the_full_way(openai(), events)


@pytest.mark.parametrize("name", [b"prompt_tokens", b"total_tokens", b"completion_tokens"])
def test_a_plain_event_has_all_of_its_counts(name):
    tap = openai()
    tap.feed(chunk("a"))
    tap.feed(chunk("b"))
    with pytest.raises(orjson.JSONDecodeError):
        tap.feed(re.sub(rb'"%b":\d+' % name, b'"%b":' % name, chunk("b")))


def test_all_digits_of_a_count_are_counted():
    tap = openai()
    for number in (1, 9, 10, 99, 100, 999, 12345, 10**11):
        assert tap.feed(chunk("x", (number, 2 * number, number))) == chunk("x").replace(COUNTED, b"")
        assert tap.tokens == Tokens(prompt=number, completion=number)


# --- usage ---------------------------------------------------------------------------------------------------------


def test_usage_that_was_not_asked_for_is_taken_out_and_counted():
    tap = openai()
    out = tap.feed(
        event("a", usage=(9, 1)) + event(finish="stop", usage=(9, 2)) + event(usage=(9, 2), cached=4)
    )
    assert out == event("a") + event(finish="stop")
    assert tap.tokens == Tokens(prompt=9, cached=4, completion=2)
    assert tap.ending(7) == DONE


def test_usage_that_was_asked_for_comes_once_at_the_end_with_its_cost():
    tap = openai(wants_usage=True)
    out = tap.feed(event("a", usage=(9, 1)) + event(finish="stop", usage=(9, 1)) + event(usage=(9, 1)) + DONE)
    assert b"usage" not in out
    assert b'"completion_tokens":1' in tap.ending(7)
    assert tap.ending(7).endswith(b',"cost_halala":7}\n\n' + DONE)


def test_nothing_terminal_goes_out_before_it_is_settled():
    out = openai(wants_usage=True).feed(SHORT)
    assert b"[DONE]" not in out
    assert b'"choices":[]' not in out


def test_what_was_delivered_is_known_after_each_event():
    tap = openai()
    for number in range(1, 20):
        tap.feed(event("x", usage=(9, number)))
        assert (tap.tokens.prompt, tap.tokens.completion) == (9, number)


@given(st.text())
def test_text_that_looks_like_the_wire_is_only_text(text):
    nasty = (
        text + ',"usage":{"prompt_tokens":1,"total_tokens":1}' + '"finish_reason":"stop"data: [DONE]' + text
    )
    tap = openai()
    assert tap.feed(event(nasty, usage=(9, 1))) == event(nasty)
    assert (tap.finishes, tap.is_done, tap.error) == (0, False, None)
    assert tap.tokens == Tokens(prompt=9, completion=1)


def test_counts_of_several_answers_add_up_and_the_prompt_counts_once():
    tap = openai(choices=3)
    for number in range(1, 5):
        for index in range(3):
            tap.feed(event("x", index=index, usage=(9, number)))
    assert tap.tokens == Tokens(prompt=9, completion=12)


def test_answers_merged_into_one_piece_are_all_counted():
    tap = openai(choices=2)
    tap.feed(event("x", index=0, usage=(9, 3)) + event("x", index=1, usage=(9, 5)))
    assert tap.tokens.completion == 8


def test_several_prompts_count_each_once_however_many_answers_they_have():
    tap = openai(choices=4, prompts=2)
    for index, prompt in enumerate([5, 5, 11, 11]):
        tap.feed(event("x", index=index, usage=(prompt, 2)))
    assert tap.tokens == Tokens(prompt=16, completion=8)


def test_the_engines_last_word_wins():
    tap = openai(choices=2)
    tap.feed(event("x", index=0, usage=(9, 3)) + event(usage=(9, 50), cached=8) + event("x", usage=(9, 4)))
    assert tap.tokens == Tokens(prompt=9, cached=8, completion=50)


# --- ends ----------------------------------------------------------------------------------------------------------


def test_an_error_event_ends_it_and_done_after_it_makes_nothing_whole():
    tap = openai()
    assert tap.feed(BROKEN) == event("") + event("one")
    assert tap.error["code"] == 500
    assert not tap.is_whole
    assert not tap.is_done
    assert tap.feed(event("more")) == b""
    assert tap.tokens.completion == 1


def test_an_error_event_that_is_no_json_is_still_an_error():
    tap = openai()
    assert tap.feed(b'data: {"error": what}\n\n') == b""
    assert tap.error is not None


def test_done_without_a_finish_is_not_whole():
    tap = openai()
    tap.feed(event("x", usage=(9, 1)) + DONE)
    assert (tap.is_done, tap.is_whole) == (True, False)


def test_a_finish_without_done_is_whole_and_done_is_made_up():
    tap = openai()
    tap.feed(event("x", finish="length", usage=(9, 1)))
    assert (tap.is_done, tap.is_whole, tap.ending(7)) == (False, True, DONE)


def test_every_answer_must_finish():
    tap = openai(choices=2)
    tap.feed(event("x", index=0, finish="stop"))
    assert not tap.is_whole
    tap.feed(event("y", index=1, finish="length") + DONE)
    assert tap.is_whole


def test_bytes_after_the_end_go_nowhere():
    tap = openai()
    tap.feed(event(finish="stop") + DONE + event("late"))
    assert tap.feed(event("later")) == b""
    assert tap.ending(7) == DONE


def test_the_bytes_of_an_unfinished_event_are_told():
    tap = openai()
    tap.feed(event("x") + b"data: {" + b"a" * 1000)
    assert tap.pending_bytes == 1007


# --- estimates -----------------------------------------------------------------------------------------------------


def test_an_engine_that_reports_nothing_is_estimated_event_by_event():
    tap = openai()
    for _ in range(3):
        tap.feed(event("Paris is the capital."))
    assert tap.final_tokens() == Tokens(
        prompt=count_prompt(ASKED), completion=3 * count_tokens("Paris is the capital."), estimated=True
    )


def test_an_estimate_gives_way_to_the_engines_last_word():
    tap = openai(wants_usage=True)
    tap.feed(event("Paris") + event(finish="stop") + event(usage=(9, 2)) + DONE)
    assert tap.tokens == Tokens(prompt=9, completion=2)


def test_tool_calls_and_reasoning_are_estimated_too():
    call = {"tool_calls": [{"index": 0, "function": {"name": "weather", "arguments": '{"city":"Paris"}'}}]}
    tap = openai()
    for delta in (call, {"reasoning": "Let me think."}):
        tap.feed(b"data: " + orjson.dumps({"choices": [{"index": 0, "delta": delta}]}) + b"\n\n")
    parts = ("weather", '{"city":"Paris"}', "Let me think.")
    assert tap.tokens.completion == sum(map(count_tokens, parts))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_any_prompt_can_be_counted(value):
    assert count_prompt(value) >= 0


def test_an_unbroken_run_of_letters_is_counted_in_pieces():
    assert count_tokens("a" * 100_000) > 10_000


# --- /v1/complete --------------------------------------------------------------------------------------------------


def test_complete_gives_text_by_index_then_one_final_event():
    tap = CompleteTap(ASKED)
    out = tap.feed(
        event("")
        + event("Hi", usage=(9, 1))
        + event("!", finish="length", usage=(9, 2))
        + event(usage=(9, 2))
        + DONE
    )
    assert out == b'data: {"text":"Hi","index":0}\n\ndata: {"text":"!","index":0}\n\n'
    final = orjson.loads(tap.ending(3).removesuffix(b"\n\n" + DONE)[6:])
    assert final == {
        "finish_reason": "length",
        "usage": {"prompt_tokens": 9, "completion_tokens": 2, "total_tokens": 11},
        "cost_halala": 3,
    }
    assert tap.text == "Hi!"


def test_complete_that_timed_out_is_whole_with_what_it_has():
    tap = CompleteTap(ASKED)
    tap.feed(event("Hi", usage=(9, 1)))
    tap.time_out()
    assert (tap.is_whole, tap.is_done, tap.finish_reason) == (True, True, "timeout")
    assert tap.feed(event("late", usage=(9, 2))) == b""
    assert tap.tokens.completion == 1


@pytest.mark.parametrize(("engine", "ours"), [("stop", "stop"), ("length", "length"), ("tool_calls", "stop")])
def test_complete_knows_three_ways_to_finish(engine, ours):
    tap = CompleteTap(ASKED)
    tap.feed(event(finish=engine) + DONE)
    assert tap.finish_reason == ours


# --- /v1/responses -------------------------------------------------------------------------------------------------


def test_a_responses_stream_that_is_cut_is_counted_by_its_deltas():
    body = stream_of("responses_stream")
    tap = ResponsesTap("hello")
    tap.feed(body[: body.rindex(b"event: response.completed")])
    said = "".join(
        orjson.loads(found) for found in re.findall(rb'output_text.delta".*?"delta":("[^\n]*?")[,}]', body)
    )
    assert tap.tokens.estimated
    assert tap.tokens.completion > 0
    assert abs(tap.tokens.completion - count_tokens(said)) <= len(body) // 100
    assert not tap.is_whole


def test_a_responses_stream_that_fails_is_an_error():
    tap = ResponsesTap("hello")
    assert tap.feed(b'event: error\ndata: {"error": {"message": "no", "code": 503}}\n\n') == b""
    assert tap.error["code"] == 503
    assert not tap.is_whole


# --- what lies in the bytes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", None),
        (b": ping\n\n", None),
        (b"data: {", None),
        (b"data: {}\n\n", b"data: {}"),
        (b": a\n\n: b\n\ndata: 1\n\ndata: 2\n\n", b"data: 1"),
        (b"\n\ndata: 1\n\n", b"data: 1"),
    ],
)
def test_the_first_event_is_the_first_that_is_no_comment(data, found):
    assert first_event(data) == found


@pytest.mark.parametrize(
    "name", ["chat_nonstream", "chat_n2", "completion_multi_prompt", "embed__embeddings", "responses_nonstream",
             "chat_nonstream_repeat_cached", "full__prefix_warm"],
)  # fmt: skip
def test_usage_of_a_whole_answer_is_what_json_says(name):
    body = captures_of.load(name).body
    usage = orjson.loads(body)["usage"]
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
    assert answer_tokens(orjson.loads(body)) == Tokens(
        prompt=usage.get("prompt_tokens", usage.get("input_tokens")),
        cached=details.get("cached_tokens") or 0,
        completion=usage.get("completion_tokens", usage.get("output_tokens", 0)),
    )


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": []},
        {"usage": None},
        {"usage": {}},
        {"usage": [1]},
        {"usage": {"completion_tokens": 3}},
    ],
)
def test_an_answer_without_usage_has_none(answer):
    assert answer_tokens(answer) is None


def test_text_in_an_answer_is_never_taken_for_usage():
    fake = ',"usage":{"prompt_tokens":1,"total_tokens":1,"completion_tokens":1}'
    body = orjson.dumps(
        {
            "choices": [{"text": fake}],
            "usage": {"prompt_tokens": 9, "total_tokens": 11, "completion_tokens": 2},
            "x": fake,
        }
    )
    assert answer_tokens(orjson.loads(body)) == Tokens(prompt=9, completion=2)


@pytest.mark.parametrize(
    "name", ["chat_nonstream", "chat_n2", "completion_multi_prompt", "embed__embeddings", "chat_nonstream_repeat_cached",
             "full__prefix_warm", "chat_logprobs", "full__tools_auto"],
)  # fmt: skip
def test_what_is_read_of_an_answer_as_vllm_writes_it_is_what_decoding_it_says(name):
    body = captures_of.load(name).body
    assert plain_tokens(body) == answer_tokens(orjson.loads(body))


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{}", b"null", b'{"id":"x","object":"chat.completion","choices":[{}]}',
        b'{"error":{"message":"no"},"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}',
        b'{"id":"x","object":"error","choices":[{}],"usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}',
        b'{"id":"x","object":"chat.completion","usage":{"prompt_tokens":1,"total_tokens":2,"completion_tokens":1}}',
        b'{"id":"x","object":"chat.completion","choices":[{}],"usage":{"prompt_tokens":-1,"total_tokens":2}}',
        b'{"id":"x","object":"chat.completion","choices":[{}],"usage":null}',
        b'{ "id":"x","object":"chat.completion","choices":[{}],"usage":{"prompt_tokens":1,"total_tokens":2}}',
    ],
    ids=range(10),
)  # fmt: skip
def test_any_other_answer_must_be_decoded(body):
    assert plain_tokens(body) is None


def test_counts_go_out_of_events_whether_they_have_details_or_not():
    flat = b'data: {"choices":[{}],"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2}}\n\n'
    deep = flat.replace(
        b'"completion_tokens":2', b'"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}'
    )
    assert without_usage(flat + deep) == b'data: {"choices":[{}]}\n\n' * 2


USAGE_PARTS = st.sampled_from(
    [b',"usage":{', b',"usage":{"prompt_tokens":1,"total_tokens":2}', b"{", b"}", b'"a":1', b"\n\n",
     b'"completion_tokens":2',
     b',"usage":{"prompt_tokens":1,"total_tokens":3,"completion_tokens":2,"prompt_tokens_details":{"cached_tokens":1}}']
)  # fmt: skip


@given(st.lists(USAGE_PARTS, max_size=8).map(b"".join))
def test_counts_that_go_out_are_those_that_a_pattern_finds(events):
    expected = re.sub(rb',"usage":\{[^{}]*\}', b"", events)
    assert without_usage(events) == (USAGE.sub(b"", expected) if b',"usage":{' in expected else expected)


def test_cost_is_the_last_field():
    assert orjson.loads(add_cost(b'{"a":{"b":1}}\n', 5)) == {"a": {"b": 1}, "cost_halala": 5}


def test_counts_once_known_are_never_replaced_by_an_estimate():
    tap = openai()
    tap.feed(event("Paris", usage=(900, 400)))
    tap.feed(event(" is"))
    assert tap.final_tokens() == Tokens(prompt=900, completion=400)


def test_usage_in_another_spelling_is_counted_and_stripped_all_the_same():
    tap = openai()
    usage = {"completion_tokens": 4, "prompt_tokens": 7, "total_tokens": 11, "speed": 1.5}
    chunk = {"choices": [{"index": 0, "delta": {"content": "x"}}], "usage": usage}
    out = tap.feed(b"data: " + orjson.dumps(chunk) + b"\n\n")
    assert b"usage" not in out
    assert tap.final_tokens() == Tokens(prompt=7, completion=4)


def test_media_and_names_are_no_prompt_text():
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 100_000}}
    words = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}, image]}]
    assert count_prompt(words) == count_tokens("What is this?")


def test_an_estimate_ends_where_the_engines_counts_begin():
    tap = openai()
    tap.feed(event("Paris"))
    tap.feed(event(" is", usage=(9, 2)))
    assert tap.final_tokens() == Tokens(prompt=9, completion=2)


def test_a_count_that_nothing_can_have_is_none() -> None:
    """It would be charged, and fit no record."""
    huge = 10**30
    chat = b'{"choices":[],"usage":{"prompt_tokens":9,"total_tokens":9,"completion_tokens":%d}}' % huge
    response = b'{"output":[],"usage":{"input_tokens":%d,"output_tokens":1}}' % huge
    assert answer_tokens(orjson.loads(chat)) is None
    assert answer_tokens(orjson.loads(response)) is None
    tap = openai(wants_usage=True)
    tap.feed(event("Hi", usage=(9, 1)) + b"data: " + chat + b"\n\n" + DONE)
    assert (tap.tokens.prompt, tap.tokens.completion) == (9, 1)
