"""The queue of turns that found every engine full: who waits, what they are told meanwhile, and who gets an engine next.

Where nobody waits it costs a look at `is_busy`. Engines that may take a turn again are given to the next one in fair order
(`rounds`) before anybody else can have them.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Iterator

from config.defaults import Settings
from config.metrics import Metrics
from gateway.errors import NoNodeAvailable
from gateway.relay.downstream import EVENT_STREAM, Downstream
from gateway.turn import Turn
from gateway.waiting.rounds import Rounds
from nodes.registry import Registry
from nodes.routing.router import Need, NoEngine
from nodes.routing.snapshot import Engine

log = logging.getLogger("poolgate.queue")

RATE_WINDOW_S = 10.0
"""Turns that left within this time tell how fast the queue moves."""

RETRY_AFTER_MAX_S = 300

TIMER_S = 0.001
"""The loop's timers know whole milliseconds, and may ring up to half a one early."""

FULL = "Every node that serves this model is busy, and so many requests wait that yours can't. Try again shortly."
PUSHED_OUT = "Every node that serves this model is busy, and requests of accounts with fewer waiting came before yours."
NONE_LEFT = "No node serves this model any more. Try again shortly."
LATE = "Every node that serves this model was busy for as long as a request may wait. Try again shortly."

Route = Callable[[Need], Engine]
Line = tuple[str, str, int | None]
"""The engines that turns wait for: model, kind, provider."""


class Waiter:
    """One turn that waits; the `handed` engine is taken for it. `was_next`: it had one before, without room after all."""

    __slots__ = ("account", "handed", "line", "need", "refusal", "since_s", "tokens", "wakes", "was_next")

    def __init__(self, account: int, need: Need, now_s: float, *, was_next: bool) -> None:
        self.account = account
        self.tokens = need.tokens
        self.need = need
        self.line: Line = (need.model, need.kind, need.account_id)
        self.since_s = now_s
        self.was_next = was_next
        self.handed: Engine | None = None
        self.refusal = ""
        self.wakes = asyncio.get_running_loop().create_future()

    def hand(self, engine: Engine) -> None:
        """It has an engine."""
        self.handed = engine
        if not self.wakes.done():
            self.wakes.set_result(None)

    def push_out(self, why: str) -> None:
        """It waits in vain."""
        if not self.wakes.done():
            self.refusal = why
            self.wakes.set_result(None)


