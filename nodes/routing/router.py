"""`choose`: one engine for one turn, and `Router`, which has what a choice goes by and remembers what was chosen.

Groups leave out those that can't. A short prompt goes to the least loaded of a few at random; a long one, or one with
wishes, to the engine of a few where it has the least work before its answer: those that hold its beginning, its homes, some
at random. The cost is the same for 10 and for 10,000 engines.
"""

import random
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

from nodes.routing.filters import NO_WISHES, Wishes, meets
from nodes.routing.picker import INFINITE, MISSES_MAX, least_of_a_few, pick, sampled
from nodes.routing.prefixes import (
    BLOCK_BYTES,
    BYTES_PER_TOKEN,
    Prefixes,
    Trail,
    beginnings,
    hold_of,
    holders_of,
    seed_of,
    sign_of,
)
from nodes.routing.scorers import (
    SESSION_TOKENS_MIN,
    Policy,
    Ties,
    has_its_share,
    share_of,
)
from nodes.routing.snapshot import Engine, Group, Snapshot

__all__ = ("MISSES_MAX", "Need", "NoEngine", "Router", "choose")

HOME_SHARE: Final = 0.5
NEXT_SHARE: Final = 0.1
"""What its home is worth to a prompt, and the next one, as shares of it; where the first is full or has its share, the next
takes its place. Enough for workers to agree where engines are about equally busy, and for a copy elsewhere not to be used
for long; too little to make anybody wait."""

COLD_SHARE: Final = 0.1
"""The same where nothing of the prompt is cached yet: all engines have as much to compute, so it goes to the least busy one,
and workers that see several that are equally busy agree on one of these."""

LAST_SHARE: Final = 0.9
"""What the engine that a prompt was sent to last is worth to it, where it is not known to hold it: of prompts that are more
than caches hold, those that move displace others, and find nothing."""

ROOM_TURNS: Final = 1
"""How many such prompts more the second home must have room for to be the first: workers see a little late what others do,
and full caches differ by a little."""

SAMPLE: Final = 2
"""Engines at random that a long prompt's own are held against: two suffice to find one that is idle while those are not. Of
up to twice as many all are looked at."""

CHAT_MARK: Final = b'"messages":['
COMPLETION_MARK: Final = b'"prompt":'
INPUT_MARK: Final = b'"input":'
"""Where a prompt begins in a request's JSON. Quotes inside strings are escaped, so text can't be taken for one of these."""


class NoEngine(Exception):
    """No engine can take the turn now. `is_known`: some engine serves the model, but none is fit or untried; `is_full`: one
    could, but for its being full."""

    def __init__(self, model: str, *, is_known: bool, is_full: bool = False) -> None:
        self.model = model
        self.is_known = is_known
        self.is_full = is_full
        super().__init__(f"no engine for {model}")


@dataclass(slots=True, init=False)
class Need:
    """What a turn asks of an engine. `tokens` is its size as load, `context` about how many it needs room for;
    `tried` engines are not asked again. `body` is what will be sent, `client` the account whose turn it is."""

    model: str
    kind: str
    tokens: int
    account_id: int | None
    tried: Collection[Engine]
    context: int
    body: bytes
    client: int
    wishes: Wishes

    # Written out, because a generated one is not compiled, and one is made for each turn.
    def __init__(
        self, model: str, kind: str, tokens: int, account_id: int | None = None, tried: Collection[Engine] = (),
        context: int = 0, body: bytes = b"", client: int = 0, wishes: Wishes = NO_WISHES,
    ) -> None:  # fmt: skip
        self.model = model
        self.kind = kind
        self.tokens = tokens
        self.account_id = account_id
        self.tried = tried
        self.context = context
        self.body = body
        self.client = client
        self.wishes = wishes


