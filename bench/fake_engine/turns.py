"""One request in flight: when its tokens come due and when they are written.

Producing follows the clock; writing follows producing but stops while the client does not read, as a real
engine's does. How a turn fails on purpose is in `breakage`; the JSON is the surface's.
"""

import math
import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

from bench.fake_engine import breakage
from bench.fake_engine.knobs import Fault
from bench.fake_engine.record import Entry
from bench.fake_engine.surface import Ask, Surface, Timing
from bench.fake_engine.wire import CORE_DEAD, END, chunk, error_event, refusal

if TYPE_CHECKING:
    from bench.fake_engine.engine import Engine

SLICE_TOKENS = 256  # between two looks at whether the client still reads


class Client(Protocol):
    """The connection as a turn sees it."""

    is_paused: bool
    last_headers: bytes

    @property
    def is_full(self) -> bool: ...
    def write(self, data: bytes) -> None: ...
    def done(self) -> None: ...
    def drop(self) -> None: ...
    def reset(self) -> None: ...


class Turn:
    def __init__(
        self,
        engine: "Engine",
        client: Client,
        ask: Ask,
        surface: Surface,
        fault: Fault | None,
        entry: Entry | None,
    ) -> None:
        self.engine = engine
        self.client = client
        self.ask = ask
        self.surface = surface
        self.fault = fault
        self.entry = entry
        self.total = max(len(answer.pieces) for answer in ask.answers)
        self.produced = 0
        self.written = 0
        self.is_over = False
        self.timing = Timing(arrived=engine.loop.time())
        self._is_open = False
        self._is_broken = False
        self._due = 0.0
        self._allowed = engine.knobs.lockstep
        self._steps = self._stepwise()
        self._limit = breakage.limit(fault, self.total) if ask.stream else self.total

    @property
    def is_in_lockstep(self) -> bool:
        """It writes an event only when it was told to."""
        return self._allowed is not None

    @property
    def tokens_held(self) -> int:
        return self.ask.prompt_tokens + self.produced * len(self.ask.answers)

    def accept(self) -> None:
        """Take the request: send stream headers at once, then wait for a slot."""
        fault = self.fault
        if fault is not None and breakage.at_arrival(self, fault):
            return
        if self.ask.stream:
            self.client.write(self.engine.stamp.stream_head(self.client.last_headers))
        self.engine.enter(self)
        interval_ms = self.engine.knobs.sse_keep_alive_ms
        if interval_ms and self.ask.stream and not self._is_open:
            self.engine.wheel.at(self.timing.arrived + interval_ms / 1000, self._comment)

    def start(self, now: float) -> None:
        self.timing.started = now
        if self.engine.knobs.ttft_per_1k_ms:
            self._due = math.inf
            self.engine.prefills.add(self, self.ask.prompt_tokens - self.ask.cached_tokens)
        else:
            self.computed(now)

    def computed(self, now: float) -> None:
        """Its prompt is: the answer begins."""
        if self.is_over:
            return
        knobs = self.engine.knobs
        wait_ms = knobs.ttft_ms
        if knobs.phase_ms:
            wait_ms += knobs.phase_ms * random.random()
        self._due = now + wait_ms / 1000
        if wait_ms:
            self.engine.wheel.at(self._due, self.step)
        else:
            self.step(now)

    def step(self, now: float) -> None:
        """Produce what came due, write it, and come back for the next token."""
        if self.is_over:
            return
        if self.engine.is_frozen:
            self.engine.freeze(self)
            return
        if now + 1e-9 < self.engine.prefills.ends_at:
            self._due = self.engine.prefills.ends_at
            self.engine.wheel.at(self._due, self.step)
            return
        self._produce(now)
        if self.ask.stream:
            self.flush()
        elif self.produced >= self.total:
            self._answer_whole(now)
        if not self.is_over and self.produced < self.total:
            self.engine.wheel.at(self._due, self.step)

    def resume(self, now: float) -> None:
        self._due = max(self._due, now)
        self.step(now)

    def flush(self) -> None:
        """Write the tokens that were produced, as long as the client reads."""
        if self.is_over or self._is_broken or not self.ask.stream or not self.produced:
            return
        if self._allowed is not None:
            self.go_on(0)
            return
        events: list[bytes] = []
        if not self._is_open:
            self._is_open = True
            events.extend(self.surface.opening())
        while not self.client.is_paused:
            self._collect(events)
            self._send(events)
            events = []
            if self.fault is not None and self.written >= self._limit and breakage.is_due(self.fault):
                self._is_broken = True
                breakage.midway(self, self.fault)
                return
            if self.written >= self.total:
                self._end_stream("finished")
                return
            if self.written >= self.produced or self._group_end() > self.produced:
                return
            # uvloop says `is_paused` at the end of a tick only, in which all of it could be written.
            if self.client.is_full:
                self.engine.loop.call_soon(self.flush)
                return

    def go_on(self, events: int) -> None:
        """In lockstep: write so many more events."""
        self._allowed = (self._allowed or 0) + events
        while self._allowed and self.produced and not self.is_over and not self._is_broken:
            self._allowed -= 1
            next(self._steps)

    def client_left(self) -> None:
        """The connection is gone: stop, as vLLM aborts a request whose client closed."""
        if not self.is_over:
            if self.engine.knobs.pace_ms and self.timing.started:
                self._produce(self.engine.loop.time())
            self.close(self.fault.kind if self._is_broken and self.fault is not None else "client_closed")
            if self.entry is not None:
                self.entry.aborted = True

    def abort(self, now: float) -> None:
        """End early by order of the engine's API."""
        self.timing.finished = now
        self.timing.first_token = self.timing.first_token or now
        for index, answer in enumerate(self.ask.answers):
            if self.ask.stream and self.written < len(answer.pieces):
                self._send(self.surface.aborted(index, self.written))
        self.engine.finish_reasons["abort"] += 1
        if self.ask.stream:
            self._end_stream("aborted")
        else:
            self._answer_whole(now, "aborted")
        if self.entry is not None:
            self.entry.aborted = True

    def fail(self, message: str = CORE_DEAD) -> None:
        """What a request in flight gets when the engine core dies: an error event and [DONE], or a 500."""
        if self.ask.stream:
            self.client.write(chunk(error_event(500, message)) + chunk(b"data: [DONE]\n\n") + END)
        else:
            body = refusal(500, message, "InternalServerError").body
            self.client.write(self.engine.stamp.whole(500, body, last=self.client.last_headers))
        self.close("error")
        self.client.done()

    def close(self, how: str) -> None:
        """Leave the engine and write the record, once."""
        if self.is_over:
            return
        self.is_over = True
        self.engine.leave(self)
        self._note(how)

    def _note(self, how: str) -> None:
        """Write the record, once; of an answer's end before it goes out, so that no killed engine denies what it sent."""
        if self.entry is not None and self.entry.how is None:
            self.entry.how = how
            self.entry.finished = how == "finished"
            self.entry.completion_tokens = self._count(self.produced)
            self.entry.tokens_written = self._count(self.written)
            self.engine.record.note(self.entry)

    def mark_broken(self) -> None:
        self._is_broken = True

    def _produce(self, now: float) -> None:
        knobs = self.engine.knobs
        if not self.produced:
            if now + 1e-9 < self._due:
                return
            self.timing.first_token = now
            self.engine.ttft.observe(now - self.timing.arrived)
        before = self._count(self.produced)
        pace_ms = knobs.pace_ms + knobs.pace_per_running_ms * len(self.engine.running)
        if not pace_ms:
            self.produced = self.total
        while self.produced < self.total and self._due <= now + 1e-9:
            self.produced += 1
            gap_ms = pace_ms * (1 + knobs.jitter * random.uniform(-1, 1)) if knobs.jitter else pace_ms
            self._due += gap_ms / 1000
        self.engine.generation_tokens += self._count(self.produced) - before

    def _stepwise(self) -> Iterator[None]:
        """What `flush` writes, an event for each step. The fault that cuts the stream, or its end, is the last one."""
        self._is_open = True
        for event in self.surface.opening():
            self._send([event])
            yield
        while self.written < self._limit:
            events: list[bytes] = []
            start, self.written = self.written, self._group_end()
            for index, answer in enumerate(self.ask.answers):
                self._tokens(events, index, start, self.written, len(answer.pieces))
            for event in events:
                self._send([event])
                yield
        if self.fault is not None and breakage.is_due(self.fault):
            self._is_broken = True
            breakage.midway(self, self.fault)
        else:
            self._end_stream("finished")
        yield

    def _collect(self, events: list[bytes]) -> None:
        answers = self.ask.answers
        end = min(self.written + SLICE_TOKENS, self.produced, self._limit)
        while self.written < end:
            stop = self._group_end()
            if stop > end:
                return
            for index, answer in enumerate(answers):
                self._tokens(events, index, self.written, stop, len(answer.pieces))
            self.written = stop

    def _group_end(self) -> int:
        """Where the chunk that starts at the next unwritten token ends."""
        return min(self.written + max(1, self.engine.knobs.merge), self._limit)

    def _tokens(self, events: list[bytes], index: int, start: int, stop: int, size: int) -> None:
        if start < size <= stop:
            events.extend(self.surface.last(index, start, size))
        elif start < size:
            event = self.surface.piece(index, start, stop)
            if event:
                events.append(event)

    def _send(self, events: list[bytes]) -> None:
        if not events:
            return
        if self.entry is not None and self.engine.knobs.record_events:
            self.entry.events += [event.decode() for event in events]
        if self.fault is not None and self.fault.kind == "drip":
            self.client.write(b"".join([b"1\r\n%c\r\n" % byte for event in events for byte in event]))
        else:
            self.client.write(b"".join([chunk(event) for event in events]))

    def _end_stream(self, how: str) -> None:
        self._finish_counts(self.engine.loop.time(), how)
        self._note(how)
        self._send(self.surface.closing(self._count(self.written), self.timing))
        self.client.write(END)
        self.close(how)
        self.client.done()

    def _answer_whole(self, now: float, how: str = "finished") -> None:
        self._finish_counts(now, how)
        self.written = self.produced
        body = self.surface.whole(self.timing)
        if self.fault is not None and self.fault.kind == "no_finish":
            body = breakage.without_finish(body)
        if self.fault is not None and not breakage.is_harmless(self.fault):
            how = self.fault.kind
        self._note(how)
        self.client.write(self.engine.stamp.whole(200, body, last=self.client.last_headers))
        self.close(how)
        self.client.done()

    def _finish_counts(self, now: float, how: str) -> None:
        engine, timing = self.engine, self.timing
        timing.finished = now
        if how != "finished":
            return
        engine.served += 1
        for answer in self.ask.answers:
            engine.finish_reasons["length" if answer.finish == "length" else "stop"] += 1
        engine.e2e_time.observe(now - timing.arrived)
        engine.queue_time.observe(timing.started - timing.arrived)
        engine.prefill_time.observe(timing.first_token - timing.started)
        engine.decode_time.observe(now - timing.first_token)
        if self.total > 1:
            engine.token_gap.observe((now - timing.first_token) / (self.total - 1), self.total - 1)

    def _count(self, steps: int) -> int:
        return sum(min(steps, len(answer.pieces)) for answer in self.ask.answers)

    def _comment(self, now: float) -> None:
        if not self.is_over and not self._is_open and not self._is_broken:
            self.client.write(chunk(b": keep-alive\n\n"))
            self.engine.wheel.at(now + self.engine.knobs.sse_keep_alive_ms / 1000, self._comment)
