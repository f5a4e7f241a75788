"""What is read from vLLM's /metrics, against bodies that a real one sent."""

from pathlib import Path

import pytest

from nodes.agent.metrics import EngineMetrics, parse_metrics
from nodes.protocol import EngineLoad

CAPTURES = Path(__file__).parents[1] / "captures"


def captured(name: str) -> bytes:
    return (CAPTURES / name).read_bytes().partition(b"\r\n\r\n")[2]


def test_an_idle_engine_is_read() -> None:
    assert parse_metrics(captured("get_metrics_before.resp")) == EngineMetrics(
        load=EngineLoad(),
        block_size=128,
        kv_tokens=46592,
        prefix_queries=0,
        prefix_hits=0,
        prompt_tokens=0,
        completion_tokens=0,
    )


def test_an_engine_with_adapters_is_read() -> None:
    metrics = parse_metrics(captured("lora__metrics.resp"))
    assert (metrics.prefix_queries, metrics.prefix_hits, metrics.load.is_idle) == (74, 0, True)
    assert (metrics.prompt_tokens, metrics.completion_tokens) == (74, 20)


def test_a_captured_body_with_other_numbers_gives_them() -> None:
    body = captured("get_metrics_before.resp")
    for line, value in (
        (b'vllm:num_requests_running{engine="0",model_name="smollm2-135m"}', b"4.0"),
        (b'vllm:num_requests_waiting{engine="0",model_name="smollm2-135m"}', b"3.0"),
        (b'vllm:kv_cache_usage_perc{engine="0",model_name="smollm2-135m"}', b"0.0055"),
    ):
        assert line + b" 0.0" in body
        body = body.replace(line + b" 0.0", line + b" " + value)
    assert parse_metrics(body).load == EngineLoad(running=4, waiting=3, kv_usage=0.0055)


def test_ranks_add_up_and_the_fullest_cache_counts() -> None:
    body = b"""# TYPE x
vllm:num_requests_running{engine="0"} 2.0
vllm:num_requests_running{engine="1"} 3.0
vllm:kv_cache_usage_perc{engine="0"} 0.25
vllm:kv_cache_usage_perc{engine="1"} 0.5
vllm:cache_config_info{hash_block_size="64",block_size="16",kv_cache_size_tokens="100",engine="0"} 1.0
vllm:cache_config_info{hash_block_size="64",block_size="16",kv_cache_size_tokens="100",engine="1"} 1.0
"""
    metrics = parse_metrics(body)
    assert metrics.load == EngineLoad(running=5, kv_usage=0.5)
    assert (metrics.block_size, metrics.kv_tokens) == (16, 200)


@pytest.mark.parametrize(("awake", "sleeping"), [(b"1.0", False), (b"0.0", True)])
def test_a_sleeping_engine_is_known(awake: bytes, sleeping: bool) -> None:
    series = b'vllm:engine_sleep_state{engine="0",sleep_state="%s"} %s\n'
    body = b"\n" + series % (b"awake", awake) + series % (b"weights_offloaded", b"1.0")
    assert parse_metrics(body).load.sleeping is sleeping


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\n",
        b"<html>",
        b"\nvllm:num_requests_running{",
        b'\nvllm:num_requests_running{a="b"} x',
        b"\n" * 9,
    ],
)
def test_a_broken_body_reads_as_nothing_known(body: bytes) -> None:
    assert parse_metrics(body) == EngineMetrics(EngineLoad(), 0, 0, 0, 0)
