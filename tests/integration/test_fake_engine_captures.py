"""The stand-in engine against the bytes of a real one: every capture is compared or has its reason not to be."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.fakes import captures
from tests.fakes.captures import Answer
from tests.fakes.engine import FakeEngine

pytestmark = pytest.mark.asyncio(loop_scope="module")

BUSY_CHAT = captures.request("chat_stream_long")

PROFILES: dict[str, tuple[str, ...]] = {
    "plain": (),
    "full": (
        "--enable-prompt-tokens-details", "--enable-per-request-metrics", "--enable-request-id-headers",
        "--enable-server-load-tracking", "--enable-auto-tool-choice", "--tool-call-parser", "hermes",
        "--dev-mode", "--block-size", "32",
    ),
    "lora": ("--enable-lora",),
    "embed": ("--runner", "pooling"),
}  # fmt: skip

# Equal byte for byte once ids, times and measured milliseconds are masked.
EXACT = [
    "chat_json_object", "chat_json_schema", "chat_n2", "chat_nonstream", "chat_nonstream_max_completion_tokens",
    "chat_nonstream_repeat_cached", "chat_nonstream_reqid", "chat_render", "chat_stop", "chat_stop_include",
    "chat_stream_continuous_only", "chat_stream_long", "chat_stream_n2", "chat_stream_nousage", "chat_stream_stop",
    "chat_stream_unicode", "chat_stream_usage", "chat_stream_usage_continuous", "chat_structured_choice",
    "completion_multi_prompt", "completion_nonstream", "completion_stream", "completion_stream_multi_prompt",
    "completion_stream_usage", "burst__burst_stream_00", "embed__chat_on_pooling", "embed__models",
    "embeddings_attempt", "err_bad_model", "err_bad_model_stream", "err_bad_schema", "err_bad_temperature_neg",
    "err_bad_temperature_str", "err_empty_body", "err_empty_messages", "err_image", "err_logprobs_too_many",
    "err_malformed_json", "err_max_tokens_neg", "err_max_tokens_too_large", "err_max_tokens_too_large_stream",
    "err_max_tokens_zero", "err_method", "err_missing_messages", "err_n_0", "err_no_content_type", "err_no_model",
    "err_prompt_too_long", "err_prompt_too_long_stream", "err_stream_options_nostream", "err_tools_auto_not_enabled",
    "err_top_p", "err_wrong_content_type", "full__chat_user_priority", "full__collective_rpc_bad",
    "full__err_tool_unknown_named", "full__get_is_paused", "full__get_is_sleeping", "full__get_load",
    "full__get_models", "full__get_weight_info", "full__get_world_size", "full__kv_ev_chat",
    "full__load_lora_missing", "full__overload_0", "full__overload_1", "full__overload_health", "full__pause",
    "full__pause_abort", "full__pause_midstream", "full__per_request_metrics_stream", "full__prefix_cache_salt",
    "full__prefix_cold", "full__prefix_warm", "full__prefix_warm_stream", "full__reset_prefix_cache",
    "full__resume", "full__sleep", "full__tools_auto", "full__tools_auto_stream", "full__wake_up", "get_404",
    "get_health", "get_is_sleeping", "get_kv_event_sources", "get_load", "get_load_after", "get_model_one",
    "get_models", "get_ping", "get_version", "lora__chat_base", "lora__chat_unloaded", "lora__load",
    "lora__load_missing", "lora__models_after", "messages_count_tokens", "messages_nonstream", "messages_stream",
    "ping_post", "priority_0", "priority_default", "responses_nonstream", "responses_stream", "temp_3",
    "unknown_field",
]  # fmt: skip

# Equal too, but for how many tokens a tool call cost: the real one spent tokens that show no text.
EXACT_BUT_USAGE = [
    "full__tools_named", "full__tools_named_stream", "full__tools_required", "full__tools_required_stream",
]  # fmt: skip

# The same keys, nulls, kinds and order of events; the numbers, tokens or their grouping are the model's.
SAME_SHAPE = {
    "chat_logprobs": "log probabilities are the model's",
    "chat_stream_logprobs": "log probabilities are the model's; the real engine merged three tokens in a chunk",
    "completion_echo_logprobs": "log probabilities are the model's",
    "completion_token_ids": "token ids are the tokenizer's",
    "detokenize": "token ids are the tokenizer's",
    "tokenize_chat": "token ids are the tokenizer's",
    "tokenize_prompt": "token ids are the tokenizer's",
    "embed__embeddings": "vectors are the model's",
    "embed__embeddings_b64": "vectors are the model's",
}

# Compared in a test of their own below, because the engine must be in some state first.
STAGED = {
    "burst__burst_stream_05", "burst__burst_stream_11", "crash_engine_stream", "full__abort_requests",
    "full__abort_target_stream", "full__chat_while_paused", "full__err_503_nonstream", "full__health_while_paused",
    "full__is_paused_after", "full__is_sleeping_after", "full__load_overload",
    "full__overload_rejected_completion_stream", "full__overload_rejected_nonstream", "full__overload_rejected_stream",
    "full__pause_abort_target_stream", "full__pause_target_stream", "get_metrics_before", "lora__chat_lora",
    "lora__load_again", "lora__metrics", "lora__models", "lora__unload", "sigterm_stream_default",
    "sigterm_stream_default_2",
}  # fmt: skip

NOT_COMPARED = {
    "full__get_kv_event_sources": "the stand-in publishes no KV events, so it describes no source",
    "full__metrics_after": "only the request was kept",
    "full__metrics_overload": "only the request was kept",
    "full__metrics_paused": "only the request was kept",
    "get_metrics_after": "only the request was kept",
    "get_openapi": "only the request was kept; the stand-in has no OpenAPI document",
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running() -> AsyncIterator[dict[str, FakeEngine]]:
    engines = {name: FakeEngine(*flags) for name, flags in PROFILES.items()}
    await asyncio.gather(*[engine.start() for engine in engines.values()])
    yield engines
    for engine in engines.values():
        await engine.kill()


@pytest.fixture
async def plain(running: dict[str, FakeEngine]) -> FakeEngine:
    return await _fresh(running["plain"])


@pytest.fixture
async def full(running: dict[str, FakeEngine]) -> FakeEngine:
    return await _fresh(running["full"])


@pytest.fixture
async def lora(running: dict[str, FakeEngine]) -> FakeEngine:
    engine = await _fresh(running["lora"])
    await engine.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "demo-ft"})
    return engine


async def test_every_capture_is_compared_or_has_a_reason_not_to_be() -> None:
    lists = [EXACT, EXACT_BUT_USAGE, list(SAME_SHAPE), sorted(STAGED), list(NOT_COMPARED)]
    listed = [name for names in lists for name in names]
    assert sorted(listed) == sorted(set(listed))
    assert set(listed) == captures.names()


@pytest.mark.parametrize("name", EXACT)
async def test_answers_the_same_bytes(running: dict[str, FakeEngine], name: str) -> None:
    ours = await _answer(running, name)
    _assert_same_head(ours, name)
    _assert_same_bytes(ours, captures.response(name))


@pytest.mark.parametrize("name", EXACT_BUT_USAGE)
async def test_answers_the_same_bytes_but_for_the_token_count(
    running: dict[str, FakeEngine], name: str
) -> None:
    ours = await _answer(running, name)
    _assert_same_head(ours, name)
    _assert_same_bytes(ours, captures.response(name), usage=True)


@pytest.mark.parametrize("name", SAME_SHAPE)
async def test_answers_the_same_shape(running: dict[str, FakeEngine], name: str) -> None:
    ours, theirs = await _answer(running, name, own_words=True), captures.response(name)
    _assert_same_head(ours, name)
    _assert_same_story(ours, theirs)


@pytest.mark.parametrize(
    "name",
    [
        "full__overload_rejected_nonstream",
        "full__overload_rejected_stream",
        "full__overload_rejected_completion_stream",
        "full__err_503_nonstream",
    ],
)
async def test_full_queue_answers_503(full: FakeEngine, name: str) -> None:
    await full.knobs(max_num_queued_reqs=1, ttft_ms=60_000)
    asked = "full__overload_rejected_nonstream" if name == "full__err_503_nonstream" else name
    async with _Busy(full, 1):
        ours = await captures.exchange(full.port, captures.request(asked))
    _assert_same_head(ours, name)
    _assert_same_bytes(ours, captures.response(name))


@pytest.mark.parametrize("name", ["burst__burst_stream_05", "burst__burst_stream_11"])
async def test_burst_over_the_queue_gets_200_and_an_error_event(plain: FakeEngine, name: str) -> None:
    await plain.knobs(max_num_queued_reqs=1, ttft_ms=60_000, burst=True)
    async with _Busy(plain, 1):
        ours = await captures.exchange(plain.port, captures.request(name))
    _assert_same_head(ours, name)
    _assert_same_bytes(ours, captures.response(name))


async def test_load_counts_requests_in_flight(full: FakeEngine) -> None:
    await full.knobs(ttft_ms=60_000)
    async with _Busy(full, 8):
        ours = await captures.exchange(full.port, captures.request("full__load_overload"))
    _assert_same_bytes(ours, captures.response("full__load_overload"))


@pytest.mark.parametrize("name", ["crash_engine_stream", "sigterm_stream_default_2"])
async def test_dead_engine_core_ends_streams_with_an_error_event(plain: FakeEngine, name: str) -> None:
    await plain.fault("error_mid", after=10)
    ours = await captures.exchange(plain.port, captures.request("chat_stream_usage"))
    _assert_same_story(ours, captures.response(name))


async def test_terminated_engine_falls_silent_in_a_stream(plain: FakeEngine) -> None:
    theirs = captures.response("sigterm_stream_default")
    await plain.fault("stall", after=10)
    ours = await captures.exchange(plain.port, captures.request("chat_stream_usage"), chunks=11)
    assert not ours.is_whole
    assert not theirs.is_whole
    _assert_same_story(ours, theirs)


async def test_aborted_request_ends_with_its_usage(full: FakeEngine) -> None:
    name = "full__abort_target_stream"
    await full.knobs(pace_ms=5, prompt_tokens=32)
    stream = asyncio.create_task(captures.exchange(full.port, captures.request(name)))
    await full.until(lambda record: record["generation_tokens"] > 3)
    answer = await captures.exchange(full.port, captures.request("full__abort_requests"))
    _assert_same_bytes(answer, captures.response("full__abort_requests"))
    ours = await stream
    _assert_same_head(ours, name)
    _assert_same_story(ours, captures.response(name))


async def test_pause_with_abort_ends_streams_with_their_usage(full: FakeEngine) -> None:
    name = "full__pause_abort_target_stream"
    await full.knobs(pace_ms=5, prompt_tokens=32)
    stream = asyncio.create_task(captures.exchange(full.port, captures.request(name)))
    await full.until(lambda record: record["generation_tokens"] > 3)
    await captures.exchange(full.port, captures.request("full__pause_abort"))
    _assert_same_story(await stream, captures.response(name))


async def test_paused_stream_goes_on_after_resume(full: FakeEngine) -> None:
    name = "full__pause_target_stream"
    await full.knobs(**captures.script(name), pace_ms=2)
    stream = asyncio.create_task(captures.exchange(full.port, captures.request(name)))
    await full.until(lambda record: record["generation_tokens"] > 3)
    await captures.exchange(full.port, captures.request("full__pause_midstream"))
    for asked in ("full__is_paused_after", "full__health_while_paused"):
        _assert_same_bytes(
            await captures.exchange(full.port, captures.request(asked)), captures.response(asked)
        )
    await full.knobs(**captures.script("full__chat_while_paused"))
    queued = asyncio.create_task(captures.exchange(full.port, captures.request("full__chat_while_paused")))
    await full.until(lambda record: record["waiting"] == 1)
    await captures.exchange(full.port, captures.request("full__resume"))
    _assert_same_bytes(await queued, captures.response("full__chat_while_paused"))
    _assert_same_story(await stream, captures.response(name))


async def test_sleeping_engine_says_so(full: FakeEngine) -> None:
    await captures.exchange(full.port, captures.request("full__sleep"))
    ours = await captures.exchange(full.port, captures.request("full__is_sleeping_after"))
    await captures.exchange(full.port, captures.request("full__wake_up"))
    _assert_same_bytes(ours, captures.response("full__is_sleeping_after"))


@pytest.mark.parametrize("name", ["lora__chat_lora", "lora__load_again", "lora__models", "lora__unload"])
async def test_loaded_adapter_answers(lora: FakeEngine, name: str) -> None:
    await lora.knobs(**captures.script(name))
    await captures.exchange(lora.port, captures.request("lora__load"))
    ours = await captures.exchange(lora.port, captures.request(name))
    _assert_same_head(ours, name)
    _assert_same_bytes(ours, captures.response(name))


@pytest.mark.parametrize(("profile", "name"), [("plain", "get_metrics_before"), ("lora", "lora__metrics")])
async def test_metrics_have_the_names_texts_and_labels_of_the_real_ones(
    running: dict[str, FakeEngine], profile: str, name: str
) -> None:
    engine = await _fresh(running[profile])
    ours = await captures.exchange(engine.port, captures.request(name))
    _assert_same_head(ours, name)
    theirs = captures.response(name)
    assert _described(ours.body) <= _described(theirs.body)
    real = _samples(theirs.body)
    for sample, labels in _samples(ours.body).items():
        if sample == "vllm:cache_config_info":
            assert labels <= real[sample]
        else:
            assert labels == real[sample], sample


class _Busy:
    """So many streams in flight, for as long as the block lasts."""

    def __init__(self, engine: FakeEngine, count: int) -> None:
        self._engine = engine
        self._count = count
        self._tasks: list[asyncio.Task[Answer]] = []

    async def __aenter__(self) -> None:
        self._tasks = [
            asyncio.create_task(captures.exchange(self._engine.port, BUSY_CHAT)) for _ in range(self._count)
        ]
        await self._engine.until(lambda record: record["running"] == self._count)

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


async def _fresh(engine: FakeEngine) -> FakeEngine:
    """The engine as it started: no faults, no pause, nothing cached, nothing in flight."""
    await engine.knobs(
        answer=None, tool_arguments='{"city": "Paris"}', prompt_tokens=None, pace_ms=0, ttft_ms=0, faults=[],
        max_num_queued_reqs=0, burst=False, paused=False, sleeping=False,
    )  # fmt: skip
    await engine.until(lambda record: record["running"] + record["waiting"] == 0)
    await engine.reset()
    return engine


async def _answer(running: dict[str, FakeEngine], name: str, *, own_words: bool = False) -> Answer:
    """Our answer to the capture's request, with the engine told to say what the real one said."""
    profile = name.partition("__")[0]
    engine = await _fresh(running[profile if profile in PROFILES else "plain"])
    if profile == "lora":
        await engine.ask("POST", "/v1/unload_lora_adapter", {"lora_name": "demo-ft"})
    said = captures.script(name)
    if own_words:
        said.pop("answer", None)
    await engine.knobs(**said)
    if captures.cached_tokens(name):
        await captures.exchange(engine.port, captures.request(name))
    return await captures.exchange(engine.port, captures.request(name))