class TurnQueue:
    """The turns of one worker that wait; `others` is what the other workers' queues have (`gateway.waiting.sharing`)."""

    def __init__(self, settings: Settings, *, registry: Registry, route: Route, metrics: Metrics) -> None:
        self._settings = settings
        self._registry = registry
        self._route = route
        self._metrics = metrics
        self._lines: dict[Line, tuple[Rounds[Waiter], Rounds[Waiter]]] = {}
        self._time = asyncio.get_running_loop().time
        self._left_s: deque[float] = deque(maxlen=1000)
        self._is_pump_due = False
        self.waiting = 0
        self.others = 0
        self.other_workers = 0
        """Those in which turns wait."""
        self.served: dict[int, int] = {}
        """Tokens that accounts got engines for, since it was last taken."""

    @property
    def is_busy(self) -> bool:
        """Somebody waits."""
        return self.waiting > 0

    def comes_after(self, need: Need) -> bool:
        """Whether turns wait for the engines that this one needs: then it comes after them."""
        return (need.model, need.kind, need.account_id) in self._lines

    async def place(self, turn: Turn, need: Need, down: Downstream) -> Engine:
        """Wait for an engine. Raises NoNodeAvailable where the turn can't wait, or not so long.

        The caller takes the engine (`began`) before anything else can happen. What waits may leave at any moment.
        """
        waiter = Waiter(turn.principal.account_id, need, self._time(), was_next=turn.was_next)
        ends_s = self._time() + self._left_to_wait_s(turn)
        self._make_room(waiter)
        rounds = self._rounds_of(waiter.line)[is_late(turn)]
        if waiter.was_next:
            rounds.put_first(waiter)
        else:
            rounds.add(waiter)
        self.waiting += 1
        self.pump_soon()
        result = "left"
        try:
            await self._wait(waiter, rounds, turn, down, ends_s)
            result = "served" if waiter.handed else "refused" if waiter.refusal else "expired"
        finally:
            self._end(waiter, rounds, result)
        if waiter.handed is None:
            raise NoNodeAvailable(waiter.refusal or LATE, retry_after_s=self.retry_after_s())
        turn.was_next = True  # if the engine has no room after all, it comes before the others again
        waiter.handed.ended(need.tokens)
        return waiter.handed

    async def _wait(
        self, waiter: Waiter, rounds: Rounds[Waiter], turn: Turn, down: Downstream, ends_s: float
    ) -> None:
        """Until it has an engine, is pushed out or is late."""
        says = turn.ask.tap is not None and not turn.ask.gathers
        pause_s = self._settings.keepalive_comment_s
        comment_at_s = self._time() + pause_s
        while True:
            until_s = min(ends_s, comment_at_s) if says else ends_s
            done, _ = await asyncio.wait((waiter.wakes,), timeout=max(TIMER_S, until_s - self._time()))
            now_s = self._time()
            if done or now_s >= ends_s:
                return
            if says and now_s >= comment_at_s:  # else the timer rang early
                comment_at_s = now_s + pause_s
                self._say(turn, down, self._position(waiter, rounds))

    def _end(self, waiter: Waiter, rounds: Rounds[Waiter], result: str) -> None:
        """It waits no more, whatever the reason; an engine that was handed to one who left goes to the next."""
        self.waiting -= 1
        rounds.remove(waiter)
        if waiter.line in self._lines and not any(self._lines[waiter.line]):
            del self._lines[waiter.line]
        if waiter.handed is not None and result != "served":
            waiter.handed.ended(waiter.need.tokens)
            self.pump_soon()
        now_s = self._time()
        self._left_s.append(now_s)
        self._metrics.queue_turns.labels(result).inc()
        self._metrics.queue_wait.observe(now_s - waiter.since_s)

    def _left_to_wait_s(self, turn: Turn) -> float:
        """Its deadline counts from its admission, however often it waits."""
        settings, limit_s = self._settings, turn.ask.time_limit_s
        wait_s = settings.queue_wait_s if limit_s is None else min(settings.queue_wait_s, limit_s)
        return max(0.0, wait_s - turn.duration_ms / 1000)

    # --- room --------------------------------------------------------------------------------------------------------

    def _make_room(self, waiter: Waiter) -> None:
        """Past the bound whoever has most turns waiting gives one up to a newcomer with fewer. Raises NoNodeAvailable."""
        if self.waiting + self.others < self._settings.queue_turns_max:
            return
        greediest = max(self._all_rounds(), key=lambda rounds: rounds.most, default=None)
        last = greediest.newest_of_the_greediest() if greediest is not None else None
        own = sum(rounds.waiting_of(waiter.account) for rounds in self._all_rounds())
        if greediest is None or last is None or own + 1 >= greediest.most:
            raise self._refusal()
        greediest.remove(last)
        last.push_out(PUSHED_OUT)

    def _refusal(self) -> NoNodeAvailable:
        self._metrics.queue_turns.labels("refused").inc()
        return NoNodeAvailable(FULL, retry_after_s=self.retry_after_s())

    def retry_after_s(self) -> int:
        """When there may be room: what waits, at the pace at which turns left the queue of late."""
        now_s = self._time()
        left = sum(1 for moment_s in self._left_s if now_s - moment_s <= RATE_WINDOW_S)
        if not left:
            return min(RETRY_AFTER_MAX_S, max(1, round(self._settings.queue_wait_s)))
        return min(RETRY_AFTER_MAX_S, max(1, round(self.waiting * RATE_WINDOW_S / left)))

    # --- who is next -------------------------------------------------------------------------------------------------

    def pump_soon(self) -> None:
        """An engine may be fit again: after what is going on now, see who gets it."""
        if self.waiting and not self._is_pump_due:
            self._is_pump_due = True
            asyncio.get_running_loop().call_soon(self._pump)

    def _pump(self) -> None:
        self._is_pump_due = False
        for line in list(self._lines.values()):
            for rounds in line:
                if not self._serve(rounds):
                    break  # those with less priority have to wait, too

    def _serve(self, rounds: Rounds[Waiter]) -> bool:
        """Hand out engines while there are any; False if somebody got none."""
        while (waiter := rounds.first()) is not None:
            try:
                engine = self._route(waiter.need)
            except NoEngine as error:
                if error.is_known:
                    return False
                rounds.remove(waiter)
                waiter.push_out(NONE_LEFT)
                continue
            rounds.take(waiter)
            engine.began(waiter.need.tokens)
            if not waiter.was_next:  # else the account was charged with it everywhere the first time
                self.served[waiter.account] = self.served.get(waiter.account, 0) + waiter.tokens
            waiter.hand(engine)
        return True

    def others_served(self, account: int, tokens: int) -> None:
        """Another worker gave the account so much."""
        for rounds in self._all_rounds():
            rounds.charge(account, tokens)

    def lines(self) -> list[tuple[Line, int]]:
        """How many turns wait here for the same engines."""
        return [(line, sum(map(len, rounds))) for line, rounds in self._lines.items()]

    def take_served(self) -> dict[int, int]:
        """What accounts got here since this was last asked."""
        served, self.served = self.served, {}
        return served

    async def run(self) -> None:
        """Try full engines again now and then, until cancelled."""
        while True:
            await asyncio.sleep(self._settings.queue_retry_s)
            if self._registry.capped:
                self._registry.relax_caps(1 + self.other_workers if self.is_busy else 0)
            self.pump_soon()
            self._metrics.queue_waiting.set(self.waiting)

    def _rounds_of(self, line: Line) -> tuple[Rounds[Waiter], Rounds[Waiter]]:
        found = self._lines.get(line)
        if found is None:
            quantum = self._settings.queue_quantum_tokens
            found = self._lines[line] = (Rounds(quantum), Rounds(quantum))
        return found

    def _all_rounds(self) -> Iterator[Rounds[Waiter]]:
        for line in self._lines.values():
            yield from line

    # --- what those who wait are told ----------------------------------------------------------------------------------

    def _position(self, waiter: Waiter, rounds: Rounds[Waiter]) -> int:
        """Its place over all workers, as far as this one knows: those that others have are spread evenly among ours."""
        if waiter.handed is not None:
            return 1
        here = rounds.position(waiter)
        return round(here * (self.waiting + self.others) / self.waiting)

    def _say(self, turn: Turn, down: Downstream, position: int) -> None:
        if down.is_gone:
            return
        if not down.is_started:
            down.start({**EVENT_STREAM, "x-request-id": turn.request_id}, turn.told)
        down.write(b": queued, position %d\n\n" % position)


def is_late(turn: Turn) -> bool:
    """Whether a turn goes after those of full price: a batch's, which nobody sits and waits for."""
    return turn.ask.price_percent < 100
