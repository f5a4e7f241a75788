"""Admits requests under the limits of their subjects: from blocks in memory where it can, else by asking Valkey.

What limits are is `rules`'; how Valkey counts is `shared`'s and its scripts'; carrying questions there is `flights`'.
"""

import asyncio
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence

from redis.asyncio import Redis

from billing.limits.flights import Ask, Flights, Part
from billing.limits.headers import Told, View, headers_of
from billing.limits.local import Share
from billing.limits.rules import (
    DAY_S,
    MINUTE_S,
    LimitExceeded,
    Limits,
    Plan,
    Subject,
    plan_of,
    refusal_message,
    rounded_up,
)
from billing.limits.shared import ADMIT, Answer, Call, Found, add_records
from billing.limits.standing import Refusal, Standing
from config.clock import Clock
from config.defaults import Settings
from config.metrics import Metrics

SLOT_RETRY_S = 0.02
"""A subject without a free slot is refused for so long before Valkey is asked again: others free slots unseen."""

COUNT_S = 1.0
"""Counts reach the metrics this often: on the request path they are additions in memory."""

FORGET_TRIES_MAX = 32
"""Subjects looked at to find an idle one: past it they are busy, and bounded by what is in flight."""


class Admission:
    """A request that was admitted; `headers` are shared between answers and must not be changed."""

    __slots__ = ("_limiter", "_parts", "_tokens", "headers")

    def __init__(
        self,
        limiter: "Limiter | None",
        parts: Sequence[tuple[Standing, int]],
        tokens: int,
        headers: Told,
    ) -> None:
        self.headers = headers
        self._limiter = limiter
        self._parts = parts  # each with Valkey's time at which its amounts were taken; 0: only here
        self._tokens = tokens

    def end(self, tokens_used: int) -> None:
        """The request is over: frees its slots and corrects its tokens. Once; again is no change."""
        limiter, self._limiter = self._limiter, None
        if limiter is not None:
            limiter.end(self._parts, tokens_used - self._tokens)


UNLIMITED = Admission(None, (), 0, Told())
"""For requests without a subject: nothing is counted."""


