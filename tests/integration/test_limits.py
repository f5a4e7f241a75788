"""Rate limits on the real Valkey: exact over several processes, true in what they tell, and there when it is not."""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest
from redis.asyncio import Redis

from billing.limits import Admission, Limiter, LimitExceeded, Limits, Subject
from config.clock import SystemClock
from config.defaults import Settings
from config.embedded import EmbeddedStores
from tests.fakes.limits import limiters
from tests.fakes.stores import frozen, kill
from tests.waiting import eventually

MINUTE_S = 2.0  # of the tests of high limits; low ones need less
CLOCK = SystemClock()
numbers = itertools.count(1)


def key(**limits: int) -> tuple[Subject, ...]:
    return (Subject("key", next(numbers), Limits(**limits)),)


def granted_us(admission: Admission) -> int:
    """When it was admitted, by Valkey's clock."""
    return admission._parts[0][1]


async def ask(limiter: Limiter, subjects: tuple[Subject, ...], tokens: int = 1) -> Admission:
    return limiter.try_admit(subjects, tokens) or await limiter.admit(subjects, tokens)


async def is_admitted(limiter: Limiter, subjects: tuple[Subject, ...], tokens: int = 1) -> bool:
    try:
        (await ask(limiter, subjects, tokens)).end(tokens)
    except LimitExceeded:
        return False
    return True


async def saturate(
    chosen: list[Limiter], subjects: tuple[Subject, ...], seconds: float, clients: int = 3
) -> list[tuple[int, float]]:
    """Clients that ask again at once; when each request was admitted, by Valkey's clock and by ours."""
    end = CLOCK.monotonic() + seconds
    times = []

    async def client(limiter: Limiter) -> None:
        while CLOCK.monotonic() < end:
            try:
                admission = await ask(limiter, subjects)
            except LimitExceeded:
                await asyncio.sleep(0.001)
                continue
            times.append((granted_us(admission), CLOCK.monotonic()))
            admission.end(1)
            await asyncio.sleep(0)

    await asyncio.gather(*[client(limiter) for limiter in chosen for _ in range(clients)])
    return sorted(times)


def most_within(times: list[float], window: float) -> int:
    """The fullest rolling window."""
    start = most = 0
    for at, time in enumerate(times):
        while times[start] <= time - window:
            start += 1
        most = max(most, at - start + 1)
    return most


