"""Prompts are computed one after the other, in steps, as vLLM's scheduler does it.

A step takes `max_num_batched_tokens` of what waits, in the order of arrival. Who comes during a step waits for its end, and
so do running streams for their next token.

Measured of vLLM 0.32 on a CPU, smollm2-135m, with prompts of 1,085 tokens that arrive at once and answers of 16: the first
token of one comes after 3.7 s; those of two after 3.6 and 7.2 s, and both answers end together 0.8 s later; those of four
after 3.7, 10.2, 14.1 and 14.1 s, which is one prompt, then 2,048 tokens, then the rest, and all end within 0.1 s.
"""

from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine
    from bench.fake_engine.turns import Turn


class Prefills:
    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._waiting: deque[tuple[Turn, int]] = deque()
        self._computed: list[Turn] = []
        self._is_busy = False
        self.ends_at = 0.0
        """The end of the step that runs, or of the last one."""

    def add(self, turn: "Turn", tokens: int) -> None:
        """Call the turn's `computed` once so many tokens of its prompt are."""
        self._waiting.append((turn, tokens))
        if not self._is_busy:
            self._is_busy = True
            self._begin()

    def _begin(self) -> None:
        engine = self._engine
        most = room = max(1, engine.knobs.max_num_batched_tokens)
        while self._waiting and room:
            turn, tokens = self._waiting.popleft()
            if turn.is_over:  # its client left
                continue
            if tokens > room:
                self._waiting.appendleft((turn, tokens - room))
                room = 0
            else:
                self._computed.append(turn)
                room -= tokens
        self.ends_at = engine.loop.time() + engine.knobs.ttft_per_1k_ms * (most - room) / 1e6
        engine.wheel.at(self.ends_at, self._end)

    def _end(self, now: float) -> None:
        computed, self._computed = self._computed, []
        for turn in computed:
            turn.computed(now)
        if self._waiting:
            # Streams that waited for the end of this step have their token before the next one begins.
            self._engine.loop.call_soon(self._begin)
        else:
            self._is_busy = False