class Limiter:
    """One process's limits. `run` keeps its presence; without it, its slots would be free to others."""

    def __init__(
        self,
        valkey: Redis,
        incarnation_id: str,
        settings: Settings,
        clock: Clock,
        metrics: Metrics,
        live_count: Callable[[], int],
        *,
        minute_s: float = MINUTE_S,
        day_s: float = DAY_S,
    ) -> None:
        """`live_count` tells how many processes share the limits; other lengths of a minute and a day are for tests."""
        self._incarnation = incarnation_id
        self._settings = settings
        self._block_s = settings.limit_block_s
        self._late_us = round(settings.limit_block_s * 1e6)
        self._now_s = clock.monotonic
        self._metrics = metrics
        self._live_count = live_count
        self._lengths = minute_s, day_s
        self._known: OrderedDict[str, Standing] = OrderedDict()  # those looked at last are at the end
        self._blocks: deque[tuple[float, Standing]] = deque()  # by their end, since all live equally long
        self._timer: asyncio.TimerHandle | None = None
        self._limited: Counter[str] = Counter()
        self._decided_alone = 0
        self._flights = Flights(valkey, incarnation_id, settings, clock, self)

    def __repr__(self) -> str:
        return f"<Limiter subjects={len(self._known)} blocks={len(self._blocks)} {self._flights}>"

    # --- the request path -------------------------------------------------------------------------------------

    def try_admit(self, subjects: tuple[Subject, ...], tokens: int) -> Admission | None:
        """From memory, or None: then `admit` knows."""
        if not subjects:
            return UNLIMITED
        now = self._now_s()
        known = self._known
        found = []
        for subject in subjects:
            standing = known.get(subject.name)
            if (
                standing is None
                or standing.until <= now
                or standing.requests < 1
                or standing.tokens < tokens
                or standing.in_use >= standing.slots
                # Keys of one account bring equal limits, each its own object.
                or (standing.limits is not subject.limits and standing.limits != subject.limits)
            ):
                return None
            found.append(standing)
        return self._take(found, tokens)

    async def admit(self, subjects: tuple[Subject, ...], tokens: int) -> Admission:
        """Raises LimitExceeded. Waits for Valkey where it must, and never longer than its time-out."""
        if not subjects:
            return UNLIMITED
        now = self._now_s()
        standings = tuple([self._standing(subject, now) for subject in subjects])
        self._refuse_again(standings, tokens, now)
        if self._flights.is_away:
            return self._decide_alone(standings, tokens, now)
        ask = Ask(standings, tokens, asyncio.get_running_loop().create_future(), now)
        self._flights.ask(ask)
        try:
            admission: Admission = await ask.answered
        except asyncio.CancelledError:
            if ask.answered.done() and not ask.answered.cancelled() and ask.answered.exception() is None:
                ask.answered.result().end(0)
            raise
        return admission

    def end(self, parts: Sequence[tuple[Standing, int]], tokens: int) -> None:
        """A request of these subjects is over; it took `tokens` more than was counted (below 0: less). For Admission."""
        for standing, granted_us in parts:
            standing.in_use -= 1
            refusal = standing.refusal
            if standing.plan.concurrency is not None:
                if not standing.until:  # a live block keeps its slots
                    self._flights.report(standing)
                if refusal is not None and refusal.limit == "concurrency":
                    standing.refusal = None
            if not tokens:
                continue
            if refusal is not None and tokens < 0 and refusal.tokens is not None:
                standing.refusal = None
            if granted_us == standing.granted_us and standing.until and tokens <= standing.tokens:
                standing.tokens -= tokens
            else:
                self._correct(standing, granted_us, tokens)

    def _correct(self, standing: Standing, granted_us: int, tokens: int) -> None:
        """What its block in hand does not account for, if it has one: counted in Valkey, or only here."""
        if granted_us:
            self._flights.correct(standing.name, standing.plan, granted_us, 0, tokens)
        elif standing.share is not None:
            standing.share.correct(self._now_s(), tokens)

    # --- background -------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Keep this process's presence, look for Valkey while it is away, and count, until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._flights.run(), name="limits-presence")
            tasks.create_task(self._run_count(), name="limits-count")

    async def _run_count(self) -> None:
        while True:
            await asyncio.sleep(COUNT_S)
            self._count()

    async def close(self) -> None:
        """Give back what is left; requests that still run lose their slots to others."""
        if self._timer is not None:
            self._timer.cancel()
        for _, standing in self._blocks:
            self._give_back_block(standing)
        self._blocks.clear()
        await self._flights.close()
        self._count()

    def _count(self) -> None:
        for limit, times in self._limited.items():
            self._metrics.limited.labels(limit).inc(times)
        self._limited.clear()
        if self._decided_alone:
            self._metrics.limits_local.inc(self._decided_alone)
            self._decided_alone = 0

    # --- what Flights asks of its desk ------------------------------------------------------------------------

    def answer_from_memory(self, ask: Ask) -> bool:
        """By a block or a refusal that came since."""
        now = self._now_s()
        try:
            self._refuse_again(ask.standings, ask.tokens, now)
        except LimitExceeded as error:
            ask.answered.set_exception(error)
            return True
        for standing in ask.standings:
            if (
                standing.until <= now
                or standing.requests < 1
                or standing.tokens < ask.tokens
                or standing.in_use >= standing.slots
            ):
                return False
        ask.answered.set_result(self._take(ask.standings, ask.tokens))
        return True

    def pack(self, ask: Ask, flight: int, now: float) -> Call:
        """One call for all windows and slots; where no subject is exact, with blocks for the next requests."""
        call = Call(ADMIT, [], [self._incarnation, flight])
        takes_blocks = not any(each.plan.is_exact for each in ask.standings)
        for standing in ask.standings:
            block = (0, 0, 0)
            if takes_blocks and standing.asking != flight:
                self._give_back_block(standing)
                block = standing.next_block(now, ask.tokens, self._block_s)
                if block[0]:
                    standing.asking = flight
            ask.parts.append(Part(standing, standing.plan, block))
            add_records(
                call,
                standing.name,
                standing.plan,
                late_us=self._late_us,
                tokens=ask.tokens,
                slots=standing.held(now),
                extra=block,
            )
        return call

    def land(self, ask: Ask, answer: Answer | None, sent_at: float) -> None:
        """Admit or refuse as Valkey says; without it, alone. Who has left meanwhile gives back at once."""
        try:
            if answer is None:
                admission = self._decide_alone(ask.standings, ask.tokens, self._now_s())
            elif answer.is_admitted:
                admission = self._admitted(ask, answer, sent_at)
            else:
                raise self._refused(ask, answer, sent_at)
        except LimitExceeded as error:
            if not ask.answered.done():
                ask.answered.set_exception(error)
            return
        if ask.answered.done():
            admission.end(0)
        else:
            ask.answered.set_result(admission)

    def recount(self) -> None:
        """What was counted here alone ends, so does what was refused, and every slot in use is reported."""
        for standing in self._known.values():
            standing.share = standing.refusal = None
            if standing.plan.concurrency is not None and (standing.in_use or standing.until):
                self._flights.report(standing)

    # --- admitting --------------------------------------------------------------------------------------------

    def _take(self, standings: Sequence[Standing], tokens: int) -> Admission:
        """One request out of the blocks in hand, which have room for it."""
        parts = []
        for standing in standings:
            standing.requests -= 1
            standing.tokens -= tokens
            standing.in_use += 1
            standing.used += 1
            standing.was_used = True
            parts.append((standing, standing.granted_us))
        return Admission(self, parts, tokens, _headers_of(standings))

    def _admitted(self, ask: Ask, answer: Answer, sent_at: float) -> Admission:
        at = 0
        for part in ask.parts:
            size = len(part.plan.windows) + (part.plan.concurrency is not None)
            self._enter(part, answer.found[at : at + size], answer.now_us, sent_at)
            at += size
        parts = tuple([(part.standing, answer.now_us) for part in ask.parts])
        return Admission(self, parts, ask.tokens, _headers_of(ask.standings))

    def _enter(self, part: Part, found: list[Found], now_us: int, sent_at: float) -> None:
        """One request more of this subject, and its block."""
        standing, plan = part.standing, part.plan
        standing.in_use += 1
        standing.used += 1
        standing.refusal = None
        slots = found[-1].given if plan.concurrency is not None else None
        if slots is not None and standing.until:
            standing.slots = slots
        elif slots is not None and slots != standing.in_use:
            self._flights.report(standing)
        requests = [
            each.given for each, window in zip(found, plan.windows, strict=False) if window.unit == "requests"
        ]
        tokens = [
            each.given for each, window in zip(found, plan.windows, strict=False) if window.unit == "tokens"
        ]
        _tell(standing, plan, found)
        if not part.block[0]:
            return
        if standing.plan is plan and (not requests or requests[0]) and (not tokens or tokens[0]):
            until = sent_at + self._block_s
            standing.open_block(
                now_us, until, requests[0] if requests else None, tokens[0] if tokens else None, slots
            )
            self._blocks.append((until, standing))
            self._watch_blocks()
        else:
            self._flights.correct(
                standing.name, plan, now_us, -requests[0] if requests else 0, -tokens[0] if tokens else 0
            )

    def _watch_blocks(self) -> None:
        if self._timer is None and self._blocks:
            wait_s = max(0.0, self._blocks[0][0] - self._now_s())
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._end_blocks)

    def _end_blocks(self) -> None:
        """Unused parts of blocks whose time is over go back to everybody."""
        self._timer = None
        now = self._now_s()
        while self._blocks and self._blocks[0][0] <= now:
            until, standing = self._blocks.popleft()
            if standing.until == until:
                self._give_back_block(standing)
        self._watch_blocks()

    def _give_back_block(self, standing: Standing) -> None:
        if not standing.until:
            return
        requests, tokens = standing.close_block()
        if requests or tokens:
            self._flights.correct(standing.name, standing.plan, standing.granted_us, -requests, -tokens)
        if standing.plan.concurrency is not None:
            self._flights.report(standing)

    # --- refusing ---------------------------------------------------------------------------------------------

    def _refused(self, ask: Ask, answer: Answer, sent_at: float) -> LimitExceeded:
        received_at = self._now_s()
        at, refused = 0, []
        for part in ask.parts:
            size = len(part.plan.windows) + (part.plan.concurrency is not None)
            found = answer.found[at : at + size]
            at += size
            _tell(part.standing, part.plan, found)
            refusal = self._refusal_of(part.plan, found, ask.tokens, sent_at, received_at)
            if refusal is not None:
                part.standing.refusal = refusal
                refused.append((refusal, part.standing))
        return self._exceeded(ask.standings, refused, ask.tokens, received_at)

    def _refusal_of(
        self, plan: Plan, found: list[Found], tokens: int, sent_at: float, received_at: float
    ) -> Refusal | None:
        """The window that stays shut the longest. What another process may reopen is asked for again earlier."""
        worst, at = max(((each.wait_us, at) for at, each in enumerate(found)), default=(0, 0))
        if not worst:
            return None
        used = found[at].used
        if at == len(plan.windows) and plan.concurrency is not None:
            until = sent_at + SLOT_RETRY_S
            return Refusal("concurrency", plan.concurrency, used, until, received_at + SLOT_RETRY_S, None)
        window, wait_s = plan.windows[at], worst / 1e6
        until = sent_at + (wait_s if window.is_exact else min(wait_s, self._block_s))
        size = tokens if window.unit == "tokens" else None
        return Refusal(window.name, window.limit, used, until, received_at + wait_s, size)

    def _refuse_again(self, standings: Sequence[Standing], tokens: int, now: float) -> None:
        """Raises LimitExceeded where the last refusal still holds for a request of so many tokens."""
        refused = [
            (refusal, standing)
            for standing in standings
            if (refusal := standing.refusal) is not None
            and refusal.until > now
            and (refusal.tokens is None or refusal.tokens == tokens)
        ]
        if refused:
            raise self._exceeded(standings, refused, tokens, now)

    def _exceeded(
        self,
        standings: Sequence[Standing],
        refused: list[tuple[Refusal, Standing]],
        tokens: int,
        now: float,
    ) -> LimitExceeded:
        refusal, standing = max(refused, key=lambda each: each[0].free_at)
        self._limited[refusal.limit] += 1
        wait_s = refusal.free_at - now
        asked = tokens if refusal.limit.startswith("tokens") else 1
        message = refusal_message(refusal.limit, standing.kind, refusal.most, refusal.used, asked, wait_s)
        return LimitExceeded(
            refusal.limit, message, rounded_up(wait_s), _headers_of(standings), standing.name
        )

    # --- alone ------------------------------------------------------------------------------------------------

    def _decide_alone(self, standings: Sequence[Standing], tokens: int, now: float) -> Admission:
        """By this process's share of each limit. Raises LimitExceeded."""
        self._decided_alone += 1
        processes = max(1, self._live_count())
        refused = []
        for standing in standings:
            if standing.share is None:
                standing.share = Share(standing.plan)
            seen = standing.share.look(now, tokens, standing.in_use, processes)
            standing.views = tuple(
                View(
                    each.window.unit,
                    each.window.limit,
                    max(0, each.limit - each.used),
                    each.window.length_us // 1000,
                )
                for each in seen
                if each.window is not None
            )
            worst = max(seen, key=lambda each: each.wait_s)
            if worst.wait_s > 0:
                name = "concurrency" if worst.window is None else worst.window.name
                refusal = Refusal(name, worst.limit, worst.used, now, now + worst.wait_s, None)
                refused.append((refusal, standing))
        if refused:
            raise self._exceeded(standings, refused, tokens, now)
        for standing in standings:
            assert standing.share is not None
            standing.share.take(now, tokens)
            standing.in_use += 1
        return Admission(self, tuple([(each, 0) for each in standings]), tokens, _headers_of(standings))

    # --- subjects ---------------------------------------------------------------------------------------------

    def _standing(self, subject: Subject, now: float) -> Standing:
        standing = self._known.get(subject.name)
        if standing is None:
            self._make_room(now)
            standing = self._known[subject.name] = Standing(
                subject.name, subject.limits, self._plan(subject.limits)
            )
        elif standing.limits is not subject.limits:
            self._change_limits(standing, subject.limits)
        standing.was_used = True
        return standing

    def _plan(self, limits: Limits) -> Plan:
        return plan_of(limits, self._settings.exact_requests_minute_max, *self._lengths)

    def _change_limits(self, standing: Standing, limits: Limits) -> None:
        """Other limits end what was known under the old ones; requests in flight stay counted."""
        if standing.limits != limits:
            self._give_back_block(standing)
            had_slots = standing.plan.concurrency is not None
            standing.plan = self._plan(limits)
            standing.refusal = standing.share = None
            standing.views = ()
            if had_slots or standing.plan.concurrency is not None:
                self._flights.report(standing)
        standing.limits = limits

    def _make_room(self, now: float) -> None:
        """Forget a subject that is idle and was not used for the longest, or nearly so."""
        tries = 0
        while len(self._known) >= self._settings.limit_subjects_max and tries < FORGET_TRIES_MAX:
            tries += 1
            name, standing = self._known.popitem(last=False)
            if standing.was_used or not standing.is_idle(now):
                standing.was_used = False
                self._known[name] = standing


def _tell(standing: Standing, plan: Plan, found: list[Found]) -> None:
    """What clients shall see of it; what was given for a block is theirs too."""
    standing.views = tuple(
        View(
            window.unit,
            window.limit,
            min(window.limit, max(0, window.limit - each.used)),
            each.reset_us // 1000,
        )
        for window, each in zip(plan.windows, found, strict=False)
    )


def _headers_of(standings: Sequence[Standing]) -> Told:
    """The tightest of all subjects. Kept only while a block answers many with the same: they are ten times a standing."""
    first = standings[0]
    others = standings[1].views if len(standings) > 1 else ()
    told = first.told
    if told is not None and told[0] is first.views and told[1] is others:
        return told[2]
    headers = headers_of((*first.views, *others))
    first.told = (first.views, others, headers) if first.until else None
    return headers
