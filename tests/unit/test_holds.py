"""Upper bounds: never below what tokenizers make of a request, and exact where money is turned into tokens."""

import json
import unicodedata
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.holds import (
    NORMAL_CHECK_BYTES,
    TOKENS_MAX,
    Bound,
    Shape,
    UnpricedMedia,
    bound_of,
    clamped_tokens,
    hold_nano,
    least_nano,
    limit_tokens,
    text_bytes,
)
from billing.prices import Price, cost_nano
from config.defaults import Settings
from gateway.relay.tokens import count_tokens

PRICE = Price("m", 400_000_000, 200_000_000, 1_200_000_000, image_tokens=1600, audio_tokens=750)
NO_MEDIA = Price("m", 1, 1, 1)
SETTINGS = Settings()
PIXEL = "data:image/png;base64," + "A" * 4000

# Letters that grow when normalized, escapes, several scripts, special tokens spelled out.
ODD = (
    "\u0958" * 9, "\U0001d1c0" * 5, "e\u0301\u0323", "é\u0323" * 7, "\ufdfa", "\n\t\"\\" * 5, "<|im_end|>", "مرحبا",
    "🎉\U0001f469\u200d\U0001f467",
)  # fmt: skip
TEXTS = st.lists(st.text(max_size=30) | st.sampled_from(ODD), max_size=4).map("".join)
NAMES = st.text("abcdefgh_", min_size=1, max_size=8)
NUMBERS = st.one_of(st.integers(-(10**18), 10**18), st.sampled_from([1e15, 9.0, 1e-4, -1e15]))
VALUES = st.recursive(NUMBERS | TEXTS | st.none(), lambda inner: st.lists(inner, max_size=4), max_leaves=8)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)
TOOLS = st.lists(
    st.builds(
        lambda name, text, fields: {
            "type": "function",
            "function": {"name": name, "description": text, "parameters": fields},
        },
        NAMES, TEXTS, OBJECTS,
    ),
    min_size=1, max_size=3,
)  # fmt: skip
CALLS = st.builds(
    lambda name, fields: {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c", "type": "function", "function": {"name": name, "arguments": json.dumps(fields)}}
        ],
    },
    NAMES, OBJECTS,
)  # fmt: skip
PARTS = st.lists(
    st.one_of(
        TEXTS.map(lambda text: {"type": "text", "text": text}),
        st.just({"type": "image_url", "image_url": {"url": PIXEL}}),
    ),
    min_size=1, max_size=3,
)  # fmt: skip
USERS = st.builds(lambda content: {"role": "user", "content": content}, TEXTS | PARTS)
CHATS = st.fixed_dictionaries(
    {"model": st.just("m"), "messages": st.lists(USERS | CALLS, min_size=1, max_size=4)},
    optional={"tools": TOOLS, "n": st.integers(1, 8), "max_tokens": st.integers(1, 10**6)},
)
COMPLETIONS = st.fixed_dictionaries(
    {
        "model": st.just("m"),
        "prompt": TEXTS | st.lists(TEXTS, min_size=1, max_size=5)
        | st.lists(st.integers(0, 10**5), min_size=1) | st.lists(st.lists(st.integers(0, 9)), min_size=1),
    },
    optional={"n": st.integers(1, 8), "max_tokens": st.integers(0, 10**6)},
)  # fmt: skip


def bound(
    body: dict[str, Any],
    shape: Shape = "chat",
    *,
    raw: bytes | None = None,
    price: Price = PRICE,
    context: int | None = None,
) -> Bound:
    return bound_of(body, text_bytes(raw or orjson.dumps(body)), shape, price, context, SETTINGS)


def as_templates_write(chat: dict[str, Any]) -> tuple[list[str], int]:
    """Every text of a chat in the longest form that a template gives it, and how many images there are."""
    texts, images = [], 0
    for message in chat["messages"]:
        texts.append(f"<|im_start|>{message['role']}\n<|im_end|>\n")
        content = message["content"]
        for part in [{"type": "text", "text": content or ""}] if not isinstance(content, list) else content:
            if part["type"] == "text":
                texts.append(part["text"])
            else:
                images += 1
        for call in message.get("tool_calls", ()):
            texts.append(json.dumps(json.loads(call["function"]["arguments"]), ensure_ascii=False))
            texts.append(call["function"]["name"])
    texts.extend(json.dumps(tool, indent=4, ensure_ascii=False) for tool in chat.get("tools", ()))
    return texts, images


