"""Carries questions and corrections to Valkey, one round trip at a time and in order, and knows whether it is there.

One at a time keeps the absolute counts of slots in order, and lets what comes meanwhile share the next round trip. What
is asked, and what an answer means, is the limiter's (Desk).
"""

import asyncio
import logging
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from redis.asyncio import Redis

from billing.limits.rules import Plan
from billing.limits.shared import (
    PRESENCE_KEPT_S,
    PRESENCE_S,
    SETTLE,
    VALKEY_AWAY,
    Answer,
    Call,
    answer_of,
    key_of,
    presence_key,
    run_calls,
)
from billing.limits.standing import Standing
from config.clock import Clock
from config.defaults import Settings
from config.valkey import end_if_cancelled

log = logging.getLogger("poolgate.limits")

ASKS_IN_FLIGHT_MAX = 64
"""Questions of one round trip: at some 30 microseconds each, Valkey serves others after 2 ms."""

ASKS_WAITING_MAX = 10_000
"""Questions that wait for the next one: past it Valkey is too slow to be asked, and each is decided here."""

SETTLE_DELAY_S = 0.005
"""Corrections wait so long for others to go with them."""

CORRECTIONS_WAITING_MAX = 20_000
"""Corrections kept while Valkey is away; what is lost beyond it expires with its window."""

CORRECTIONS_IN_CALL_MAX, CORRECTIONS_IN_FLIGHT_MAX = 100, 1_000
"""Corrections of one call and of one round trip: bounds how long they keep Valkey from others, and who asks waiting."""

LAST_CHANCE_SHARE = 0.2
"""A question that waited behind a slow round trip has at least this share of the time-out for its own."""


PRESENT = b"1"
"""Any other value, or none, says that Valkey has lost what it knew of this process."""


@dataclass(slots=True)
class Part:
    """One subject of a question, under the limits that it has when it is asked."""

    standing: Standing
    plan: Plan
    block: tuple[int, int, int]  # requests, tokens and slots that are wanted beyond the request's own


@dataclass(slots=True, eq=False)
class Ask:
    """One request's question."""

    standings: tuple[Standing, ...]
    tokens: int
    answered: "asyncio.Future[Any]"
    asked_at: float
    was_deferred: bool = False
    parts: list[Part] = field(default_factory=list)


class Desk(Protocol):
    """Who asks (the limiter)."""

    def answer_from_memory(self, ask: Ask) -> bool:
        """Whether it was answered by what became known since it was asked."""
        ...

    def pack(self, ask: Ask, flight: int, now: float) -> Call:
        """The question as a call; may hand in corrections that shall go before it."""
        ...

    def land(self, ask: Ask, answer: Answer | None, sent_at: float) -> None:
        """Give the asker its answer; None: decide without Valkey."""
        ...

    def recount(self) -> None:
        """Valkey is back, or has lost what it knew: report all slots."""
        ...


