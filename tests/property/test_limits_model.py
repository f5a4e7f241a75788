"""The scripts that count limits in Valkey, held against a plain model over random interleavings.

Two processes ask for two subjects, with and without blocks, correct what they took and free slots. Time is Valkey's own:
the model is given the moment that each answer carries.
"""

import asyncio
from dataclasses import dataclass, field

import uvloop
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redis.asyncio import Redis

from billing.limits.rules import Limits, Plan, Window, plan_of
from billing.limits.shared import (
    ADMIT,
    SETTLE,
    Answer,
    Call,
    Found,
    add_records,
    answer_of,
    key_of,
    run_calls,
)
from config.valkey import open_valkey

MINUTE_S, LATE_US = 0.06, 5_000  # a window is as long as some twenty calls
PROCESSES = ("one", "two")

small = st.integers(1, 6)
limits = st.builds(
    Limits,
    requests_minute=st.none() | small,
    requests_day=st.none() | st.integers(3, 40),
    tokens_minute=st.none() | st.integers(1, 60),
    concurrency=st.none() | st.integers(1, 3),
)
admits = st.tuples(
    st.just("admit"), st.sampled_from(PROCESSES), st.sampled_from([(0,), (1,), (0, 1)]), st.integers(0, 40),
    st.tuples(st.integers(0, 3), st.integers(0, 30), st.integers(0, 2)),
)  # fmt: skip
ends = st.tuples(st.just("end"), st.integers(0, 30), st.integers(-40, 20))
pauses = st.tuples(st.just("pause"), st.sampled_from([0.0, 0.002, 0.02, 0.058, 0.062]))
steps = st.lists(st.one_of(admits, admits, ends, pauses), min_size=5, max_size=40)