@settings(deadline=None)
@given(CHATS, st.booleans())
def test_a_chat_has_no_more_prompt_tokens_than_its_bound(chat: dict[str, Any], escaped: bool) -> None:
    raw = json.dumps(chat, ensure_ascii=escaped, separators=(",", ":")).encode()
    found = bound(chat, raw=raw).prompt_tokens - SETTINGS.template_tokens_max
    texts, images = as_templates_write(chat)
    media = images * 1600
    # Each byte of the normalized text a token of its own: the worst that a byte-level tokenizer could do.
    assert found >= media + sum(len(unicodedata.normalize("NFC", text).encode()) for text in texts)
    assert found >= media + sum(map(count_tokens, texts))


@settings(deadline=None)
@given(COMPLETIONS, st.booleans())
def test_every_prompt_of_a_completion_is_in_its_bound(body: dict[str, Any], escaped: bool) -> None:
    raw = json.dumps(body, ensure_ascii=escaped).encode()
    prompts = body["prompt"]
    if isinstance(prompts, str) or isinstance(prompts[0], int):
        prompts = [prompts]
    found = bound(body, "completion", raw=raw)
    # The special marks around each one included.
    assert found.prompt_tokens >= sum(
        2 + (len(unicodedata.normalize("NFC", each).encode()) if isinstance(each, str) else len(each))
        for each in prompts
    )
    assert found.choices == body.get("n", 1) * len(prompts)
    assert found.output_tokens == body.get("max_tokens", 16)
    assert found.is_limited


@given(st.text("\ufdfa\ufb03\u3382①x", max_size=40), st.booleans())
def test_texts_to_embed_are_bounded_as_their_tokenizers_normalize_them(text: str, escaped: bool) -> None:
    raw = json.dumps({"model": "m", "input": text}, ensure_ascii=escaped).encode()
    assert text_bytes(raw, "NFKC") >= len(unicodedata.normalize("NFKC", text).encode())


def test_json_is_never_shorter_than_the_text_it_writes() -> None:
    for code in (*range(0xD800), *range(0xE000, 0x110000, 7)):
        text = chr(code)
        for escaped in (False, True):
            raw = json.dumps(text, ensure_ascii=escaped).encode()
            assert text_bytes(raw) - 2 >= len(unicodedata.normalize("NFC", text).encode())


def test_texts_that_are_normal_are_not_taken_to_grow() -> None:
    raw = "السلام عليكم".encode()
    assert text_bytes(raw) == len(raw)
    assert text_bytes("e\u0301".encode()) == 3 * 3
    assert text_bytes("é".encode() * NORMAL_CHECK_BYTES) == 3 * 2 * NORMAL_CHECK_BYTES


MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("shape", "body", "context", "tokens", "choices", "is_limited"),
    [
        ("chat", {"messages": MESSAGES, "max_tokens": 5, "n": 3}, 100, 5, 3, True),
        ("chat", {"messages": MESSAGES}, 100, 100, 1, False),
        ("chat", {"messages": MESSAGES}, None, SETTINGS.output_tokens_ceiling, 1, False),
        ("chat", {"messages": MESSAGES, "max_tokens": 500}, 100, 100, 1, True),
        ("completion", {"prompt": "a"}, 100, 16, 1, True),
        ("completion", {"prompt": ["a", "b"], "n": 4, "max_tokens": 9}, 100, 9, 8, True),
        ("completion", {"prompt": "a", "max_tokens": 0, "echo": True}, 100, 0, 1, True),
        ("response", {"input": "a", "max_output_tokens": 7}, None, 7, 1, True),
        ("response", {"input": "a"}, 100, 100, 1, False),
        ("embedding", {"input": ["a", "b"]}, 100, 0, 2, True),
    ],
)
def test_the_token_limit_counts_whichever_field_names_it(
    shape: Shape, body: dict[str, Any], context: int | None, tokens: int, choices: int, is_limited: bool
) -> None:
    found = bound(body, shape, context=context)
    assert (found.output_tokens, found.choices, found.is_limited) == (tokens, choices, is_limited)


def test_no_prompt_is_longer_than_the_context_of_the_engines() -> None:
    assert bound({"messages": [{"role": "user", "content": "x" * 10**5}]}, context=2048).prompt_tokens == 2048
    assert bound({"prompt": ["x" * 10**5] * 3}, "completion", context=2048).prompt_tokens == 3 * 2048
    assert bound({"input": ["x" * 10**5] * 3}, "embedding", context=512).prompt_tokens == 3 * 512


def test_token_ids_count_one_each_and_two_marks_a_prompt() -> None:
    assert bound({"prompt": [123456] * 10}, "completion").prompt_tokens == 12
    assert bound({"input": [[123456] * 10] * 2}, "embedding").prompt_tokens == 24


