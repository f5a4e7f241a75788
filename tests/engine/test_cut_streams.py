"""Streams of the real engine, cut at random: its client has at most what is charged, and what is charged was generated.

Nothing waits for receipts here, so between the three lies what was under way when the client left. How much that was is told
at the end (`pytest -rP`, or as properties of the tests in a JUnit report).
"""

import asyncio
import os
import random
from collections.abc import Callable
from typing import Any

import pytest

from billing.prices import PriceBook, cost_nano
from tests.engine.system import KEY, MODEL, Row, System, now
from tests.engine.test_cancel import Produced
from tests.fakes.cutting import LEAVINGS, Seen, Stream, counted, read

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

CUTS = 8
EVENTS_MAX = 40
CHAT = {"messages": [{"role": "user", "content": "Tell a long story."}]}
EMOJI = {
    "messages": [
        {"role": "user", "content": "Repeat for ever: \U0001f98a日本語 Zürich и \U0001f469‍\U0001f4bb"}
    ]
}
TOOL = {
    "type": "function",
    "function": {
        "name": "tell",
        "parameters": {
            "type": "object",
            "properties": {"story": {"type": "string", "minLength": 2000}},
            "required": ["story"],
        },
    },
}
CALL = {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "tell"}}}
PROMPTS = {"prompt": ["One, two,", "Once upon a time"], "n": 2}


@pytest.mark.parametrize(
    ("path", "asked", "events_max"),
    [
        pytest.param("/v1/chat/completions", CHAT, EVENTS_MAX, id="one answer"),
        pytest.param("/v1/chat/completions", CHAT | {"n": 2}, EVENTS_MAX, id="two answers"),
        pytest.param("/v1/chat/completions", EMOJI, EVENTS_MAX, id="characters of several tokens"),
        pytest.param("/v1/chat/completions", CHAT | CALL, 8, id="a tool"),
        pytest.param("/v1/completions", PROMPTS, EVENTS_MAX, id="two prompts with two answers each"),
        pytest.param("/v1/complete/stream", {"prompt": "Tell a long story."}, EVENTS_MAX, id="complete"),
    ],
)
def test_received_is_at_most_charged_and_charged_at_most_generated(
    system: System,
    record_property: Callable[[str, object], None],
    path: str,
    asked: dict[str, Any],
    events_max: int,
) -> None:
    seed = int(os.environ.get("POOLGATE_CUTS_SEED") or random.SystemRandom().randrange(2**32))
    rng = random.Random(seed)
    received = charged = sent = cuts = 0
    for _ in range(CUTS):
        stream = Stream(path, _body(path, asked), rng.randint(1, events_max), rng.choice(LEAVINGS))
        produced, begun = Produced(system), now()
        seen = asyncio.run(read(system.base_url, KEY, stream))
        row, generated = system.row(begun), round(produced.tokens())
        told = f"POOLGATE_CUTS_SEED={seed} {stream.leaves_after} {stream.leaving} {row} {generated} {seen}"
        assert row.outcome in (("client_gone", "finished") if seen.has_left else ("finished",)), told
        assert not row.estimated, told
        prompt, completion = _received(seen, asked.get("n", 1))
        assert prompt <= row.prompt_tokens, told
        assert completion <= row.completion_tokens <= generated, told
        assert row.amount_nano == _price(row, begun), told
        cuts += row.outcome == "client_gone"
        received, charged, sent = received + completion, charged + row.completion_tokens, sent + generated
    assert cuts >= CUTS // 2, "the model says too little to be cut"
    for name, tokens in (("received", received), ("charged", charged), ("generated", sent)):
        record_property(name, tokens)
    print(
        f"{cuts} cuts, tokens: received {received}, charged {charged} (+{charged - received}), generated {sent}"
    )


def _body(path: str, asked: dict[str, Any]) -> dict[str, Any]:
    body = {"model": MODEL, "max_tokens": 1500} | asked
    if path == "/v1/complete/stream":
        return body
    usage = {"include_usage": True, "continuous_usage_stats": True}
    return body | {"stream": True, "ignore_eos": "tools" not in asked, "stream_options": usage}


def _received(seen: Seen, n: int) -> tuple[int, int]:
    """Prompt and completion, by the engine's counts in the events that came; /v1/complete tells none: a token an event."""
    if "text" in seen.events[0]:
        return 1, sum(bool(event.get("text")) for event in seen.events)
    found = counted([event for event in seen.events if event["choices"]], n)
    return found.prompt, found.completion


def _price(row: Row, at: float) -> int:
    return cost_nano(
        PriceBook.load().price(MODEL, at), *(row.prompt_tokens, row.cached_tokens, row.completion_tokens)
    )
