"""`choose`: one engine for one turn, and `Router`, which has what a choice goes by and remembers what was chosen.

Groups leave out those that can't. A short prompt goes to the least loaded of a few at random; a long one, or one with
wishes, to the engine of a few where it has the least work before its answer: those that hold its beginning, its homes, some
at random. The cost is the same for 10 and for 10,000 engines.
"""

import random
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

from nodes.routing.filters import NO_WISHES, Wishes, meets
from nodes.routing.picker import INFINITE, MISSES_MAX, least_of_a_few, pick, sampled
from nodes.routing.prefixes import (
    BLOCK_BYTES,
    BYTES_PER_TOKEN,
    Prefixes,
    beginnings,
    home_hash,
    seed_of,
    tokens_of,
)
from nodes.routing.scorers import SESSION_TOKENS_MIN, Policy, Ties, has_its_share
from nodes.routing.snapshot import Engine, Group, Snapshot

__all__ = ("MISSES_MAX", "Need", "NoEngine", "Router", "choose")

HOME_SHARES = (0.5, 0.1)
"""What its home is worth to a prompt, and the next one, as shares of it; where the first is full or has its share, the next
takes its place. Enough for workers to agree where engines are about equally busy, and for a copy elsewhere not to be used
for long; too little to make anybody wait."""

LAST_SHARE = 0.9
"""What the engine that a prompt was sent to last is worth to it, where it is not known to hold it: of prompts that are more
than caches hold, those that move displace others, and find nothing."""

ROOM_TURNS = 1
"""How many such prompts more the second home must have room for to be the first: workers see a little late what others do,
and full caches differ by a little."""

SAMPLE = 2
"""Engines at random that a long prompt's own are held against: two suffice to find one that is idle while those are not. Of
up to twice as many all are looked at."""

PROMPT_MARKS = (b'"messages":[', b'"prompt":', b'"input":')
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
        hashes = [] if is_short else hashes_of(need)
        engine = None
        if hashes and need.wishes is NO_WISHES and not need.tried and not policy.reputation_tokens:
            engine = self._least_work(group, need, hashes)
        if engine is None:
            engine = self._best(group, need, self.ties_of(group, need, hashes))
        group.place(engine)
        if hashes:
            self._prefixes.note(engine, hashes, len(need.body) // BYTES_PER_TOKEN)
        if need.wishes.session:
            self._remember(need, engine)
        return engine

    def _least_work(self, group: Group, need: Need, hashes: Sequence[int]) -> Engine | None:
        """The usual case of `_best`, for a turn without wishes: in one go, and with a sample of two. None where one drawn is
        unfit."""
        policy = self.policy
        weight, turns_max = policy.load_weight, policy.turns_max
        depth, holders = self._prefixes.match(hashes)
        spared = tokens_of(depth)
        placed, unit = group.placed, group.unit
        best, least = None, INFINITE
        prompt_tokens = tokens_of(len(hashes))
        last = self._prefixes.last(hashes)
        homes = homes_of(group, hashes, holders, last)
        shares = iter(HOME_SHARES)
        for engine in homes:
            if self._may_draw(engine, group, need):
                share = _worth(engine, last, shares)
                cost = engine.load.in_tokens * weight + placed.get(engine, 0.0) / unit - share * prompt_tokens
                if engine in holders:
                    cost -= spared
                if cost < least:
                    best, least = engine, cost
        for engine in holders:
            if engine not in homes:
                cost = engine.load.in_tokens * weight + placed.get(engine, 0.0) / unit - spared
                if cost < least and self._may_draw(engine, group, need):
                    best, least = engine, cost
        fit, count, draw = group.fit, group.roomy(need.context), self._rng.random
        if not count:
            return None
        few = fit[:count] if count <= 2 * SAMPLE else (fit[int(draw() * count)], fit[int(draw() * count)])
        for engine in few:
            cost = engine.load.in_tokens * weight + placed.get(engine, 0.0) / unit
            if cost < least:
                if not engine.is_fit(turns_max):
                    return None
                best, least = engine, cost
        return best

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
        turns_max, weight, region = policy.turns_max, policy.load_weight, wishes.region
        drawn = self._drawn(group, need, ties)
        best, least = None, INFINITE
        for engine, spared in drawn.items():
            cost = engine.load.in_tokens * weight + group.late_turns(engine) - spared
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

    def ties_of(self, group: Group, need: Need, hashes: Sequence[int]) -> Ties:
        """Who holds the prompt's beginning, where it has its home, and its session's engine."""
        ties = Ties({}, {})
        if hashes:
            depth, holders = self._prefixes.match(hashes)
            tokens, prompt_tokens = tokens_of(depth), tokens_of(len(hashes))
            for engine in holders:
                if group.has(engine):
                    ties.matched[engine] = tokens
            last, shares = self._prefixes.last(hashes), iter(HOME_SHARES)
            for engine in homes_of(group, hashes, holders, last):
                if self._may_draw(engine, group, need):
                    ties.hinted[engine] = int(_worth(engine, last, shares) * prompt_tokens)
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


def homes_of(
    group: Group, hashes: Sequence[int], holders: Sequence[Engine], last: Engine | None
) -> Sequence[Engine]:
    """The homes of a prompt, the better one first: what holds it already or has more room for it in its cache, else where it
    was `last`. So caches fill evenly, nobody's prompts are given up for it while there is room elsewhere, and those that are
    more than fit stay where some of them are found again.
    """
    homes = group.ring.homes(home_hash(hashes))
    if len(homes) < 2:
        return homes
    first, second = homes
    if last is not None and last is not first and group.has(last):
        first, second = last, first
    if first in holders:
        return first, second
    if second in holders or second.held.room - first.held.room > ROOM_TURNS * tokens_of(len(hashes)):
        return second, first
    return first, second


def _worth(engine: Engine, last: Engine | None, shares: Iterator[float]) -> float:
    """What a home is worth to a prompt, as a share of it; the next of `shares` unless the prompt was there last."""
    share = next(shares)
    return LAST_SHARE if engine is last else share


def hashes_of(need: Need) -> list[int]:
    """The beginnings of the turn's prompt; none where that is too short or has no text."""
    body = need.body
    for mark in PROMPT_MARKS:
        start = body.find(mark)
        if start >= 0:
            return beginnings(body, start, seed_of(need.model, need.client))
    return []


def no_engine(group: Group, need: Need, turns_max: int) -> NoEngine:
    """Why nobody in the group can take the turn."""
    is_full = any(
        engine.breaker.admits and not engine.is_fit(turns_max) and meets(engine, need.wishes)
        for engine in group.engines
    )
    return NoEngine(need.model, is_known=True, is_full=is_full)


def _group_of(snapshot: Snapshot, need: Need) -> Group:
    group = snapshot.groups.get((need.model, need.kind, need.account_id))
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
