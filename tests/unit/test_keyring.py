"""What a process remembers of keys, and above all what it must not."""

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest

from config.changes import EVERYTHING
from config.defaults import Settings
from gateway.identity.keyring import (
    LOADS_AT_ONCE_MAX,
    LOADS_MAX,
    READS_MAX,
    IdentityUnavailable,
    InvalidKey,
    KeyRing,
    Principal,
)
from gateway.identity.secrets import hash_secret
from tests.fakes.clock import FakeClock

PEPPER = b"pepper"
SETTINGS = Settings(key_cache_max=16, unknown_key_cache_s=30.0)


def digest(secret: str) -> bytes:
    return hash_secret(PEPPER, secret)


def entity(secret: str) -> str:
    return digest(secret).hex()


def principal(key_id: int = 1, account_id: int = 1, *, models: frozenset[str] | None = None) -> Principal:
    return Principal(key_id, account_id, f"account {account_id}", frozenset({"inference"}), models)


class Database:
    """Keys by digest. A gate, once set up, holds a read back between its look and its answer."""

    def __init__(self, **keys: Principal) -> None:
        self.rows = {digest(secret): row for secret, row in keys.items()}
        self.reads = 0
        self.at_once = 0
        self.at_once_max = 0
        self.looked = asyncio.Event()
        self.gates: list[asyncio.Event] = []
        self.on_read: Callable[[], None] = lambda: None
        self.error: Exception | None = None

    def hold(self) -> asyncio.Event:
        gate = asyncio.Event()
        self.gates.append(gate)
        return gate

    async def find(self, wanted: bytes) -> Principal | None:
        self.reads += 1
        self.at_once += 1
        self.at_once_max = max(self.at_once, self.at_once_max)
        try:
            row = self.rows.get(wanted)
            self.looked.set()
            self.on_read()
            if self.gates:
                await self.gates.pop(0).wait()
            if self.error is not None:
                raise self.error
            return row
        finally:
            self.at_once -= 1


def ring_on(database: Database, clock: FakeClock | None = None, settings: Settings = SETTINGS) -> KeyRing:
    return KeyRing(database, PEPPER, settings, clock or FakeClock())


async def test_a_key_is_read_once_and_then_known() -> None:
    database = Database(good=principal())
    ring = ring_on(database)
    assert ring.lookup("good") is None
    assert await ring.load("good") == principal()
    assert ring.lookup("good") == principal()
    await ring.load("good")
    assert database.reads == 1


async def test_a_digest_that_a_connection_keeps_finds_its_key_until_that_is_revoked() -> None:
    ring = ring_on(Database(good=principal()))
    kept = ring.digest_of("good")
    assert ring.known(kept) is None
    await ring.load("good")
    assert ring.known(kept) == principal()
    ring.forget_key(entity("good"))
    assert ring.known(kept) is None


async def test_callers_with_the_same_new_key_share_one_read() -> None:
    database = Database(good=principal())
    gate = database.hold()
    ring = ring_on(database)
    callers = [asyncio.create_task(ring.load("good")) for _ in range(20)]
    await database.looked.wait()
    gate.set()
    assert await asyncio.gather(*callers) == [principal()] * 20
    assert database.reads == 1


async def test_a_caller_that_leaves_does_not_take_the_read_along() -> None:
    database = Database(good=principal())
    gate = database.hold()
    ring = ring_on(database)
    leaver, stayer = (asyncio.create_task(ring.load("good")) for _ in range(2))
    await database.looked.wait()
    leaver.cancel()
    gate.set()
    assert await stayer == principal()
    assert leaver.cancelled()


async def test_an_unknown_key_is_refused_without_reading_until_its_time_is_over() -> None:
    database, clock = Database(), FakeClock()
    ring = ring_on(database, clock)
    for _ in range(3):
        with pytest.raises(InvalidKey):
            await ring.load("bad")
    assert database.reads == 1
    clock.advance(30.0)
    with pytest.raises(InvalidKey):
        await ring.load("bad")
    assert database.reads == 2


async def test_a_new_key_clears_its_refusal_at_once() -> None:
    database = Database()
    ring = ring_on(database)
    with pytest.raises(InvalidKey):
        await ring.load("young")
    database.rows[digest("young")] = principal()
    ring.forget_key(entity("young"))
    assert await ring.load("young") == principal()


async def test_a_resumed_account_clears_its_keys_refusals_at_once() -> None:
    database = Database()
    ring = ring_on(database)
    with pytest.raises(InvalidKey):
        await ring.load("suspended")
    database.rows[digest("suspended")] = principal()
    ring.forget_account("1")
    assert await ring.load("suspended") == principal()


async def test_a_forgotten_key_is_read_again() -> None:
    database = Database(good=principal())
    ring = ring_on(database)
    await ring.load("good")
    del database.rows[digest("good")]
    ring.forget_key(entity("good"))
    ring.forget_key(entity("good"))  # a change may come twice
    with pytest.raises(InvalidKey):
        await ring.load("good")


