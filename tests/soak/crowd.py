"""Clients that ask again and again while something is killed, half of them for streams; every answer is kept in a tally.

It says what clients saw; whether that was right is each soak's to say.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from bench.load import Answer, Client, Job, request_bytes
from bench.processes import MODEL

GIVE_UP_S = 40.0
"""Past every bound of the gateway that these soaks set: a client that waits so long was left hanging."""

TOKENS = 24
APART_S = 0.006
"""Clients start one after the other, over the time of a turn: in step they would all be between turns at once."""


@dataclass(slots=True)
class Crowd:
    """What happened so far. `failures` are answers that were not whole."""

    verdicts: Counter[str] = field(default_factory=Counter)
    failures: list[tuple[bool, Answer]] = field(default_factory=list)
    cut_tokens: int = 0
    refused_connections: int = 0
    is_over: bool = False

    @property
    def turns(self) -> int:
        return sum(self.verdicts.values())

    def note(self, wants_stream: bool, answer: Answer) -> None:
        verdict = answer.verdict
        self.verdicts[verdict] += 1
        if verdict != "whole":
            self.failures.append((wants_stream, answer))
        if verdict == "error_event":
            self.cut_tokens += answer.events - 1  # the first event has no token
        if verdict == "whole" and wants_stream:
            assert answer.events == TOKENS + 1, answer

    def told(self) -> str:
        """What was seen, and one failure of each kind, for people."""
        kinds = {
            f"{'stream' if wants_stream else 'whole'} {answer.verdict} {answer.status} after"
            f" {answer.seconds:.2f} s, {answer.events} events: {answer.body[-200:]!r}": answer.verdict
            for wants_stream, answer in self.failures
        }
        shown = {verdict: words for words, verdict in kinds.items()}
        return "\n".join((str(dict(self.verdicts)), *shown.values()))


@asynccontextmanager
async def crowd(url: str, key: str, clients: int, *, may_refuse: bool = False) -> AsyncIterator[Crowd]:
    """`clients` ask until the block ends; the last answers are in when this returns.

    Like any HTTP client they ask on a kept connection unless they know that it was closed, and never send a request twice.
    With `may_refuse` a client ends when it can't connect, which is counted apart.
    """
    host, port = url.removeprefix("http://").split(":")
    seen = Crowd()

    async def ask(number: int) -> None:
        wants_stream = number % 2 == 0
        client = Client(host, int(port))
        request = request_bytes(Job(url, key=key, body=_body(stream=wants_stream)))
        await asyncio.sleep(APART_S * number)
        while not seen.is_over:
            answer = await client.ask(request, GIVE_UP_S)
            if may_refuse and not answer.local_port:
                seen.refused_connections += 1
                break
            seen.note(wants_stream, answer)
        client.close()

    async with asyncio.TaskGroup() as tasks:
        for number in range(clients):
            tasks.create_task(ask(number))
        try:
            yield seen
        finally:
            seen.is_over = True


def _body(*, stream: bool) -> dict[str, Any]:
    return {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Count."}],
        "stream": stream,
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
