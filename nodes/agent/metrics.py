"""Reads the few lines of vLLM's /metrics that the pool needs: load, KV cache, sleep, prefix cache.

The body has 50 to 80 KB and comes every second from every engine, so it is searched, not parsed. Pure.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

from nodes.protocol import EngineLoad


@dataclass(frozen=True, slots=True)
class EngineMetrics:
    """`load` over all ranks of the engine; cache sizes are 0 where the engine does not tell them."""

    load: EngineLoad
    block_size: int  # tokens of a prefix-cache block
    kv_tokens: int  # tokens that the KV cache holds
    prefix_queries: int  # prompt tokens looked up, since the start
    prefix_hits: int  # of them found
    prompt_tokens: int | None = None  # worked on since the start; None: it does not tell
    completion_tokens: int | None = None


def parse_metrics(body: bytes) -> EngineMetrics:
    """A data-parallel engine has one series a rank: counts add up, of KV usage the fullest rank counts."""
    awake = [value for labels, value in _series(body, b"vllm:engine_sleep_state") if b'"awake"' in labels]
    block_size = kv_tokens = 0
    for labels, _ in _series(body, b"vllm:cache_config_info"):
        block_size = _whole(_label(labels, b"block_size"))
        kv_tokens += _whole(_label(labels, b"kv_cache_size_tokens"))
    return EngineMetrics(
        load=EngineLoad(
            running=int(_total(body, b"vllm:num_requests_running")),
            waiting=int(_total(body, b"vllm:num_requests_waiting")),
            kv_usage=max((value for _, value in _series(body, b"vllm:kv_cache_usage_perc")), default=0.0),
            sleeping=bool(awake) and not all(awake),
        ),
        block_size=block_size,
        kv_tokens=kv_tokens,
        prefix_queries=int(_total(body, b"vllm:prefix_cache_queries_total")),
        prefix_hits=int(_total(body, b"vllm:prefix_cache_hits_total")),
        prompt_tokens=_counter(body, b"vllm:prompt_tokens_total"),
        completion_tokens=_counter(body, b"vllm:generation_tokens_total"),
    )


def _counter(body: bytes, name: bytes) -> int | None:
    values = [value for _, value in _series(body, name)]
    return int(sum(values)) if values else None


def _total(body: bytes, name: bytes) -> float:
    return sum(value for _, value in _series(body, name))


def _series(body: bytes, name: bytes) -> Iterator[tuple[bytes, float]]:
    """(labels, value) of each line of exactly that name; lines of one name stand together."""
    start = body.find(b"\n" + name + b"{")
    while start >= 0:
        end = body.find(b"\n", start + 1)
        line = body[start + 1 + len(name) : end if end >= 0 else len(body)]
        labels, _, value = line.rpartition(b"} ")
        with contextlib.suppress(ValueError, IndexError):  # a cut or odd line says nothing
            yield labels, float(value.split()[0])
        start = end if end >= 0 and body.startswith(name + b"{", end + 1) else -1


def _label(labels: bytes, name: bytes) -> bytes:
    # `{` or `,` before the name: "block_size" also ends other labels' names.
    for mark in (b"{", b","):
        _, found, rest = labels.partition(mark + name + b'="')
        if found:
            return rest.partition(b'"')[0]
    return b""


def _whole(text: bytes) -> int:
    return int(text) if text.isdigit() else 0
