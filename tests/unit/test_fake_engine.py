"""The stand-in engine's pure parts: prefix cache, answers, knobs, flags."""

from types import SimpleNamespace
from typing import Any

import pytest

from bench.fake_engine import answers
from bench.fake_engine.config import parse_flags
from bench.fake_engine.knobs import Knobs
from bench.fake_engine.prefills import Prefills
from bench.fake_engine.prompts import PrefixCache, count_tokens, token_ids

SYSTEM = b"You are a meticulous assistant. " * 40


def test_same_prefix_is_found_again_in_whole_blocks() -> None:
    cache = PrefixCache(block_size=32, capacity=100)
    assert _admit(cache, SYSTEM + b"first question") == (0, 32 * (_tokens(SYSTEM + b"first question") // 32))
    found, _ = _admit(cache, SYSTEM + b"second question, a longer one")
    assert found == 32 * (_tokens(SYSTEM) // 32)


def test_a_rendered_prompt_has_as_many_tokens_as_are_counted_and_those_of_its_beginning_are_the_same() -> (
    None
):
    first, second = ([{"role": "user", "content": (SYSTEM + end).decode()}] for end in (b"this", b"what"))
    assert len(token_ids(first)) == count_tokens(SYSTEM + b"this", template=True)
    assert token_ids(first)[:-1] == token_ids(second)[:-1]
    assert token_ids(first)[-1] != token_ids(second)[-1]


def test_salt_keeps_tenants_apart() -> None:
    cache = PrefixCache(block_size=32, capacity=100)
    _admit(cache, SYSTEM, salt="a")
    assert _admit(cache, SYSTEM, salt="b")[0] == 0
    assert _admit(cache, SYSTEM, salt="a")[0] > 0


def test_last_token_of_whole_blocks_is_computed_again() -> None:
    cache = PrefixCache(block_size=32, capacity=100)
    data = b"x" * 4 * (64 - 30)
    assert _admit(cache, data) == (0, 64)
    assert _admit(cache, data) == (32, 0)


def test_full_cache_forgets_what_was_used_longest_ago() -> None:
    cache = PrefixCache(block_size=32, capacity=20)
    for name in (b"a", b"b", b"c", b"d"):
        _admit(cache, name * 1200)
        _admit(cache, b"a" * 1200)
    assert len(cache) == 20
    assert _admit(cache, b"a" * 1200)[0] > 0
    assert _admit(cache, b"b" * 1200)[0] == 0


def test_prompt_shorter_than_a_block_is_never_cached() -> None:
    cache = PrefixCache(block_size=128, capacity=100)
    assert _admit(cache, b"hi") == (0, 0)
    assert _admit(cache, b"hi") == (0, 0)


class Prompt:
    """Notes when it is computed."""

    def __init__(self) -> None:
        self.is_over = False
        self.at: float | None = None

    def computed(self, now: float) -> None:
        self.at = now


def _computed(waits: list[float], *, left: int | None = None) -> list[float | None]:
    """When prompts of 1,000 tokens that arrive at those times are computed, at a second for each. One may be `left`."""
    now = 0.0
    timers: list[tuple[float, Any]] = []
    loop = SimpleNamespace(time=lambda: now, call_soon=lambda call: timers.append((now, lambda _: call())))
    wheel = SimpleNamespace(at=lambda when, call: timers.append((when, call)))
    prefills = Prefills(SimpleNamespace(knobs=Knobs(ttft_per_1k_ms=1000.0), loop=loop, wheel=wheel))  # type: ignore[arg-type]
    prompts: Any = [Prompt() for _ in waits]
    timers += [
        (when, lambda _, one=one: prefills.add(one, 1000)) for when, one in zip(waits, prompts, strict=True)
    ]
    while timers:
        timers.sort(key=lambda timer: timer[0])
        now, call = timers.pop(0)
        call(now)
        if left is not None and now >= waits[left]:
            prompts[left].is_over = True
    return [one.at for one in prompts]


def test_prompts_are_computed_one_after_the_other_in_steps_of_so_many_tokens() -> None:
    assert _computed([0.0]) == [1.0]
    assert _computed([0.0, 0.0]) == [1.0, 2.0]
    assert _computed([0.0] * 4) == pytest.approx([1.0, 3.048, 3.048, 4.0])
    assert _computed([0.0, 0.5, 5.0]) == [1.0, 2.0, 6.0]


def test_a_prompt_whose_client_left_is_not_computed() -> None:
    assert _computed([0.0, 0.5, 0.6], left=1) == [1.0, None, 2.0]


@pytest.mark.parametrize(
    ("body", "tokens", "finish"),
    [
        ({}, 16, "stop"),
        ({"max_tokens": 16}, 16, "stop"),
        ({"max_tokens": 15}, 15, "length"),
        ({"max_tokens": 40, "ignore_eos": True}, 40, "length"),
        ({"max_tokens": 40, "min_tokens": 30}, 30, "stop"),
        ({"max_completion_tokens": 3}, 3, "length"),
        ({"ignore_eos": True}, 100, "length"),
    ],
)
def test_answer_is_as_long_as_was_asked(body: dict[str, object], tokens: int, finish: str) -> None:
    answer = answers.compose(body, Knobs(), room=100, index=0)
    assert (len(answer.pieces), answer.finish) == (tokens, finish)


def test_end_of_sequence_token_counts_but_shows_no_text() -> None:
    answer = answers.compose({}, Knobs(tokens=4), room=100, index=0)
    assert [bool(piece) for piece in answer.pieces] == [True, True, True, False]


def test_stop_string_over_several_tokens_ends_the_text_before_it() -> None:
    knobs = Knobs(answer=["one", " tw", "o thr", "ee four"])
    answer = answers.compose({"stop": "two three"}, knobs, room=100, index=0)
    assert answer.text == b"one "
    assert (answer.finish, answer.stop_reason, len(answer.pieces)) == ("stop", "two three", 4)


def test_tokens_without_text_are_part_of_the_count() -> None:
    answer = answers.compose(
        {"max_tokens": 10, "ignore_eos": True}, Knobs(textless_every=3), room=100, index=0
    )
    assert [not piece for piece in answer.pieces].count(True) == 3
    assert len(answer.pieces) == 10


def test_schema_gets_a_value_that_fits() -> None:
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 3}, "kind": {"enum": ["x"]}},
    }
    assert answers.instance_of(schema) == {"n": 3, "kind": "x"}


