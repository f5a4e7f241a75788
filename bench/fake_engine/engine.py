"""The engine's state: slots, the queue, counters, the prefix cache, pause and drain.

One request's life is in `turns`; this module decides when it may start and counts what it did.
"""

import asyncio
import time

from bench.fake_engine.config import EngineConfig
from bench.fake_engine.knobs import Knobs
from bench.fake_engine.metrics import LATENCY_BUCKETS, TOKEN_GAP_BUCKETS, TTFT_BUCKETS, Histogram
from bench.fake_engine.prefills import Prefills
from bench.fake_engine.prompts import PrefixCache
from bench.fake_engine.record import Record
from bench.fake_engine.turns import Turn
from bench.fake_engine.wheel import TimerWheel
from bench.fake_engine.wire import BUSY, DRAINING, Stamp, refusal


class Engine:
    def __init__(self, config: EngineConfig, knobs: Knobs, loop: asyncio.AbstractEventLoop) -> None:
        self.config = config
        self.knobs = knobs
        self.loop = loop
        self.wheel = TimerWheel(loop)
        self.prefills = Prefills(self)
        self.stamp = Stamp()
        self.record = Record(config.record, config.record_bodies, config.record_file)
        self.fingerprint = config.fingerprint.encode()
        self.adapters: dict[str, str] = {}
        self.started_at = time.time()
        self.running: dict[Turn, None] = {}
        self.waiting: dict[Turn, None] = {}
        self._frozen: list[Turn] = []
        self._is_starting = False
        self.connections = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was counted and cached; requests in flight go on."""
        self.cache = PrefixCache(self.config.block_size, self.config.num_gpu_blocks)
        self.record.entries.clear()
        self.max_running = len(self.running)
        self.served = 0
        self.rejected = 0
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finish_reasons = dict.fromkeys(("stop", "length", "abort", "error", "repetition"), 0)
        self.ttft = Histogram(TTFT_BUCKETS)
        self.token_gap = Histogram(TOKEN_GAP_BUCKETS)
        self.queue_time = Histogram(LATENCY_BUCKETS)
        self.prefill_time = Histogram(LATENCY_BUCKETS)
        self.decode_time = Histogram(LATENCY_BUCKETS)
        self.e2e_time = Histogram(LATENCY_BUCKETS)

    @property
    def models(self) -> tuple[str, ...]:
        return (*self.config.models, *self.adapters)

    @property
    def in_flight(self) -> int:
        return len(self.running) + len(self.waiting)

    @property
    def is_frozen(self) -> bool:
        return self.knobs.paused or self.knobs.sleeping

    @property
    def is_full(self) -> bool:
        cap = self.knobs.max_num_queued_reqs
        return cap > 0 and self.in_flight >= cap

    @property
    def kv_usage(self) -> float:
        size = self.config.block_size
        used = sum(-(-turn.tokens_held // size) for turn in self.running)
        return min(1.0, used / self.config.num_gpu_blocks)

    def check_open(self) -> None:
        """Refuse new work while draining, and when the in-flight cap is reached."""
        if self.knobs.draining:
            raise refusal(500, DRAINING, "InternalServerError")
        if self.is_full:
            self.rejected += 1
            raise refusal(503, BUSY, "Service Unavailable")

    def enter(self, turn: Turn) -> None:
        if self.is_frozen or self.waiting or len(self.running) >= self.knobs.max_num_seqs:
            self.waiting[turn] = None
        else:
            self._start(turn)

    def leave(self, turn: Turn) -> None:
        """A request gives up its slot or its place in the queue, once."""
        if turn in self.running:
            del self.running[turn]
            self._start_waiting()
        else:
            self.waiting.pop(turn, None)

    def freeze(self, turn: Turn) -> None:
        """Keep a turn that came due while paused, to be stepped again by `thaw`."""
        self._frozen.append(turn)

    def thaw(self) -> None:
        """Go on after a pause or sleep; also after a change of limits."""
        if self.is_frozen:
            return
        frozen, self._frozen = self._frozen, []
        now = self.loop.time()
        for turn in frozen:
            turn.resume(now)
        self._start_waiting()

    def abort(self, request_ids: list[str] | None) -> int:
        """End requests early, cleanly: finish_reason abort, usage, [DONE]. None means all of them."""
        wanted = [
            turn
            for turn in [*self.running, *self.waiting]
            if request_ids is None or turn.ask.request_id in request_ids
        ]
        for turn in wanted:
            turn.abort(self.loop.time())
        return len(wanted)

    def _start_waiting(self) -> None:
        if self._is_starting:
            return  # a turn that ended at once came back here from the loop below
        self._is_starting = True
        while self.waiting and not self.is_frozen and len(self.running) < self.knobs.max_num_seqs:
            turn = next(iter(self.waiting))
            del self.waiting[turn]
            self._start(turn)
        self._is_starting = False

    def _start(self, turn: Turn) -> None:
        self.running[turn] = None
        self.max_running = max(self.max_running, len(self.running))
        turn.start(self.loop.time())
