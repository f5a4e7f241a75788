"""Plain chats: whatever is read without the schemas is what the schemas make of it."""

from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from gateway.api.openai.plain import LONG_BYTES, plain_chat
from gateway.api.openai.schemas_requests import ChatRequest

CHAT = TypeAdapter(ChatRequest)
MESSAGES = [{"role": "user", "content": "hi"}]


def by_schema(body: bytes) -> Any:
    """None where the schema refuses it."""
    try:
        return CHAT.validate_json(body)
    except ValidationError:
        return None


numbers = st.one_of(
    st.sampled_from([
        "0", "-0", "0.0", "-0.0", "1", "1.0", "2", "2.0000000000000001", "-2", "3", "1e0", "1e-400", "1e400", "0.1", "128",
        "129", "2147483647", "2147483648", "99999999999999999999", "true", "null", '"1"', "[]",
        "NaN", "Infinity", "01", "1.", "+1",
    ]),
    st.floats(-3, 3).map(repr),
    st.integers(-1, 2**31).map(str),
)  # fmt: skip
texts = st.one_of(
    st.text(max_size=5).map(lambda text: orjson.dumps(text.encode(errors="ignore").decode()).decode()),
    st.sampled_from(
        [
            '""',
            '"\\ud800"',
            '"\\ud83d\\ude00"',
            '"\\u0000"',
            '"\n"',
            '"' + "x" * 256 + '"',
            '"' + "é" * 257 + '"',
            "null",
            "1",
            "[]",
        ]
    ),
)
roles = st.sampled_from(
    ['"user"', '"system"', '"assistant"', '"developer"', '"tool"', '"User"', "null", "1", '["user"]']
)
spaces = st.sampled_from(["", "", "", " ", "\n", "\t\r"])


def objects(pairs: st.SearchStrategy[tuple[str, str]], least: int = 0) -> st.SearchStrategy[str]:
    """JSON objects with their names in any order, some of them more than once."""
    return st.builds(
        lambda rows, space: (
            "{" + space + ("," + space).join(f'"{name}"{space}:{value}' for name, value in rows) + "}"
        ),
        st.lists(pairs, min_size=least, max_size=8),
        spaces,
    )


messages = st.one_of(
    st.builds(
        '{{"role":{},"content":{}}}'.format, roles, texts
    ),
    objects(st.one_of(
        st.tuples(st.just("role"), roles), st.tuples(st.just("content"), texts),
        st.tuples(st.sampled_from(["name", "refusal", "x"]), texts),
    )),
)  # fmt: skip
fields = st.one_of(
    st.tuples(st.just("model"), texts),
    st.tuples(
        st.just("messages"),
        st.lists(messages, max_size=3).map(lambda each: "[" + ",".join(each) + "]")
        | st.sampled_from(["null", "{}", '"x"']),
    ),
    st.tuples(
        st.sampled_from([
            "max_tokens", "max_completion_tokens", "temperature", "top_p", "n", "presence_penalty", "frequency_penalty",
            "stream", "ignore_eos", "user", "seed", "stop",
        ]),
        numbers,
    ),
)  # fmt: skip
bodies = st.builds(
    lambda most, rest: (most[:-1] + (", " + rest[1:] if rest != "{}" else "}")).encode(),
    st.just('{"model":"m","messages":[{"role":"user","content":"hi"}]}'),
    objects(fields, 1),
) | objects(fields).map(str.encode)


@given(bodies, st.sampled_from([b"", b" " * LONG_BYTES]))
@example(
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"n":1,"n":2,"temperature":9,"temperature":1}',
    b"",
)
@example(
    b'{"model":"m","messages":[{"role":"user","content":"hi"}],"messages":[{"role":"user","content":"no"}]}',
    b"",
)
@example(b' {"model":"m","messages":[{"role":"user","content":"hi"}]} ', b"")
@example(b'\xef\xbb\xbf{"model":"m","messages":[{"role":"user","content":"hi"}]}', b"")
@example(b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', b"")
@example(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}}', b"")
@example(b"[]", b"")
@example(b'{"model":"m","messages":[{"role":"user","content":"\xff"}]}', b" " * LONG_BYTES)
@example(b'{"model":"m","messages":[{"role":"user","content":"hi"}]}}', b" " * LONG_BYTES)
@example(b"", b"")
def test_what_is_plain_is_what_the_schema_makes_of_it(body: bytes, padding: bytes) -> None:
    """Either reader's: long bodies have another one."""
    body += padding
    plain = plain_chat(body)
    assert plain is None or plain == by_schema(body)


@pytest.mark.parametrize(
    "more",
    [
        {}, {"max_tokens": 16}, {"max_completion_tokens": 16}, {"temperature": 0}, {"temperature": 0.7, "top_p": 0.9},
        {"stream": True}, {"stream": False, "n": 2}, {"presence_penalty": -2, "frequency_penalty": 0.5}, {"n": 128},
        {"ignore_eos": True},
        {"messages": [{"role": role, "content": "x"} for role in ("developer", "system", "user", "assistant")]},
    ],
    ids=str,
)  # fmt: skip
def test_what_most_clients_ask_is_plain(more: dict[str, Any]) -> None:
    request = {"model": "m", "messages": MESSAGES, **more}
    assert plain_chat(orjson.dumps(request)) == request
    assert plain_chat(orjson.dumps(request) + b" " * LONG_BYTES) == request


@pytest.mark.parametrize(
    "more",
    [
        {"stream": None}, {"user": "me"}, {"tools": []}, {"messages": []}, {"model": ""}, {"max_tokens": True}, {"n": 0},
        {"messages": [{"role": "tool", "content": "x"}]}, {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "user", "content": "x", "name": "y"}]}, {"top_p": 0}, {"temperature": True},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_left_to_the_schema(more: dict[str, Any]) -> None:
    assert plain_chat(orjson.dumps({"model": "m", "messages": MESSAGES, **more})) is None
