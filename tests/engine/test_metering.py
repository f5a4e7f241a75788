"""What is recorded is what the real engine says it did, to the token, however the turn was asked for."""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from openai import OpenAI

from tests.engine.system import MODEL, System, now
from tests.fakes.processes import eventually
from tests.fakes.up import ROOT, clean_environment

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

MESSAGES: list[Any] = [{"role": "user", "content": "Name the days of the week."}]


def chat(client: OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=12, **more)


def completion(client: OpenAI, **more: Any) -> Any:
    return client.completions.create(model=MODEL, prompt=["One, two,", "Hello"], max_tokens=12, **more)


def response(client: OpenAI, **more: Any) -> Any:
    return client.responses.create(model=MODEL, input="Name the days.", max_output_tokens=12, **more)


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(
    ("ask", "more"),
    [
        pytest.param(chat, {}, id="chat"),
        pytest.param(chat, {"n": 3}, id="three answers"),
        pytest.param(chat, {"stop": ["e"]}, id="stop string"),
        pytest.param(completion, {"n": 2}, id="two prompts with two answers each"),
        pytest.param(response, {}, id="response"),
    ],
)
def test_a_finished_turn_is_charged_exactly_what_the_engine_generated(
    client: OpenAI, system: System, ask: Callable[..., Any], more: dict[str, Any], *, is_stream: bool
) -> None:
    engine, begun = system.engine, now()
    before = engine.metric("generation_tokens_total")
    answer = ask(client, stream=is_stream, **more)
    if is_stream:
        with answer:
            list(answer)
    row = system.row(begun)
    assert (row.outcome, row.estimated) == ("finished", False)
    eventually(lambda: engine.metric("generation_tokens_total") - before >= row.completion_tokens)
    eventually(engine.is_idle)
    assert engine.metric("generation_tokens_total") - before == row.completion_tokens


def test_cached_prompt_tokens_are_told_whole_and_streamed(client: OpenAI, system: System) -> None:
    """Blocks of 32 tokens: a second turn with the same long prompt finds most of it."""
    messages: list[Any] = [{"role": "user", "content": "Count: " + ", ".join(map(str, range(60)))}]
    begun = now()
    for is_stream in (False, False, True):
        answer: Any = client.chat.completions.create(
            model=MODEL, messages=messages, max_tokens=2, stream=is_stream
        )
        if is_stream:
            with answer:
                list(answer)
    first, *others = system.rows(begun, 3)
    for row in others:
        assert row.prompt_tokens == first.prompt_tokens
        assert 64 <= row.cached_tokens < row.prompt_tokens
        assert row.amount_nano <= first.amount_nano


def test_the_command_line_sums_what_the_rows_say(client: OpenAI, system: System) -> None:
    begun = now()
    chat(client)
    system.row(begun)
    row_total = totals(system)
    told = subprocess.run(
        [sys.executable, "-m", "gateway", "usage", "--json", "--data-dir", str(system.up.folder)],
        cwd=ROOT, env=clean_environment(), capture_output=True, check=True, text=True, timeout=60,
    )  # fmt: skip
    total = json.loads(told.stdout)["total"]
    assert {name: total[name] for name in row_total} == row_total


def totals(system: System) -> dict[str, int]:
    (row,) = system.ask(
        "select count(*) as turns, sum(prompt_tokens)::bigint as prompt_tokens, sum(cached_tokens)::bigint as"
        " cached_tokens, sum(completion_tokens)::bigint as completion_tokens, sum(amount_nano)::bigint as amount_nano"
        " from usage"
    )
    return row