async def test_a_forgotten_account_takes_all_its_keys_along_and_no_others() -> None:
    database = Database(a=principal(1, 7), b=principal(2, 7), c=principal(3, 8))
    ring = ring_on(database)
    for secret in "abc":
        await ring.load(secret)
    ring.forget_account("7")
    assert [ring.lookup(secret) is None for secret in "abc"] == [True, True, False]


@pytest.mark.parametrize("forget", [KeyRing.forget_key, KeyRing.forget_account])
async def test_everything_can_be_forgotten(forget: Callable[[KeyRing, str], None]) -> None:
    database = Database(a=principal(1, 7), b=principal(2, 8))
    ring = ring_on(database)
    for secret in "ab":
        await ring.load(secret)
    forget(ring, EVERYTHING)
    assert ring.lookup("a") is None
    assert ring.lookup("b") is None


@pytest.mark.parametrize(
    "deliver",
    [
        lambda ring: ring.forget_key(entity("good")),
        lambda ring: ring.forget_account("1"),
        lambda ring: ring.forget_key(EVERYTHING),
    ],
    ids=["key revoked", "account suspended", "anything may have changed"],
)
async def test_a_read_that_began_before_a_revocation_can_not_revive_the_key(
    deliver: Callable[[KeyRing], None],
) -> None:
    """The read sees the old row; the revocation commits and is delivered; only then comes the read's answer."""
    database = Database(good=principal())
    gate = database.hold()
    ring = ring_on(database)
    caller = asyncio.create_task(ring.load("good"))
    await database.looked.wait()
    database.rows.clear()
    deliver(ring)
    gate.set()
    with pytest.raises(InvalidKey):
        await caller
    assert ring.lookup("good") is None


async def test_a_caller_that_joins_an_old_read_after_the_revocation_is_refused_too() -> None:
    database = Database(good=principal())
    gate = database.hold()
    ring = ring_on(database)
    first = asyncio.create_task(ring.load("good"))
    await database.looked.wait()
    database.rows.clear()
    ring.forget_key(entity("good"))
    second = asyncio.create_task(ring.load("good"))
    gate.set()
    assert [type(outcome) for outcome in await asyncio.gather(first, second, return_exceptions=True)] == [
        InvalidKey
    ] * 2


async def test_a_read_that_began_before_a_key_was_made_can_not_refuse_it() -> None:
    database = Database()
    gate = database.hold()
    ring = ring_on(database)
    caller = asyncio.create_task(ring.load("young"))
    await database.looked.wait()
    database.rows[digest("young")] = principal()
    ring.forget_key(entity("young"))
    gate.set()
    assert await caller == principal()


async def test_a_key_whose_reads_are_always_overtaken_is_unavailable_not_valid() -> None:
    database = Database(good=principal())
    ring = ring_on(database)
    database.on_read = lambda: ring.forget_account("99")
    with pytest.raises(IdentityUnavailable):
        await ring.load("good")
    assert ring.lookup("good") is None
    assert database.reads == READS_MAX


async def test_a_database_that_is_away_is_unavailable_not_invalid() -> None:
    database = Database(good=principal())
    database.error = ConnectionRefusedError()
    ring = ring_on(database)
    with pytest.raises(IdentityUnavailable):
        await ring.load("good")
    database.error = None
    assert await ring.load("good") == principal()


async def test_a_database_that_hangs_is_unavailable_in_time() -> None:
    database = Database(good=principal())
    database.hold()
    ring = ring_on(database, settings=replace(SETTINGS, database_timeout_s=0.01))
    with pytest.raises(IdentityUnavailable):
        await ring.load("good")


async def test_a_flood_of_unknown_keys_reads_few_at_once_and_is_cut_off() -> None:
    database = Database()
    gates = [database.hold() for _ in range(LOADS_MAX)]
    ring = ring_on(database)
    flood = [asyncio.create_task(ring.load(f"invented {n}")) for n in range(LOADS_MAX)]
    await database.looked.wait()
    with pytest.raises(IdentityUnavailable, match="too many"):
        await ring.load("one more")
    for gate in gates:
        gate.set()
    outcomes = await asyncio.gather(*flood, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {InvalidKey}
    assert database.at_once_max == LOADS_AT_ONCE_MAX


async def test_memory_is_bounded_and_the_oldest_go_first() -> None:
    database = Database(**{f"key{n}": principal(n, n % 3) for n in range(40)})
    ring = ring_on(database)
    for n in range(40):
        await ring.load(f"key{n}")
        with pytest.raises(InvalidKey):
            await ring.load(f"invented{n}")
    assert repr(ring) == "<KeyRing known=16 refused=2 loading=0>"
    assert ring.lookup("key23") is None
    assert ring.lookup("key24") is not None


@pytest.mark.parametrize("secret", ["", "x" * 513])
async def test_what_can_be_no_key_is_refused_unread(secret: str) -> None:
    database = Database()
    with pytest.raises(InvalidKey):
        await ring_on(database).load(secret)
    assert database.reads == 0