class Flights:
    """The one way to Valkey of a process's limits."""

    def __init__(
        self, valkey: Redis, incarnation_id: str, settings: Settings, clock: Clock, desk: Desk
    ) -> None:
        self.is_away = False
        self._valkey = valkey
        self._incarnation = incarnation_id
        self._timeout_s = settings.valkey_timeout_s
        self._retry_s = settings.valkey_retry_s
        self._late_us = round(settings.limit_block_s * 1e6)
        self._clock = clock
        self._desk = desk
        self._number = 0
        self._asks: deque[Ask] = deque()
        self._corrections: dict[
            tuple[str, int, int], int
        ] = {}  # key, its window's length, time taken: amount
        self._reports: dict[str, Standing] = {}
        self._task: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._stir = asyncio.Event()

    def __repr__(self) -> str:
        return (
            f"<Flights {self._number} asks={len(self._asks)} corrections={len(self._corrections)} "
            f"away={self.is_away}>"
        )

    def ask(self, ask: Ask) -> None:
        """Its future gets the answer within about one time-out."""
        if len(self._asks) >= ASKS_WAITING_MAX:
            self._desk.land(ask, None, ask.asked_at)
            return
        self._asks.append(ask)
        self._launch()

    def correct(self, subject: str, plan: Plan, time_us: int, requests: int, tokens: int) -> None:
        """So much more was taken than Valkey was told (below 0: less, of what was taken at `time_us`)."""
        for window in plan.windows:
            amount = requests if window.unit == "requests" else tokens
            if amount and not window.is_exact:
                entry = key_of(subject, window.name), window.length_us, time_us if amount < 0 else 0
                if entry in self._corrections or len(self._corrections) < CORRECTIONS_WAITING_MAX:
                    self._corrections[entry] = self._corrections.get(entry, 0) + amount
        self._launch_soon()

    def report(self, standing: Standing) -> None:
        """Its number of slots has changed."""
        self._reports[standing.name] = standing
        self._launch_soon()

    async def run(self) -> None:
        """Say that this process lives, and look for Valkey while it is away, until cancelled."""
        while True:
            await self._say_alive()
            self._stir.clear()
            try:
                async with asyncio.timeout(self._retry_s if self.is_away else PRESENCE_S):
                    await self._stir.wait()
                    # It has just failed: asking again at once would tell the same.
                    await asyncio.sleep(self._retry_s)
            except TimeoutError:
                pass

    async def close(self) -> None:
        """Hand in what is known, and leave: slots that are still ours go with our presence."""
        while self._task is not None and not self._task.done():
            await asyncio.wait([self._task])
        if self._timer is not None:
            self._timer.cancel()
        if not self.is_away:
            await self._fly_all()
            try:
                async with asyncio.timeout(self._timeout_s):
                    await self._valkey.delete(presence_key(self._incarnation))
            except VALKEY_AWAY:
                log.debug("slots are freed when our presence expires", extra={"action": "limits_left"})

    def _launch(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._fly_all(), name="limits-flights")

    def _launch_soon(self) -> None:
        if self._timer is None and not self.is_away:
            self._timer = asyncio.get_running_loop().call_later(SETTLE_DELAY_S, self._launch_settling)

    def _launch_settling(self) -> None:
        self._timer = None
        self._launch()

    async def _fly_all(self) -> None:
        while (self._asks or self._corrections or self._reports) and not self.is_away:
            carried: list[Ask] = []
            try:
                await self._fly(carried)
            except VALKEY_AWAY as error:
                self._lost(error)
            except Exception:  # limits fail open: a fault here must not be a client's
                log.exception("a fault in the limits", extra={"action": "limits_fault"})
            for ask in carried:
                if not ask.answered.done():
                    self._desk.land(ask, None, ask.asked_at)
        while self._asks:
            self._desk.land(self._asks.popleft(), None, self._clock.monotonic())

    async def _fly(self, carried: list[Ask]) -> None:
        """One round trip; `carried` are those who wait for its answer."""
        self._number += 1
        now = self._clock.monotonic()
        asked = self._pack(carried, now)
        told: list[Standing] = []
        settling = self._settling(now, told)
        if not asked and not settling:
            return
        oldest = min((ask.asked_at for ask in carried), default=now)
        timeout_s = max(oldest + self._timeout_s - now, self._timeout_s * LAST_CHANCE_SHARE)
        try:
            replies = await run_calls(self._valkey, settling + asked, timeout_s)
        except VALKEY_AWAY:
            # What is wrong there about our slots would stay so; amounts pass with their windows.
            for standing in (*told, *(each for ask in carried for each in ask.standings)):
                self._reports[standing.name] = standing
            raise
        for ask, reply in zip(carried, replies[len(settling) :], strict=True):
            self._desk.land(ask, answer_of(reply), now)

    def _pack(self, carried: list[Ask], now: float) -> list[Call]:
        calls = []
        deferred = []
        while self._asks and len(carried) < ASKS_IN_FLIGHT_MAX:
            ask = self._asks.popleft()
            if ask.answered.done() or self._desk.answer_from_memory(ask):
                continue
            if not ask.was_deferred and any(each.asking == self._number for each in ask.standings):
                # A block for its subject is being asked for in this very flight, and will likely serve it too.
                ask.was_deferred = True
                deferred.append(ask)
                continue
            carried.append(ask)
            calls.append(self._desk.pack(ask, self._number, now))
        self._asks.extendleft(reversed(deferred))
        return calls

    def _settling(self, now: float, told: list[Standing]) -> list[Call]:
        records: list[tuple[str, tuple[str | int, ...]]] = []
        while self._corrections and len(records) < CORRECTIONS_IN_FLIGHT_MAX:
            (key, length_us, time_us), amount = self._corrections.popitem()
            if amount:
                records.append((key, ("t", amount, time_us, length_us, self._late_us)))
        while self._reports and len(records) < CORRECTIONS_IN_FLIGHT_MAX:
            _, standing = self._reports.popitem()
            told.append(standing)
            count = 0 if standing.plan.concurrency is None else standing.held(now)
            records.append((key_of(standing.name, "concurrency"), ("c", count, 0, 0, 0)))
        calls = []
        for at in range(0, len(records), CORRECTIONS_IN_CALL_MAX):
            some = records[at : at + CORRECTIONS_IN_CALL_MAX]
            args: list[str | int] = [self._incarnation, self._number]
            for _, record in some:
                args += record
            calls.append(Call(SETTLE, [key for key, _ in some], args))
        return calls

    async def _say_alive(self) -> None:
        try:
            async with asyncio.timeout(self._timeout_s):
                before = await self._valkey.set(
                    presence_key(self._incarnation), PRESENT, ex=PRESENCE_KEPT_S, get=True
                )
        except VALKEY_AWAY as error:
            end_if_cancelled()
            self._lost(error)
            return
        end_if_cancelled()
        if self.is_away:
            self.is_away = False
            log.info("limits are kept in Valkey again", extra={"action": "limits_shared"})
            self._desk.recount()
            self._launch_soon()
        elif before != PRESENT:
            self._desk.recount()

    def _lost(self, error: BaseException) -> None:
        if self.is_away:
            return
        self.is_away = True
        self._stir.set()
        log.warning(
            "Valkey is away, so this process keeps limits at its share: %s",
            error or type(error).__name__,
            extra={"action": "limits_local"},
        )