def per_minute(times: list[float], minute: float) -> list[int]:
    """Consecutive minutes from the first on, the last one left out: it was cut short."""
    counts: dict[int, int] = {}
    for time in times:
        counts[int((time - times[0]) // minute)] = counts.get(int((time - times[0]) // minute), 0) + 1
    return [counts.get(number, 0) for number in range(max(counts))]


@pytest.mark.parametrize("pinned", [False, True], ids=["spread", "pinned"])
async def test_a_low_limit_is_exact_over_four_processes(settings: Settings, pinned: bool) -> None:
    async with limiters(settings, 4, minute_s=1.2) as four:
        times = await saturate(four[:1] if pinned else four, key(requests_minute=60), 3.5 * 1.2)
    by_valkey = [float(us) for us, _ in times]
    assert most_within(by_valkey, 1.2e6) == 60
    assert per_minute(by_valkey, 1.2e6) == [60, 60, 60]


@pytest.mark.parametrize("pinned", [False, True], ids=["spread", "pinned"])
async def test_a_high_limit_is_never_over_and_at_most_five_percent_under(
    settings: Settings, pinned: bool
) -> None:
    limit, seconds = 2000, 3.6
    short = replace(settings, limit_block_s=MINUTE_S / 60)
    async with limiters(short, 4, minute_s=MINUTE_S) as four:
        chosen = four[:1] if pinned else four
        times = await saturate(chosen, key(requests_minute=limit), seconds)
        asked = sum(limiter._flights._number for limiter in chosen)
    ours = [time for _, time in sorted(times, key=lambda each: each[1])]
    assert most_within(ours, MINUTE_S) <= limit
    # Two whole windows begin within the time that was measured.
    assert len(ours) >= 2 * limit * 0.95
    assert asked < len(ours) / 2


async def test_a_request_is_admitted_when_its_refusal_said(settings: Settings) -> None:
    async with limiters(settings, 2, minute_s=1.5) as (one, other):
        subjects = key(requests_minute=3)
        for _ in range(3):
            await one.admit(subjects, 1)
        with pytest.raises(LimitExceeded) as refused:
            await other.admit(subjects, 1)
        assert refused.value.limit == "requests_minute"
        assert refused.value.retry_after_s == 2
        refusal = other._known[subjects[0].name].refusal
        assert refusal is not None
        await asyncio.sleep(refusal.free_at - CLOCK.monotonic() - 0.05)
        assert not await is_admitted(one, subjects)
        await asyncio.sleep(refusal.free_at - CLOCK.monotonic())
        assert await is_admitted(one, subjects)


async def test_a_token_window_says_when_that_very_request_fits(settings: Settings) -> None:
    async with limiters(settings, 1, minute_s=1.2) as (limiter,):
        subjects = key(tokens_minute=100)
        for _ in range(2):
            await limiter.admit(subjects, 40)
            await asyncio.sleep(0.3)
        assert await is_admitted(limiter, subjects, 20)
        with pytest.raises(LimitExceeded):
            await limiter.admit(subjects, 60)
        refusal = limiter._known[subjects[0].name].refusal
        assert refusal is not None
        await asyncio.sleep(refusal.free_at - CLOCK.monotonic())
        assert await is_admitted(limiter, subjects, 60)


async def test_a_saturated_client_costs_valkey_nothing_until_its_slot_comes(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        subjects = key(requests_minute=1)
        await limiter.admit(subjects, 1)
        assert not await is_admitted(limiter, subjects)
        flights = limiter._flights._number
        for _ in range(100):
            assert not await is_admitted(limiter, subjects)
        assert limiter._flights._number == flights


async def test_a_low_token_limit_still_admits_its_first_request(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        subjects = key(tokens_minute=10)
        first = await limiter.admit(subjects, 500)
        with pytest.raises(LimitExceeded) as refused:
            await limiter.admit(subjects, 1)
        assert refused.value.limit == "tokens_minute"
        first.end(500)


async def test_tokens_are_trued_up_when_a_request_ends(settings: Settings) -> None:
    async with limiters(settings, 2) as (one, other):
        subjects = key(tokens_minute=1000, tokens_day=5000)
        admission = await one.admit(subjects, 900)
        assert not await is_admitted(other, subjects, 800)
        admission.end(100)
        await eventually(lambda: not one._flights._corrections)
        await eventually(lambda: is_admitted(other, subjects, 800))
        late = await one.admit(subjects, 10)
        late.end(950)
        await eventually(lambda: not one._flights._corrections and one._flights._task.done())  # type: ignore[union-attr]
        assert not await is_admitted(one, subjects, 100)


async def test_what_one_subject_refuses_takes_nothing_from_the_other(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        (of_key,), (of_account,) = key(requests_minute=5), key(requests_minute=2)
        assert [await is_admitted(limiter, (of_key, of_account)) for _ in range(4)] == [
            True, True, False, False,
        ]  # fmt: skip
        limiter._known.clear()  # so that Valkey itself must refuse
        assert not await is_admitted(limiter, (of_key, of_account))
        assert [await is_admitted(limiter, (of_key,)) for _ in range(4)] == [True, True, True, False]


async def test_another_limit_holds_at_once_and_remembers_what_was_used(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        (before,) = key(requests_minute=3)
        assert [await is_admitted(limiter, (before,)) for _ in range(4)] == [True, True, True, False]
        raised = Subject("key", before.id, Limits(requests_minute=5))
        assert [await is_admitted(limiter, (raised,)) for _ in range(3)] == [True, True, False]
        high = Subject("key", before.id, Limits(requests_minute=601))
        assert sum([await is_admitted(limiter, (high,)) for _ in range(700)]) == 596
        assert not await is_admitted(limiter, (before,))


async def test_slots_are_shared_and_freed_at_once(settings: Settings) -> None:
    async with limiters(settings, 2) as (one, other):
        subjects = key(concurrency=2)
        held = [await one.admit(subjects, 1), await other.admit(subjects, 1)]
        with pytest.raises(LimitExceeded) as refused:
            await one.admit(subjects, 1)
        assert (refused.value.limit, refused.value.retry_after_s) == ("concurrency", 1)
        held[1].end(1)
        await eventually(lambda: is_admitted(one, subjects))


async def test_slots_never_drift_under_many_short_requests(settings: Settings, valkey: Redis) -> None:
    subjects = key(concurrency=5)
    running = most = 0

    async def client(limiter: Limiter) -> None:
        nonlocal running, most
        for _ in range(30):
            try:
                admission = await ask(limiter, subjects)
            except LimitExceeded:
                await asyncio.sleep(0.005)
                continue
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.001)
            running -= 1
            admission.end(1)

    async with limiters(settings, 3) as three:
        await asyncio.gather(*[client(limiter) for limiter in three for _ in range(5)])
        assert most == 5

        async def is_zero() -> bool:
            stored = await valkey.hgetall(f"limit:{subjects[0].name}:concurrency")
            return all(int(value) % 2**20 == 0 for value in stored.values())

        await eventually(is_zero)


async def test_a_high_concurrency_is_kept_without_a_call_a_request(settings: Settings) -> None:
    subjects = key(concurrency=200)
    held: list[Admission] = []
    async with limiters(settings, 2) as two:
        for limiter in itertools.islice(itertools.cycle(two), 400):
            try:
                held.append(await ask(limiter, subjects))
            except LimitExceeded:
                break
        assert 190 <= len(held) <= 200
        for admission in held:
            admission.end(1)
        flights = two[0]._flights._number
        for _ in range(300):
            (await ask(two[0], subjects)).end(1)
        assert two[0]._flights._number - flights < 100


async def test_slots_of_a_process_that_died_are_free_when_its_presence_ends(
    settings: Settings, valkey: Redis
) -> None:
    async with limiters(settings, 1) as (survivor,):
        subjects = key(concurrency=1)
        await valkey.set("alive:dead", 1)
        await valkey.hset(f"limit:{subjects[0].name}:concurrency", "dead", 1 << 20 | 1)
        assert not await is_admitted(survivor, subjects)
        await valkey.delete("alive:dead")
        await eventually(lambda: is_admitted(survivor, subjects))


async def test_a_client_that_leaves_while_it_waits_gives_its_slot_back(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        subjects = key(concurrency=1)
        for pause in (0, 1, 2, 3, 5, 8, 13):
            waiting = asyncio.create_task(limiter.admit(subjects, 1))
            for _ in range(pause):
                await asyncio.sleep(0)
            waiting.cancel()
            (found,) = await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(found, Admission):  # it was quicker
                found.end(0)
            await eventually(lambda: is_admitted(limiter, subjects))
        assert limiter._known[subjects[0].name].in_use == 0


async def test_keys_of_one_account_share_its_block(settings: Settings) -> None:
    async with limiters(settings, 1) as (limiter,):
        number = next(numbers)
        same = [(Subject("account", number, Limits(requests_minute=60_000)),) for _ in range(2)]
        while not limiter._blocks:
            (await ask(limiter, same[0])).end(1)
        assert all(limiter.try_admit(subjects, 1) is not None for subjects in same)


async def test_slots_of_a_process_count_before_it_first_said_that_it_lives(
    settings: Settings, valkey: Redis
) -> None:
    async with limiters(settings, 2) as (one, other):
        await valkey.flushall()
        subjects = key(concurrency=1)
        held = await one.admit(subjects, 1)
        assert not await is_admitted(other, subjects)
        held.end(1)


async def test_unused_parts_of_blocks_go_back(settings: Settings, valkey: Redis) -> None:
    async with limiters(replace(settings, limit_block_s=0.1), 1) as (limiter,):
        subjects = key(requests_minute=60_000, tokens_minute=6_000_000)
        used = 0
        while not limiter._blocks:
            (await ask(limiter, subjects, 10)).end(10)
            used += 1
        await eventually(lambda: not limiter._blocks and not limiter._flights._corrections)

        async def counted() -> tuple[int, int]:
            name = f"limit:{subjects[0].name}"
            return (
                int(await valkey.hget(f"{name}:requests_minute", "s") or 0),
                int(await valkey.hget(f"{name}:tokens_minute", "s") or 0),
            )

        async def is_exact() -> bool:
            return await counted() == (used, used * 10)

        await eventually(is_exact)


async def test_every_key_of_a_subject_expires(settings: Settings, valkey: Redis) -> None:
    async with limiters(settings, 1) as (limiter,):
        subjects = key(requests_minute=5, requests_day=9, tokens_minute=5, tokens_day=9, concurrency=2)
        await limiter.admit(subjects, 1)
        names = [name async for name in valkey.scan_iter(f"limit:{subjects[0].name}:*")]
        assert len(names) == 5
        for name in names:
            assert 0 < await valkey.ttl(name) <= 90_000


async def test_a_valkey_that_forgot_everything_is_asked_as_before(settings: Settings, valkey: Redis) -> None:
    async with limiters(settings, 1) as (limiter,):
        subjects = key(requests_minute=2, tokens_minute=50)
        assert await is_admitted(limiter, subjects)
        await valkey.flushall()
        await valkey.script_flush()
        assert [await is_admitted(limiter, subjects) for _ in range(3)] == [True, True, False]
        assert not limiter._flights.is_away


async def test_a_killed_valkey_stops_nobody_and_is_used_again(
    settings: Settings, private_stores: EmbeddedStores
) -> None:
    near = replace(settings, redis_url=private_stores.redis_url, valkey_timeout_s=0.25, valkey_retry_s=0.05)
    async with limiters(near, 2) as (one, other):
        subjects = key(requests_minute=8, concurrency=4)
        held = await one.admit(subjects, 1)
        kill(private_stores, "valkey")
        assert [await is_admitted(one, subjects) for _ in range(5)] == [True, True, True, True, False]
        assert one._flights.is_away
        private_stores.restart("valkey")
        await eventually(lambda: not one._flights.is_away)
        assert one._known[subjects[0].name].share is None
        await eventually(lambda: not one._flights._reports)
        assert not other._flights.is_away
        admissions = [await other.admit(subjects, 1) for _ in range(3)]
        with pytest.raises(LimitExceeded):
            await other.admit(subjects, 1)
        held.end(1)
        await eventually(lambda: is_admitted(other, subjects))
        for admission in admissions:
            admission.end(1)


async def test_a_frozen_valkey_costs_one_time_out_and_no_more(
    settings: Settings, private_stores: EmbeddedStores
) -> None:
    near = replace(settings, redis_url=private_stores.redis_url, valkey_timeout_s=0.2, valkey_retry_s=0.1)
    async with limiters(near, 1) as (limiter,):
        subjects = key(requests_minute=500, concurrency=50)
        await limiter.admit(subjects, 1)
        with frozen(private_stores, "valkey"):
            waited = 0
            counting: Callable[[], float] = asyncio.get_running_loop().time
            for _ in range(100):
                begun = counting()
                (await limiter.admit(subjects, 1)).end(1)
                waited += counting() - begun > 0.1
            assert waited <= 1
            assert limiter._flights.is_away
        await eventually(lambda: not limiter._flights.is_away)
        flights = limiter._flights._number
        assert await is_admitted(limiter, subjects)
        assert limiter._flights._number > flights