def _assert_same_head(ours: Answer, name: str) -> None:
    theirs = captures.response(name)
    given_id = name != "full__err_503_nonstream" and b"x-request-id:" in captures.request(name).lower()
    assert ours.status == theirs.status
    assert captures.headers_seen(ours, given_id=given_id) == captures.headers_seen(theirs, given_id=given_id)


def _assert_same_bytes(ours: Answer, theirs: Answer, *, usage: bool = False) -> None:
    assert ours.is_whole
    if theirs.chunks is None:
        assert captures.mask(ours.body, usage=usage) == captures.mask(theirs.body, usage=usage)
        return
    assert ours.chunks is not None
    assert [captures.mask(chunk, usage=usage) for chunk in ours.chunks] == [
        captures.mask(chunk, usage=usage) for chunk in theirs.chunks
    ]


def _assert_same_story(ours: Answer, theirs: Answer) -> None:
    if theirs.chunks is None:
        assert captures.skeleton(ours.body) == captures.skeleton(theirs.body)
        return
    assert all(event.endswith(b"\n\n") for event in ours.events)
    assert captures.story(ours) == captures.story(theirs)


def _described(text: bytes) -> set[str]:
    return {line for line in text.decode().splitlines() if line.startswith("#")}


def _samples(text: bytes) -> dict[str, set[str]]:
    """Per sample name the label names (and `le` values, which are the buckets)."""
    found: dict[str, set[str]] = {}
    for line in text.decode().splitlines():
        name, brace, rest = line.partition("{")
        if not line.startswith("#") and brace:
            pairs: list[Any] = [pair.partition("=") for pair in rest.rpartition("}")[0].split('",')]
            labels = {f"{key}={value}" if key == "le" else key for key, _, value in pairs}
            found.setdefault(name, set()).update(labels)
    return found


async def test_script_repeats_a_captured_stream_token_by_token() -> None:
    said = captures.script("chat_stream_usage")
    assert len(said["answer"][0]) == 32
    assert said["prompt_tokens"] == 37
    assert json.dumps(said)
