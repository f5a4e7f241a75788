"""`GET /metrics`: the families of vLLM's Prometheus text that a gateway or a router reads, with live values.

Names, help texts, labels and buckets are those of tests/captures/get_metrics_before.resp; families that
nobody steers by (python_*, http_*, estimated flops) are left out.
"""

import time
from bisect import bisect_left
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine

TTFT_BUCKETS: Final = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0,
    80.0, 160.0, 640.0, 2560.0,
)  # fmt: skip
TOKEN_GAP_BUCKETS: Final = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)  # fmt: skip
LATENCY_BUCKETS: Final = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0,
    960.0, 1920.0, 7680.0,
)  # fmt: skip


class Histogram:
    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times


def render(engine: "Engine") -> str:
    knobs, cache, config = engine.knobs, engine.cache, engine.config
    text = _Text(config.models[0], engine.started_at)
    waiting = len(engine.waiting)
    text.gauge("num_requests_running", "Number of requests in model execution batches.", len(engine.running))
    text.gauge("num_requests_waiting", "Number of requests waiting to be processed.", waiting)
    text.labelled(
        "num_requests_waiting_by_reason",
        "Number of waiting requests by reason. Reason labels: 'capacity' = waiting for scheduling capacity; "
        "'deferred' = deferred by transient constraints (LoRA budget, KV transfer, blocked status). Sum of "
        "all reasons equals vllm:num_requests_waiting.",
        "reason",
        {"capacity": waiting, "deferred": 0},
    )
    text.labelled(
        "engine_sleep_state",
        "Engine sleep state; awake = 0 means engine is sleeping; awake = 1 means engine is awake; "
        "weights_offloaded = 1 means sleep level 1; discard_all = 1 means sleep level 2.",
        "sleep_state",
        {"awake": not knobs.sleeping, "weights_offloaded": knobs.sleeping, "discard_all": 0},
    )
    text.gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", engine.kv_usage)
    queried = "Prefix cache queries, in terms of number of queried tokens."
    text.counter("prefix_cache_queries", queried, cache.queries)
    text.counter("prefix_cache_hits", "Prefix cache hits, in terms of number of cached tokens.", cache.hits)
    text.counter("num_preemptions", "Cumulative number of preemption from the engine.", 0)
    text.counter("prompt_tokens", "Number of prefill tokens processed.", engine.prompt_tokens)
    computed = engine.prompt_tokens - cache.hits
    text.counters(
        "prompt_tokens_by_source",
        "Number of prompt tokens by source.",
        "source",
        {"local_compute": computed, "local_cache_hit": cache.hits, "external_kv_transfer": 0},
    )
    text.counter("prompt_tokens_cached", "Number of cached prompt tokens (local + external).", cache.hits)
    text.counter("generation_tokens", "Number of generation tokens processed.", engine.generation_tokens)
    finished = "Count of successfully processed requests."
    text.counters("request_success", finished, "finished_reason", engine.finish_reasons)
    text.counters(
        "admission_rejections",
        "Number of admission attempts rejected by a queue limit, by reason.",
        "reason",
        {"max_num_queued_reqs": engine.rejected, "max_num_queued_tokens": 0},
        engine_label=False,
    )
    for name, help_text, histogram in (
        ("time_to_first_token_seconds", "Histogram of time to first token in seconds.", engine.ttft),
        ("inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", engine.token_gap),
        ("e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", engine.e2e_time),
        (
            "request_queue_time_seconds",
            "Histogram of time spent in WAITING phase for request.",
            engine.queue_time,
        ),
        (
            "request_prefill_time_seconds",
            "Histogram of time spent in PREFILL phase for request.",
            engine.prefill_time,
        ),
        (
            "request_decode_time_seconds",
            "Histogram of time spent in DECODE phase for request.",
            engine.decode_time,
        ),
    ):
        text.histogram(name, help_text, histogram)
    if engine.config.enable_lora:
        text.adapters(sorted({turn.ask.model for turn in engine.running} & set(engine.adapters)))
    text.cache_config(config.block_size, config.num_gpu_blocks, config.max_model_len)
    return "\n".join(text.lines) + "\n"


