"""The keys that a process knows: a caller's secret becomes a principal without a wait, or after one look-up.

It decides what to remember and for how long, and never who a key belongs to: that is the store's answer. The
change feed tells it what to forget.
"""

import asyncio
from collections import OrderedDict
from dataclasses import dataclass
from typing import Protocol

from billing.leases import Budget
from billing.limits.rules import Subject
from config.changes import EVERYTHING
from config.clock import Clock
from config.defaults import Settings
from config.postgres import AWAY
from gateway.identity.secrets import SECRET_CHARS_MAX, hash_secret

LOADS_AT_ONCE_MAX = 2
"""Look-ups in PostgreSQL at a time: a flood of unknown keys leaves connections for billing and the change
feed.
"""

LOADS_MAX = 256
"""Look-ups in flight and waiting: at some 0.3 ms each the last one waits well below a second."""

READS_MAX = 4
"""Reads of one key that changes may spoil in a row; polls are far apart compared to a read."""

REFUSED_SHARE = 8
"""Refused keys remembered: one for this many known ones, since anybody can invent them."""


class InvalidKey(Exception):
    """No such key, or it was revoked, or its account is suspended."""


class IdentityUnavailable(Exception):
    """The key is not known here and can't be looked up at the moment."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Whom a key speaks for and what it may do; holds no secret."""

    key_id: int
    account_id: int
    account_name: str
    scopes: frozenset[str]
    models: frozenset[str] | None  # None: every model
    subjects: tuple[
        Subject, ...
    ] = ()  # whose rate limits its requests count against: the key's, the account's
    budgets: tuple[Budget, ...] = ()  # that its turns are held from, beside the wallet


class KeyFinder(Protocol):
    """Where keys come from (KeyStore)."""

    async def find(self, digest: bytes) -> Principal | None:
        """The principal of a valid key."""
        ...


class KeyRing:
    """Bounded memory of known and of refused keys, by digest.

    Subscribe `forget_key` and `forget_account` to the change feed. A read that was under way while anything
    was forgotten is done again: its answer may be older than the change, which is not delivered a second
    time.
    """

    def __init__(self, store: KeyFinder, pepper: bytes, settings: Settings, clock: Clock) -> None:
        self._store = store
        self._pepper = pepper
        self._settings = settings
        self._clock = clock
        self._known: OrderedDict[bytes, Principal] = OrderedDict()
        self._of_account: dict[int, set[bytes]] = {}
        self._refused: OrderedDict[bytes, float] = OrderedDict()  # until when, by the monotonic clock
        self._loading: dict[bytes, asyncio.Task[Principal | None]] = {}
        self._slots = asyncio.Semaphore(LOADS_AT_ONCE_MAX)
        self._changes = 0  # how often anything was forgotten

    def __repr__(self) -> str:
        return f"<KeyRing known={len(self._known)} refused={len(self._refused)} loading={len(self._loading)}>"

    def lookup(self, secret: str) -> Principal | None:
        """From memory only; None: `load` knows more."""
        return self._known.get(self.digest_of(secret))

    def digest_of(self, secret: str) -> bytes:
        """What `known` finds the secret by: a connection that sends the same one again needs to hash it once."""
        return hash_secret(self._pepper, secret)

    def known(self, digest: bytes) -> Principal | None:
        """`lookup` of a secret by its digest: whoever keeps that must ask anew for each request, as keys are revoked."""
        return self._known.get(digest)

    async def load(self, secret: str) -> Principal:
        """From memory or PostgreSQL; raises InvalidKey or IdentityUnavailable."""
        if not 0 < len(secret) <= SECRET_CHARS_MAX:
            raise InvalidKey
        digest = self.digest_of(secret)
        known = self._known.get(digest)
        if known is not None:
            return known
        if self._is_refused(digest):
            raise InvalidKey
        principal = await asyncio.shield(self._load_once(digest))
        if principal is None:
            raise InvalidKey
        return principal

    def forget_key(self, entity: str) -> None:
        """A key was made, changed or revoked; `entity` is its digest in hex, or EVERYTHING."""
        self._changes += 1
        if entity == EVERYTHING:
            self._forget_all()
            return
        digest = bytes.fromhex(entity)
        self._refused.pop(digest, None)
        self._drop(digest)

    def forget_account(self, entity: str) -> None:
        """An account, its tier or a budget of it was changed; `entity` is its id, or EVERYTHING."""
        self._changes += 1
        if entity == EVERYTHING:
            self._forget_all()
            return
        self._refused.clear()  # a suspended account's keys are among them, and it may be active again
        for digest in list(self._of_account.get(int(entity), ())):
            self._drop(digest)

    def _forget_all(self) -> None:
        self._known.clear()
        self._of_account.clear()
        self._refused.clear()

    def _load_once(self, digest: bytes) -> "asyncio.Task[Principal | None]":
        """One task a key, however many callers wait; it lives on if they leave."""
        task = self._loading.get(digest)
        if task is not None:
            return task
        if len(self._loading) >= LOADS_MAX:
            raise IdentityUnavailable("too many unknown keys at once")
        task = asyncio.create_task(self._find(digest), name="key-load")
        self._loading[digest] = task
        task.add_done_callback(lambda done: self._loaded(digest, done))
        return task

    def _loaded(self, digest: bytes, task: "asyncio.Task[Principal | None]") -> None:
        self._loading.pop(digest, None)
        if not task.cancelled():
            task.exception()  # seen, also if every caller has left

    async def _find(self, digest: bytes) -> Principal | None:
        try:
            async with asyncio.timeout(self._settings.database_timeout_s), self._slots:
                for _ in range(READS_MAX):
                    changes = self._changes
                    principal = await self._store.find(digest)
                    if changes == self._changes:
                        self._remember(digest, principal)
                        return principal
        except AWAY as error:
            raise IdentityUnavailable("keys can't be looked up at the moment") from error
        raise IdentityUnavailable("keys change too fast to be looked up")

    def _remember(self, digest: bytes, principal: Principal | None) -> None:
        if principal is None:
            if self._settings.unknown_key_cache_s > 0:
                while len(self._refused) >= max(1, self._settings.key_cache_max // REFUSED_SHARE):
                    self._refused.popitem(last=False)
                self._refused[digest] = self._clock.monotonic() + self._settings.unknown_key_cache_s
            return
        while len(self._known) >= self._settings.key_cache_max:
            self._drop(next(iter(self._known)))
        self._known[digest] = principal
        self._of_account.setdefault(principal.account_id, set()).add(digest)

    def _drop(self, digest: bytes) -> None:
        principal = self._known.pop(digest, None)
        if principal is None:
            return
        siblings = self._of_account[principal.account_id]
        siblings.discard(digest)
        if not siblings:
            del self._of_account[principal.account_id]

    def _is_refused(self, digest: bytes) -> bool:
        until = self._refused.get(digest)
        if until is None:
            return False
        if self._clock.monotonic() < until:
            return True
        del self._refused[digest]
        return False
