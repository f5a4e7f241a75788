"""The edge beside plain aiohttp: the same odd bytes to both, and every difference has its reason here.

Both serve one gateway, over transports in memory. Compared are the statuses of all answers, whether the connection is open
afterwards, and the shape of each body. An unexplained difference fails, and so does an explanation that no longer happens.
"""

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest

from gateway.identity.keyring import Principal
from tests.fuzz.edge import QUIET_TURNS, Answers, Transport
from tests.fuzz.inputs import REQUESTS, TOKENS, mutated
from tests.gateways import TestGateway, running_gateway
from tests.wires import ASK, PATH, chat, get, request

SEED = 4
MUTANTS = 1500
UNKNOWN = ASK | {"model": "no-such"}

Explains = Callable[[bytes, "Seen", "Seen"], bool]


@dataclass(frozen=True, slots=True)
class Seen:
    """What came back."""

    answers: tuple[tuple[int, str], ...]
    is_closed: bool

    @property
    def statuses(self) -> list[int]:
        return [status for status, _ in self.answers]


def _is_forgotten(_raw: bytes, edge: Seen, other: Seen) -> bool:
    return (
        other.statuses == [400] and edge.statuses[-1:] == [400] and len(edge.answers) > 1 and edge.is_closed
    )


def _is_behind_the_last(_raw: bytes, edge: Seen, other: Seen) -> bool:
    return other.statuses == [400] and len(edge.answers) == 1 and edge.is_closed and edge.statuses != [400]


def _is_behind_an_upgrade(raw: bytes, edge: Seen, other: Seen) -> bool:
    before = edge.answers[: len(other.answers)]
    return b"pgrade" in raw and before == other.answers and len(edge.answers) > len(before)


EXPLAINED: dict[str, Explains] = {
    "aiohttp forgets the requests that came in one read with what is no HTTP; the edge answers them first": _is_forgotten,
    "what stands behind a request that is to be the last one is an error in aiohttp; the edge answers and closes": (
        _is_behind_the_last
    ),
    "what stands behind an upgrade that is not offered is lost in aiohttp; the edge goes on": _is_behind_an_upgrade,
}
"""Differences, by their reason."""


@pytest.fixture
async def gw(settings, pool, monkeypatch) -> AsyncIterator[TestGateway]:
    """One whose keys are in memory, the unknown ones too, so that nothing waits for a store."""
    async with running_gateway(settings, pool) as running:
        keyring = running.gateway.door.turns.keyring
        principal = await keyring.load(running.key)
        digest = keyring.digest_of(running.key)

        async def find(asked: bytes) -> Principal | None:
            return principal if asked == digest else None

        monkeypatch.setattr(keyring._store, "find", find)
        yield running


def shape(body: bytes) -> str:
    """Of which kind a body is."""
    try:
        found = json.loads(body)
    except ValueError:
        return "text" if body else "empty"
    if isinstance(found, dict) and isinstance(found.get("error"), dict):
        return str(found["error"].get("code"))
    return "error" if isinstance(found, dict) and "error" in found else "json"


async def seen(protocol: Any, raw: bytes) -> Seen:
    """Everything that `raw` brings about."""
    client = Transport(protocol)
    protocol.connection_made(client)
    client.send(raw)
    quiet, before = 0, -1
    while quiet < 2 * QUIET_TURNS:
        await asyncio.sleep(0)
        now = len(client.sent) + client.is_lost
        quiet, before = (quiet + 1 if now == before else 0), now
    is_closed = client.is_closing()
    client.lose(None)
    answers = Answers(bytes(client.sent))
    told = zip(answers.statuses, map(shape, answers.bodies), strict=True)
    return Seen(tuple((status, kind) for status, kind in told if status >= 200), is_closed)


def table(gw: TestGateway) -> list[bytes]:
    """Requests with one odd thing each, and a plain one behind."""
    body = json.dumps(UNKNOWN).encode()
    odd_fields = [token.removesuffix(b"\r\n") for token in TOKENS if b":" in token and len(token) < 60]
    numbers = [
        b"",
        b"0",
        b"00",
        b"+5",
        b"-1",
        b"0x5",
        b"5,5",
        b"5 ",
        b"\t5",
        b"9" * 15,
        b"9" * 20,
        b"5\r\nContent-Length: 5",
    ]
    targets = [
        PATH.encode(),
        b"*",
        b"/",
        b"http://x/v1/models",
        b"//",
        b"/v1/%63hat/completions",
        b"/a b",
        b"",
        b"/#",
        b"/a?b",
    ]
    lines = [
        b"%b %b %b" % (method, target, version)
        for method in (b"POST", b"GET", b"post", b"OPTIONS", b"TRACE", b"BREW", b"P OST")
        for target in targets
        for version in (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/1.2", b"http/1.1", b"")
    ]
    plain = chat(gw, UNKNOWN)
    hosts = [b"host:", b"host:  ", b"Host:x", b"HOST\t:x", b"x: y", b"host: a\r\nhost: a"]
    characters = [b"\0", b"\n", b"\r", b" ", b"\t", b"\xff"]
    kinds = [
        "application/json; charset=latin-1",
        "APPLICATION/JSON",
        "text/plain",
        "application/json;x=y",
        "",
        "a",
    ]
    return [
        *REQUESTS,
        *(plain.replace(b"host: x", b"host: x\r\n" + odd) for odd in odd_fields),
        *(plain.replace(b"host: x", odd) for odd in hosts),
        *(plain.replace(b"content-length: %d" % len(body), b"content-length: " + number) for number in numbers),
        *(line + plain[plain.index(b"\r\n") :] for line in lines),
        *(plain.replace(b"application/json", kind.encode()) for kind in kinds),
        *(plain[:at] + odd + plain[at:] for at in (0, 4, 5, 26, 30, 36, 39, 42, 43, 60) for odd in characters),
        *(request(gw, body, f"content-encoding: {kind}") for kind in ("identity", "Identity", "gzip", "")),
        *(request(gw, piece) for piece in (b"", b"{", b"null", b"\xff", b'{"model": 1}', b" " * 3000)),
    ]  # fmt: skip


async def differences(gw: TestGateway, inputs: list[bytes]) -> list[tuple[bytes, Seen, Seen]]:
    door = gw.gateway.door
    found = []
    for raw in inputs:
        edge, other = await seen(door(), raw), await seen(door.handler(), raw)
        if edge != other:
            found.append((raw, edge, other))
    return found


async def test_the_edge_differs_from_aiohttp_in_what_is_explained_and_in_nothing_else(gw):
    behind = get("/v1/nope")
    odd = table(gw)
    rng = random.Random(SEED)
    bases = [*odd, *REQUESTS, chat(gw, UNKNOWN), chat(gw, UNKNOWN), request(gw, b"{")]
    inputs = [raw + behind for raw in odd] + [
        mutated(rng.choice(bases), rng) + behind for _ in range(MUTANTS)
    ]
    inputs = [raw for raw in inputs if b"HEAD " not in raw]
    unexplained, used = [], set()
    for raw, edge, other in await differences(gw, inputs):
        reasons = {reason for reason, explains in EXPLAINED.items() if explains(raw, edge, other)}
        used |= reasons
        if not reasons:
            unexplained.append(f"{raw!r}\n  edge    {edge}\n  aiohttp {other}")
    assert len(odd) > 400
    assert not unexplained, f"{len(unexplained)} of {len(inputs)}:\n" + "\n".join(unexplained[:8])
    assert used == EXPLAINED.keys(), "an explanation of what no longer happens"
