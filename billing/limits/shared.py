"""The counters in Valkey: its scripts, how they are called, and what their answers mean.

Who asks for what and when is `flights`' and `limiter`'s; a failure is theirs to handle (VALKEY_AWAY).
"""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from redis.asyncio import Redis
from redis.exceptions import NoScriptError, RedisError

from billing.limits.rules import Plan

VALKEY_AWAY = (RedisError, OSError, TimeoutError)

PRESENCE_KEPT_S = 10
"""A process not heard of for this long is dead, and its slots are free: three refreshes, and one lost."""

PRESENCE_S = 3.0
"""How often a process says that it lives."""

_HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Script:
    """A Lua script, known to Valkey by its digest."""

    text: str
    sha: str


def load_script(name: str) -> Script:
    """A script of this package, with what all of them share before it."""
    text = (_HERE / "windows.lua").read_text() + (_HERE / f"{name}.lua").read_text()
    return Script(text, hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest())


ADMIT, SETTLE, SHOW = load_script("admit"), load_script("settle"), load_script("show")


@dataclass(slots=True)
class Call:
    """One run of a script."""

    script: Script
    keys: list[str]
    args: list[str | int]

    def command(self) -> tuple[str | int, ...]:
        return ("EVALSHA", self.script.sha, len(self.keys), *self.keys, *self.args)


class Found(NamedTuple):
    """What Valkey says of one window, or of a subject's slots."""

    used: int
    wait_us: int
    given: int
    reset_us: int


class Answer(NamedTuple):
    """What Valkey says of one request; `found` has a window or the slots of each subject in turn (`shape_of`)."""

    now_us: int
    is_admitted: bool
    found: list[Found]


def answer_of(reply: list[int]) -> Answer:
    return Answer(reply[0], reply[1] == 1, [Found(*reply[at : at + 4]) for at in range(2, len(reply), 4)])


def key_of(subject: str, limit: str) -> str:
    return f"limit:{subject}:{limit}"


def presence_key(incarnation_id: str) -> str:
    return f"alive:{incarnation_id}"


def add_records(
    call: Call,
    subject: str,
    plan: Plan,
    *,
    late_us: int,
    tokens: int,
    slots: int,
    extra: tuple[int, int, int],
) -> None:
    """One subject's records for admit.lua or show.lua; `extra` is the block of requests, tokens, slots that is wanted."""
    for window in plan.windows:
        call.keys.append(key_of(subject, window.name))
        kind = "t"
        if window.has_log:
            call.keys.append(key_of(subject, window.name + ":log"))
            kind = "l" if window.is_exact else "b"
        must, more = (1, extra[0]) if window.unit == "requests" else (tokens, extra[1])
        group = f"{subject}:{window.unit}"
        call.args += (kind, group, window.limit, must, more, window.length_us, late_us)
    if plan.concurrency is not None:
        call.keys.append(key_of(subject, "concurrency"))
        call.args += ("c", f"{subject}:slots", plan.concurrency, slots, extra[2], 0, 0)


async def read_use(
    valkey: Redis, subject: str, plan: Plan, *, late_us: int, timeout_s: float
) -> dict[str, int]:
    """What is used of each limit now, blocks in hand included. Raises one of VALKEY_AWAY."""
    call = Call(SHOW, [], ["", 0])
    add_records(call, subject, plan, late_us=late_us, tokens=0, slots=0, extra=(0, 0, 0))
    (used,) = await run_calls(valkey, [call], timeout_s)
    names = [window.name for window in plan.windows] + ["concurrency"]
    return dict(zip(names, used, strict=False))


async def run_calls(valkey: Redis, calls: Sequence[Call], timeout_s: float) -> list[Any]:
    """Answers in the order of `calls`, which are one round trip. Raises one of VALKEY_AWAY; then some may have run.

    A Valkey that was restarted knows no scripts: they are sent, and what failed for that is asked once more.
    """
    async with asyncio.timeout(timeout_s):
        replies = await _send(valkey, [call.command() for call in calls])
        unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
        if unknown:
            scripts = {calls[at].script.sha: calls[at].script for at in unknown}
            loads: list[tuple[str | int, ...]] = [("SCRIPT LOAD", script.text) for script in scripts.values()]
            again = await _send(valkey, loads + [calls[at].command() for at in unknown])
            for at, reply in zip(unknown, again[len(loads) :], strict=True):
                replies[at] = reply
    for reply in replies:
        if isinstance(reply, RedisError):
            raise reply
    return replies


async def _send(valkey: Redis, commands: list[tuple[str | int, ...]]) -> list[Any]:
    async with valkey.pipeline(transaction=False) as batch:
        for command in commands:
            batch.execute_command(*command)
        return list(await batch.execute(raise_on_error=False))