def media(shape: Shape, *parts: dict[str, Any]) -> dict[str, Any]:
    return {"messages" if shape == "chat" else "input": [{"role": "user", "content": list(parts)}]}


IMAGE = {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}}
SOUND = {"type": "input_audio", "input_audio": {"data": "A" * 4000, "format": "wav"}}


def test_media_cost_their_ceiling_and_not_their_bytes() -> None:
    chat = bound(media("chat", IMAGE, SOUND, {"type": "text", "text": "What is it?"}))
    assert chat.has_media
    assert 1600 + 750 < chat.prompt_tokens < 1600 + 750 + SETTINGS.template_tokens_max + 300
    answer = bound(media("response", {"type": "input_image", "image_url": PIXEL}), "response")
    assert 1600 < answer.prompt_tokens < 1600 + SETTINGS.template_tokens_max + 200


def test_media_in_what_a_function_returned_are_found() -> None:
    item = {"type": "function_call_output", "call_id": "c"}
    body = {"input": [item | {"output": [{"type": "input_image", "image_url": PIXEL}]}]}
    assert bound(body, "response").has_media
    assert not bound({"input": [item | {"output": "42"}]}, "response").has_media


@pytest.mark.parametrize(
    ("part", "kind"),
    [
        (IMAGE, "image"),
        (SOUND, "audio"),
        ({"type": "audio_url", "audio_url": {"url": "data:audio/wav;base64,"}}, "audio"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,"}}, "video"),
    ],
)
def test_media_without_a_ceiling_are_refused_by_their_kind(part: dict[str, Any], kind: str) -> None:
    with pytest.raises(UnpricedMedia, match=f"no {kind}_tokens") as caught:
        bound(media("chat", part), price=NO_MEDIA)
    assert caught.value.kind == kind


NANO_PRICES = st.integers(0, 10**12)
PERCENTS = st.sampled_from([100, 50, 33, 1])


@given(NANO_PRICES, st.integers(1, 10**12), st.integers(0, 10**6), st.integers(1, 300),
       st.integers(0, 10**16), PERCENTS)  # fmt: skip
def test_a_clamp_is_the_largest_token_limit_that_the_money_buys(
    prompt_nano: int, completion_nano: int, prompt: int, choices: int, amount: int, percent: int
) -> None:
    price = Price("m", prompt_nano, 0, completion_nano)
    tokens = clamped_tokens(price, prompt, choices, amount, percent)
    wanted = Bound(prompt, tokens, choices, False, False, prompt)
    if tokens < TOKENS_MAX:
        assert hold_nano(price, wanted, percent, output_tokens=tokens + 1) > amount
    if tokens > 0:
        assert hold_nano(price, wanted, percent) <= amount


def test_what_costs_nothing_is_not_clamped_unless_its_prompt_is_too_dear() -> None:
    assert clamped_tokens(Price("m", 0, 0, 0), 10, 1, 0) == TOKENS_MAX
    assert clamped_tokens(Price("m", 10**6, 0, 0), 10, 1, 9) == 0
    assert clamped_tokens(Price("m", 10**6, 0, 10**6), 10, 1, 0, 0) == TOKENS_MAX


@given(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 9), PERCENTS)
def test_nothing_within_a_bound_costs_more_than_its_hold(
    prompt: int, cached: int, output: int, choices: int, percent: int
) -> None:
    price = Price("m", 3, 3, 7)
    held = hold_nano(price, Bound(prompt, output, choices, True, False, prompt), percent)
    assert cost_nano(price, prompt, min(cached, prompt), output * choices, percent) <= held


def test_the_least_hold_buys_the_smallest_clamp_and_no_more_than_the_whole() -> None:
    wanted = Bound(10, 1000, 2, False, False, 10)
    price = Price("m", 10**6, 0, 10**6)
    assert least_nano(price, wanted, 16) == 10 + 2 * 16
    assert least_nano(price, wanted, 5000) == hold_nano(price, wanted) == 10 + 2 * 1000


def test_token_limits_count_a_likely_number_when_a_request_comes() -> None:
    body = {"messages": [{"role": "user", "content": "x" * 4000}]}
    assert 1000 < limit_tokens(bound(body)) < 1020 + 256
    assert limit_tokens(bound(body | {"max_tokens": 10, "n": 2})) < 1020 + 20
    assert limit_tokens(bound({"prompt": [7] * 50, "max_tokens": 1}, "completion")) == 51