def choose(snapshot: Snapshot, need: Need, *, sample: int, turns_max: int, rng: random.Random) -> Engine:
    """The least loaded of `sample` fit engines, those with enough context before others. Raises NoEngine.

    The estimate of the context may be wrong, so it only orders: an engine that is too small says so itself, exactly.
    """
    return _least_loaded(_group_of(snapshot, need), need, sample, turns_max, rng)


def _least_loaded(group: Group, need: Need, sample: int, turns_max: int, rng: random.Random) -> Engine:
    roomy = group.roomy(need.context)
    if roomy > sample and not need.tried:
        best = least_of_a_few(group.fit, roomy, sample, turns_max, rng)
        if best is not None:
            return best
    return pick(_candidates(group, need, roomy, sample, turns_max, rng), rng)


class Router:
    """Chooses for one worker. `prefixes` says who holds which beginnings."""

    def __init__(self, policy: Policy, prefixes: Prefixes, *, sessions_max: int) -> None:
        self.policy = policy
        self._prefixes = prefixes
        self._sessions: OrderedDict[tuple[int, str], Engine] = OrderedDict()
        self._sessions_max = sessions_max
        self._rng = random.Random()  # noqa: S311 - spreads load, keeps no secret

    def route(self, snapshot: Snapshot, need: Need) -> Engine:
        """The engine for a turn, which is taken to get it. Raises NoEngine."""
        policy = self.policy
        group = _group_of(snapshot, need)
        is_short = not policy.has_affinity or len(need.body) < BLOCK_BYTES
        if need.wishes is NO_WISHES and (is_short or len(group.fit) < 2):
            return _least_loaded(group, need, policy.sample, policy.turns_max, self._rng)
        hashes = [] if is_short else hashes_in(need.body, seed_of(group.sign, need.client))
        trail = self._prefixes.trail(hashes) if hashes else None
        engine = None
        if trail is not None and need.wishes is NO_WISHES and not need.tried and not policy.reputation_tokens:
            engine = self._least_work(group, need, trail)
        if engine is None:
            engine = self._best(group, need, self._ties(group, need, trail))
        group.place(engine)
        if trail is not None:
            if trail.is_cold:
                group.place_cold(engine, trail.tokens)
            self._prefixes.follow(trail, engine, len(need.body) // BYTES_PER_TOKEN)
        if need.wishes.session:
            self._remember(need, engine)
        return engine

    def _least_work(self, group: Group, need: Need, trail: Trail) -> Engine | None:
        """The usual case of `_best`, for a turn without wishes that was nowhere yet: in one go, and with a sample of two.
        None where one drawn is unfit."""
        fit, count = group.fit, group.roomy(need.context)
        if not count:
            return None
        best, least = self._least_drawn(group, need, trail)
        is_cold = trail.is_cold
        is_few = count <= 2 * SAMPLE
        # One number at random has two: its whole part and, as it is as even, what remains of it.
        chance = 0.0 if is_few else self._rng.random()
        for number in range(count if is_few else SAMPLE):
            place = number
            if not is_few:
                chance *= count
                place = int(chance)
                chance -= place
            engine = fit[place]
            if engine is not best:
                cost = self._cost(engine, group.placed.get(engine, 0.0), group, is_cold)
                if cost < least:
                    if not engine.is_fit(self.policy.turns_max):
                        return None
                    best, least = engine, cost
        return best

    def _least_drawn(self, group: Group, need: Need, trail: Trail) -> tuple[Engine | None, float]:
        """Of the engines that the prompt is drawn to the one with the least work, and how much that is."""
        policy, context = self.policy, need.context
        share = share_of(group, policy)
        has_room = group.is_roomy_all(context)
        prompt_tokens, spared = float(trail.tokens), float(trail.tokens_held)
        held, last, is_cold = trail.held, trail.last, trail.is_cold
        best: Engine | None = None
        least, worth = INFINITE, COLD_SHARE if is_cold else HOME_SHARE
        homes = homes_of(group, trail)
        for home in homes:
            had = group.placed.get(home, 0.0)
            if _may_have_more(home, had, share, policy.turns_max) and (
                has_room or group.is_roomy(home, context)
            ):
                worth_here = LAST_SHARE if home is last else worth
                cost = self._cost(home, had, group, is_cold) - prompt_tokens * worth_here
                if hold_of(home, held) is not None:
                    cost -= spared
                if cost < least:
                    best, least = home, cost
                worth = 0.0 if is_cold else NEXT_SHARE
        hold = held
        while hold is not None:
            engine = hold.engine
            if engine is not homes[0] and engine is not homes[-1] and group.has(engine):
                cost = self._cost(engine, group.placed.get(engine, 0.0), group, False) - spared
                if cost < least and self._may_draw(engine, group, need):
                    best, least = engine, cost
            hold = hold.next
        return best, least

    def _cost(self, engine: Engine, had: float, group: Group, is_cold: bool) -> float:
        """An engine's work before it is at the turn, where it `had` placements of such a weight."""
        cost = engine.load.in_tokens * self.policy.load_weight + had / group.unit
        return cost + group.computing(engine) if is_cold else cost

    def _may_draw(self, engine: Engine, group: Group, need: Need) -> bool:
        """Whether a turn may go to that engine for its cache's sake."""
        return (
            group.has(engine)
            and engine.is_fit(self.policy.turns_max)
            and engine not in need.tried
            and not has_its_share(engine, group, self.policy)
            and group.is_roomy(engine, need.context)
        )

    def _best(self, group: Group, need: Need, ties: Ties) -> Engine:
        """The one with the least work before the answer: what `scorers.score` tells part by part, in one go."""
        policy, wishes = self.policy, need.wishes
        turns_max, region = policy.turns_max, wishes.region
        drawn = self._drawn(group, need, ties)
        best, least = None, INFINITE
        for engine, spared in drawn.items():
            cost = self._cost(engine, group.placed.get(engine, 0.0), group, ties.is_cold) - spared
            if region and engine.region != region:
                cost += policy.region_tokens
            if policy.reputation_tokens:
                cost += (1.0 - engine.reputation) * policy.reputation_tokens
            if cost < least:
                best, least = engine, cost
        if best is None:
            raise no_engine(group, need, turns_max)
        return best

    def _drawn(self, group: Group, need: Need, ties: Ties) -> dict[Engine, int]:
        """The engines that are looked at, each with the tokens that are spared there: those that something draws the turn
        to, while they have no more than their share, and some at random. Raises NoEngine."""
        policy, wishes = self.policy, need.wishes
        drawn: dict[Engine, int] = {}
        for engine in {*ties.matched, *ties.hinted}:
            if self._may_draw(engine, group, need):
                drawn[engine] = ties.of(engine)
        if wishes.has_caps:
            drawn = {engine: tokens for engine, tokens in drawn.items() if meets(engine, wishes)}
            found = _within_caps(group, need, policy, self._rng)
        else:
            roomy = group.roomy(need.context)
            found = _candidates(group, need, roomy, policy.sample, policy.turns_max, self._rng)
        for engine in found:
            drawn.setdefault(engine, 0)
        return drawn

    # --- what draws a turn somewhere ---------------------------------------------------------------------------

    def ties_of(self, group: Group, need: Need, hashes: list[int]) -> Ties:
        """Who holds the prompt's beginning, where it has its home, and its session's engine."""
        return self._ties(group, need, self._prefixes.trail(hashes) if hashes else None)

    def _ties(self, group: Group, need: Need, trail: Trail | None) -> Ties:
        ties = Ties({}, {})
        if trail is not None:
            tokens, prompt_tokens = trail.tokens_held, trail.tokens
            for engine in holders_of(trail.held):
                if group.has(engine):
                    ties.matched[engine] = tokens
            ties.is_cold = trail.is_cold
            worth = COLD_SHARE if ties.is_cold else HOME_SHARE
            for engine in homes_of(group, trail):
                if self._may_draw(engine, group, need):
                    share = LAST_SHARE if engine is trail.last else worth
                    ties.hinted[engine] = int(share * prompt_tokens)
                    worth = 0.0 if ties.is_cold else NEXT_SHARE
        if need.wishes.session:
            own = self._sessions.get((need.client, need.wishes.session))
            if own is not None and group.has(own):
                ties.hinted[own] = max(need.tokens, SESSION_TOKENS_MIN)
        return ties

    def _remember(self, need: Need, engine: Engine) -> None:
        sessions, session = self._sessions, (need.client, need.wishes.session)
        sessions[session] = engine
        sessions.move_to_end(session)
        if len(sessions) > self._sessions_max:
            sessions.popitem(last=False)


def _may_have_more(engine: Engine, had: float, share: float, turns_max: int) -> bool:
    """It is fit, and had no more than its share of placements or is idle."""
    return engine.is_fit(turns_max) and (had <= share or not engine.is_at_work)


def homes_of(group: Group, trail: Trail) -> tuple[Engine, ...]:
    """The homes of a prompt, the better one first: what holds it already or has more room for it in its cache, else where it
    was last. So caches fill evenly, nobody's prompts are given up for it while there is room elsewhere, and those that are
    more than fit stay where some of them are found again.
    """
    homes = group.ring.homes(trail.home_hash)
    if len(homes) < 2:
        return homes
    first, second = homes[0], homes[1]
    held, last = trail.held, trail.last
    if last is not None and last is not first and group.has(last):
        first, second = last, first
    if hold_of(first, held) is not None:
        return first, second
    has_more_room = second.held.room - first.held.room > ROOM_TURNS * trail.tokens
    return (second, first) if has_more_room or hold_of(second, held) is not None else (first, second)


def hashes_of(need: Need) -> list[int]:
    """The beginnings of the turn's prompt; none where that is too short or has no text."""
    return hashes_in(need.body, seed_of(sign_of(need.model), need.client))


def hashes_in(body: bytes, seed: int) -> list[int]:
    """The same, of what will be sent."""
    start = body.find(CHAT_MARK)
    if start < 0:
        start = body.find(COMPLETION_MARK)
    if start < 0:
        start = body.find(INPUT_MARK)
    return beginnings(body, start, seed) if start >= 0 else []


def no_engine(group: Group, need: Need, turns_max: int) -> NoEngine:
    """Why nobody in the group can take the turn."""
    is_full = any(
        engine.breaker.admits and not engine.is_fit(turns_max) and meets(engine, need.wishes)
        for engine in group.engines
    )
    return NoEngine(need.model, is_known=True, is_full=is_full)


def _group_of(snapshot: Snapshot, need: Need) -> Group:
    group = snapshot.group(need.model, need.kind, need.account_id)
    if group is None:
        raise NoEngine(need.model, is_known=need.model in snapshot.by_model)
    return group


def _candidates(
    group: Group, need: Need, roomy: int, sample: int, turns_max: int, rng: random.Random
) -> list[Engine]:
    """A few fit engines at random, with enough context where there are such. Raises NoEngine."""
    small = len(group.fit) - roomy
    found = sampled(group, 0, roomy, need.tried, sample, turns_max, rng)
    if not found and small:
        end = len(group.fit)
        found = sampled(group, end - small, end, need.tried, sample, turns_max, rng)
    if not found:
        raise no_engine(group, need, turns_max)
    return found


def _within_caps(group: Group, need: Need, policy: Policy, rng: random.Random) -> list[Engine]:
    """The same for a turn with caps: few turns have them, so those within them are looked for and not indexed."""
    turns_max, tried, wishes = policy.turns_max, need.tried, need.wishes
    within = [
        engine for engine in group.fit if meets(engine, wishes) and engine.is_fit(turns_max) and engine not in tried
    ]  # fmt: skip
    roomy = [engine for engine in within if group.is_roomy(engine, need.context)] or within
    return roomy if len(roomy) <= policy.sample else rng.sample(roomy, policy.sample)