def test_unknown_knob_and_unknown_fault_are_refused() -> None:
    with pytest.raises(ValueError, match="unknown knob 'pacing'"):
        Knobs().turn({"pacing": 3})
    with pytest.raises(ValueError, match="unknown fault kind 'explode'"):
        Knobs().turn({"faults": [{"kind": "explode"}]})


def test_fault_strikes_as_often_as_told_and_only_where_it_matches() -> None:
    knobs = Knobs()
    knobs.turn({"faults": [{"kind": "stall", "times": 2, "stream": True, "contains": "needle"}]})
    assert knobs.take_fault("/v1/completions", "m", False, b"needle") is None
    assert knobs.take_fault("/v1/completions", "m", True, b"hay") is None
    assert [bool(knobs.take_fault("/v1/completions", "m", True, b"a needle")) for _ in range(3)] == [
        True,
        True,
        False,
    ]


def test_command_of_vllm_is_understood() -> None:
    config = parse_flags(
        [
            "serve",
            "/models/x",
            "--served-model-name",
            "x",
            "--gpu-memory-utilization",
            "0.9",
            "--port",
            "8123",
        ],
        {},
    )
    assert (config.models, config.port) == (("x",), 8123)


def test_unknown_flag_is_refused_otherwise() -> None:
    with pytest.raises(SystemExit):
        parse_flags(["--gpu-memory-utilization", "0.9"], {})


def _tokens(data: bytes) -> int:
    return count_tokens(data, template=True)


def _admit(cache: PrefixCache, data: bytes, salt: str = "") -> tuple[int, int]:
    return cache.admit(data, _tokens(data), salt, template=True)