class _Text:
    def __init__(self, model: str, started_at: float) -> None:
        self.lines: list[str] = []
        self._engine = f'engine="0",model_name="{model}"'
        self._model = f'model_name="{model}"'
        self._started_at = started_at

    def gauge(self, name: str, help_text: str, value: float) -> None:
        self._head(name, help_text, "gauge")
        self.lines.append(f"vllm:{name}{{{self._engine}}} {float(value)}")

    def labelled(self, name: str, help_text: str, label: str, values: dict[str, float]) -> None:
        self._head(name, help_text, "gauge")
        for key, value in values.items():
            self.lines.append(f'vllm:{name}{{{self._engine},{label}="{key}"}} {float(value)}')

    def counter(self, name: str, help_text: str, value: int) -> None:
        self._head(f"{name}_total", help_text, "counter")
        self.lines.append(f"vllm:{name}_total{{{self._engine}}} {float(value)}")
        self._head(f"{name}_created", help_text, "gauge")
        self.lines.append(f"vllm:{name}_created{{{self._engine}}} {self._started_at!r}")

    def counters(
        self, name: str, help_text: str, label: str, values: dict[str, int], *, engine_label: bool = True
    ) -> None:
        for suffix, kind in (("total", "counter"), ("created", "gauge")):
            self._head(f"{name}_{suffix}", help_text, kind)
            for key, value in values.items():
                labels = self._labels(label, key, engine_label=engine_label)
                shown = float(value) if suffix == "total" else self._started_at
                self.lines.append(f"vllm:{name}_{suffix}{{{labels}}} {shown!r}")

    def histogram(self, name: str, help_text: str, histogram: Histogram) -> None:
        self._head(name, help_text, "histogram")
        seen = 0
        for bound, count in zip([*map(str, histogram.bounds), "+Inf"], histogram.counts, strict=True):
            seen += count
            labels = f'engine="0",le="{bound}",{self._model}'
            self.lines.append(f"vllm:{name}_bucket{{{labels}}} {float(seen)}")
        self.lines.append(f"vllm:{name}_count{{{self._engine}}} {float(seen)}")
        self.lines.append(f"vllm:{name}_sum{{{self._engine}}} {histogram.sum}")

    def adapters(self, running: list[str]) -> None:
        self._head("lora_requests_info", "Running stats on lora requests.", "gauge")
        names = ",".join(running)
        labels = f'max_lora="2",running_lora_adapters="{names}",waiting_lora_adapters=""'
        self.lines.append(f"vllm:lora_requests_info{{{labels}}} {time.time()!r}")

    def cache_config(self, block_size: int, blocks: int, max_model_len: int) -> None:
        tokens = block_size * blocks
        labels = (
            f'block_size="{block_size}",cache_dtype="auto",enable_prefix_caching="True",engine="0",'
            f'kv_cache_max_concurrency="{tokens / max_model_len:.2f}",kv_cache_size_tokens="{tokens}",'
            f'num_gpu_blocks="{blocks}"'
        )
        self._head("cache_config_info", "Information of the LLMEngine CacheConfig", "gauge")
        self.lines.append(f"vllm:cache_config_info{{{labels}}} 1.0")

    def _labels(self, label: str, key: str, *, engine_label: bool) -> str:
        if not engine_label:
            return f'{self._model},{label}="{key}"'
        pairs = sorted(['engine="0"', self._model, f'{label}="{key}"'])
        return ",".join(pairs)

    def _head(self, name: str, help_text: str, kind: str) -> None:
        self.lines += [f"# HELP vllm:{name} {help_text}", f"# TYPE vllm:{name} {kind}"]