@dataclass
class Counted:
    """One window: what was taken when, and when each of that stops to count."""

    window: Window
    entries: list[list[int]] = field(default_factory=list)  # until, amount, taken at

    def used(self, now: int) -> int:
        self.entries = [entry for entry in self.entries if entry[0] > now]
        return sum(entry[1] for entry in self.entries)

    def add(self, now: int, amount: int) -> None:
        wide = self.window.length_us // 60
        until = now + self.window.length_us
        if not self.window.is_exact:
            until = (now // wide + 1) * wide + self.window.length_us + LATE_US
        self.entries.append([until, amount, now])

    def give_back(self, taken_at: int, amount: int) -> None:
        """To whatever was taken in the same bucket."""
        wide = self.window.length_us // 60
        for entry in self.entries:
            if entry[2] // wide == taken_at // wide:
                less = min(amount, entry[1])
                entry[1] -= less
                amount -= less

    def wait(self, now: int, must: int) -> int:
        used = self.used(now)
        if not used or used + must <= self.window.limit:
            return 0
        needed = min(used, used + must - self.window.limit)
        for until, amount, _ in sorted(self.entries):
            needed -= amount
            if needed <= 0:
                return until - now
        raise AssertionError("all that is used stops to count some time")


@dataclass
class Modelled:
    """One subject."""

    plan: Plan
    windows: list[Counted]
    slots: dict[str, int] = field(default_factory=dict)

    def expect(self, now: int, tokens: int, process: str) -> list[tuple[int, int]]:
        """Used and wait of each record."""
        found = [
            (each.used(now), each.wait(now, 1 if each.window.unit == "requests" else tokens))
            for each in self.windows
        ]
        if self.plan.concurrency is not None:
            used = sum(self.slots.values())
            found.append((used, int(used + 1 > self.plan.concurrency)))
        return found

    def take(
        self, now: int, tokens: int, process: str, block: tuple[int, int, int], found: list[Found]
    ) -> None:
        for unit, must, more in (("requests", 1, block[0]), ("tokens", tokens, block[1])):
            those = [each for each in self.windows if each.window.unit == unit]
            rooms = [each.window.limit - each.used(now) - must for each in those]
            given = max(0, min([more, *rooms]))
            for each in those:
                extra = 0 if each.window.is_exact else given
                assert found[self.windows.index(each)].given == extra
                each.add(now, must + extra)
        if self.plan.concurrency is not None:
            room = self.plan.concurrency - sum(self.slots.values()) - 1
            self.slots[process] = self.slots.get(process, 0) + 1 + max(0, min(block[2], room))
            assert found[-1].given == self.slots[process]


class Run:
    """One example: the scripts and the model side by side."""

    def __init__(self, valkey: Redis, plans: list[Plan]) -> None:
        self.valkey = valkey
        self.plans = plans
        self.models = [Modelled(plan, [Counted(window) for window in plan.windows]) for plan in plans]
        self.flight = 0
        self.admitted: list[tuple[str, tuple[int, ...], int]] = []  # process, subjects, time

    async def admit(
        self, process: str, chosen: tuple[int, ...], tokens: int, block: tuple[int, int, int]
    ) -> None:
        self.flight += 1
        call = Call(ADMIT, [], [process, self.flight])
        for number in chosen:
            own = self.models[number].slots.get(process, 0)
            add_records(
                call, f"key:{number}", self.plans[number], late_us=LATE_US, tokens=tokens, slots=own, extra=block
            )  # fmt: skip
        answer = answer_of((await run_calls(self.valkey, [call], 10.0))[0])
        self.check(process, chosen, tokens, block, answer)

    def check(
        self, process: str, chosen: tuple[int, ...], tokens: int, block: tuple[int, int, int], answer: Answer
    ) -> None:
        at, now = 0, answer.now_us
        slices = []
        expected = []
        for number in chosen:
            size = len(self.plans[number].windows) + (self.plans[number].concurrency is not None)
            slices.append(answer.found[at : at + size])
            expected.append(self.models[number].expect(now, tokens, process))
            at += size
        is_admitted = all(not wait for each in expected for _, wait in each)
        assert answer.is_admitted is is_admitted
        for found, wanted in zip(slices, expected, strict=True):
            assert [each.wait_us for each in found] == [wait for _, wait in wanted]
        if not is_admitted:
            for found, wanted in zip(slices, expected, strict=True):
                assert [each.used for each in found] == [used for used, _ in wanted]
            return
        for number, found in zip(chosen, slices, strict=True):
            self.models[number].take(now, tokens, process, block, found)
        self.admitted.append((process, chosen, now))

    async def end(self, which: int, correction: int) -> None:
        if not self.admitted:
            return
        process, chosen, taken_at = self.admitted.pop(which % len(self.admitted))
        self.flight += 1
        call = Call(SETTLE, [], [process, self.flight])
        for number in chosen:
            for window in self.plans[number].windows:
                if window.unit == "tokens" and correction < 0:
                    call.keys.append(key_of(f"key:{number}", window.name))
                    call.args += ["t", correction, taken_at, window.length_us, LATE_US]
            if self.plans[number].concurrency is not None:
                slots = self.models[number].slots
                slots[process] = max(0, slots[process] - 1)
                call.keys.append(key_of(f"key:{number}", "concurrency"))
                call.args += ["c", slots[process], 0, 0, 0]
        if not call.keys:
            return
        await run_calls(self.valkey, [call], 10.0)
        for number in chosen:
            for each in self.models[number].windows:
                if each.window.unit == "tokens" and correction < 0:
                    each.give_back(taken_at, -correction)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(limits, limits, steps)
def test_every_answer_is_the_models(stores, one, two, taken) -> None:  # type: ignore[no-untyped-def]
    async def example() -> None:
        async with open_valkey(stores.redis_url, timeout_s=10.0) as valkey:
            await valkey.flushdb()
            for process in PROCESSES:
                await valkey.set(f"alive:{process}", 1)
            run = Run(valkey, [plan_of(each, 4, MINUTE_S, 3600.0) for each in (one, two)])
            for step in taken:
                if step[0] == "admit":
                    await run.admit(*step[1:])
                elif step[0] == "end":
                    await run.end(*step[1:])
                else:
                    await asyncio.sleep(step[1])

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(example())
