"""Requests with an Idempotency-Key: run once, to their end whoever leaves, and answered again from what was kept.

Who has which key is `billing.idempotency`; what a turn is, `gateway.lifecycle`. Errors are no answers: a turn that was
refused gives its key back.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

import orjson

from billing.idempotency import (
    KEY_CHARS_MAX,
    Claimed,
    Conflict,
    IdempotencyStore,
    Lost,
    Repeat,
    Running,
    StoreUnavailable,
    Verdict,
)
from billing.limits.headers import NOTHING_TOLD, Told
from config.defaults import Settings
from gateway.errors import (
    ApiError,
    BadRequest,
    IdempotencyAnswerLost,
    IdempotencyKeyInUse,
    IdempotencyKeyReused,
    ModelNotFound,
    Unavailable,
)
from gateway.identity.keyring import Principal
from gateway.relay.downstream import ClientGone, Downstream
from gateway.turn import Ask, Turn

log = logging.getLogger("poolgate.turns")

HEADER = "Idempotency-Key"
REPLAYED = {"idempotent-replayed": "true"}
VISIBLE = re.compile(rf"[\x21-\x7e]{{1,{KEY_CHARS_MAX}}}")

RUNNING_RETRY_AFTER_S = 1
STORE_RETRY_AFTER_S = 1

NO_RETRY = {"x-should-retry": "false"}
"""OpenAI's SDKs retry each 409 unless they are told that it is in vain."""

REPLAY_BYTES = 64 * 2**10
"""A stream is given again in pieces of this, between which a slow client is waited for."""

OF_THE_MOMENT = "x-ratelimit-"
"""Headers that were true when the first answer was given, and are not kept with it."""

ANSWERED = frozenset({"finished", "timeout"})
"""Outcomes of turns that came to their end. Another one is an answer only as far as it was charged."""


class RunTurn(Protocol):
    """Lifecycle.run."""

    def __call__(
        self, ask: Ask, principal: Principal, request_id: str, down: Downstream, *, idempotency_key: str
    ) -> Awaitable[Turn]:
        """One whole turn. Raises ApiError only while nothing was sent, and has charged nothing then."""
        ...


def key_of(key: str | None) -> str | None:
    """What a request's HEADER says, if it has one. Raises BadRequest for a key that can't be used."""
    if key is not None and VISIBLE.fullmatch(key) is None:
        raise BadRequest(
            f"An {HEADER} has 1 to {KEY_CHARS_MAX} visible ASCII characters, and no spaces.",
            param=HEADER,
            code="invalid_idempotency_key",
        )
    return key


@dataclass(frozen=True, slots=True)
class Answer:
    """What a client got, byte for byte but for the framing of its connection."""

    status: int
    headers: dict[str, str]
    body: bytes
    is_stream: bool

    def packed(self) -> bytes:
        """One line of JSON, then the body."""
        return orjson.dumps((self.status, self.headers, self.is_stream)) + b"\n" + self.body

    @classmethod
    def unpacked(cls, data: bytes) -> "Answer":
        """What `packed` packed."""
        head, _, body = data.partition(b"\n")
        status, headers, is_stream = orjson.loads(head)
        return cls(status, headers, body, is_stream)

    async def give(self, down: Downstream) -> None:
        """Say it again. Raises ClientGone."""
        headers = self.headers | REPLAYED
        if not self.is_stream:
            down.answer(self.status, headers, self.body)
            return
        down.start(headers)
        for at in range(0, len(self.body), REPLAY_BYTES):
            down.write(self.body[at : at + REPLAY_BYTES])
            if down.is_full:
                await down.drained()
        down.finish()


class Collected:
    """Downstream that keeps what it hands on, and to the turn is a client that never leaves.

    While the client is there, it gets everything and may slow the turn down; when it is gone, the turn goes on at the
    engine's pace. What is more than `bytes_max` is handed on and not kept.
    """

    __slots__ = ("_bytes_max", "_client", "_headers", "_is_kept", "_is_stream", "_is_whole", "_parts", "_size",
                 "_status", "is_started")  # fmt: skip

    def __init__(self, client: Downstream, bytes_max: int) -> None:
        self._client: Downstream | None = client
        self._bytes_max = bytes_max
        self._status = 200
        self._headers: dict[str, str] = {}
        self._parts: list[bytes] = []
        self._size = 0
        self._is_stream = self._is_whole = False
        self._is_kept = True
        self.is_started = False

    def leave(self) -> None:
        """The client is gone: its connection may be another's by now."""
        self._client = None

    @property
    def has_client(self) -> bool:
        """Somebody reads."""
        return self._present is not None

    @property
    def is_gone(self) -> bool:
        return False

    @property
    def is_full(self) -> bool:
        client = self._present
        return client is not None and client.is_full

    @property
    def kept(self) -> Answer | None:
        """The whole answer; None if it did not end, or was too large."""
        if not (self._is_whole and self._is_kept):
            return None
        return Answer(self._status, self._headers, b"".join(self._parts), self._is_stream)

    def start(self, headers: dict[str, str], told: Told = NOTHING_TOLD) -> None:
        self.is_started = self._is_stream = True
        self._keep_head(200, {**headers, **told})
        if (client := self._present) is not None:
            client.start(headers, told)

    def write(self, data: bytes) -> None:
        self._keep(data)
        if (client := self._present) is not None:
            client.write(data)

    def finish(self, data: bytes = b"") -> None:
        self._keep(data)
        self._is_whole = True
        if (client := self._present) is not None:
            client.finish(data)

    def answer(self, status: int, headers: dict[str, str], body: bytes, told: Told = NOTHING_TOLD) -> None:
        self.is_started = self._is_whole = True
        self._keep_head(status, {**headers, **told})
        self._keep(body)
        if (client := self._present) is not None:
            client.answer(status, headers, body, told)

    async def drained(self) -> None:
        try:
            if (client := self._present) is not None:
                await client.drained()
        except ClientGone:
            self.leave()

    @property
    def _present(self) -> Downstream | None:
        if self._client is not None and self._client.is_gone:
            self._client = None
        return self._client

    def _keep_head(self, status: int, headers: Mapping[str, str]) -> None:
        self._status = status
        self._headers = {
            name: text for name, text in headers.items() if not name.lower().startswith(OF_THE_MOMENT)
        }

    def _keep(self, data: bytes) -> None:
        self._size += len(data)
        if self._size > self._bytes_max:
            self._is_kept = False
            self._parts.clear()
        elif data:
            self._parts.append(data)


class KeyedTurns:
    """Runs keyed requests, each in a task of its own, which its client's leaving does not end."""

    def __init__(
        self, store: IdempotencyStore, run_turn: RunTurn, settings: Settings, incarnation_id: UUID
    ) -> None:
        """`run_turn`: Lifecycle.run. `incarnation_id`: this process, in whose name keys are claimed."""
        self._store = store
        self._run_turn = run_turn
        self._settings = settings
        self._incarnation_id = incarnation_id
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"<KeyedTurns in_flight={self.in_flight}>"

    @property
    def in_flight(self) -> int:
        """Keyed requests that have not ended, those included whose client left; turns among them are the lifecycle's too."""
        return len(self._tasks)

    def request_hash(self, method: str, path: str, body: bytes) -> bytes:
        """What tells a repeat from another request."""
        return self._store.request_hash(method, path, body)

    async def run(
        self,
        ask: Ask,
        principal: Principal,
        request_id: str,
        down: Downstream,
        *,
        key: str,
        request_hash: bytes,
    ) -> None:
        """Answer one keyed request: by a turn, or by what the first one was answered.

        Cancelled (its client left), it leaves the turn running. Raises ApiError while nothing was sent, or ClientGone.
        """
        collected = Collected(down, self._settings.idempotency_bytes_max)
        task = asyncio.create_task(
            self._claimed(ask, principal, request_id, down, collected, key, request_hash), name="keyed turn"
        )
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            collected.leave()
            raise

    async def close(self, timeout_s: float) -> None:
        """Wait for what runs, for at most `timeout_s`: turns were ended by then, what they came to is being written.

        What began since is cancelled and waited for as long again: it settles what was delivered, and keeps no answer.
        """
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """Where the client left, nobody waits for the task: a refusal is nobody's news, and a crash was logged."""
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()

    async def _claimed(
        self, ask: Ask, principal: Principal, request_id: str, down: Downstream, collected: Collected,
        key: str, request_hash: bytes,
    ) -> None:  # fmt: skip
        account_id, turn_id = principal.account_id, UUID(request_id.removeprefix("req_"))
        try:
            verdict = await self._store.claim(account_id, key, request_hash, self._incarnation_id, turn_id)
        except StoreUnavailable as error:
            raise Unavailable(
                "Whether this Idempotency-Key was used can't be known right now. Nothing was charged. Try again shortly.",
                retry_after_s=STORE_RETRY_AFTER_S,
            ) from error
        if isinstance(verdict, Repeat):
            # Another key of the account may have had the answer.
            if principal.models is not None and ask.body["model"] not in principal.models:
                raise ModelNotFound(param="model")
            await Answer.unpacked(verdict.answer).give(down)
        elif not isinstance(verdict, Claimed):
            raise _refusal(verdict)
        else:
            await self._turn(ask, principal, request_id, collected, key, turn_id)

    async def _turn(
        self, ask: Ask, principal: Principal, request_id: str, collected: Collected, key: str, turn_id: UUID
    ) -> None:
        """The turn, and then what became of its claim. A turn that broke may have been charged: its key is not free."""
        store, account_id = self._store, principal.account_id
        try:
            turn = await self._run_turn(ask, principal, request_id, collected, idempotency_key=key)
        except ApiError:
            await store.release(account_id, key, turn_id)
            raise
        except BaseException as error:
            if (
                isinstance(error, Exception) and not collected.has_client
            ):  # else the request's handler says it
                log.exception(
                    "a turn failed inside poolgate",
                    extra={"action": "turn_crashed", "request_id": request_id},
                )
            await store.finish(account_id, key, turn_id, None)
            raise
        if turn.outcome not in ANSWERED and turn.amount_nano == 0:  # a stream that began, and brought nothing
            await store.release(account_id, key, turn_id)
            return
        answer = None if turn.outcome == "cut" else collected.kept
        await store.finish(account_id, key, turn_id, None if answer is None else answer.packed())


def _refusal(verdict: Verdict) -> ApiError:
    """Why a key that is not ours brings no answer."""
    if isinstance(verdict, Running):
        return IdempotencyKeyInUse(retry_after_s=RUNNING_RETRY_AFTER_S)
    if isinstance(verdict, Conflict):
        return IdempotencyKeyReused(headers=NO_RETRY)
    assert isinstance(verdict, Lost)
    return IdempotencyAnswerLost(headers=NO_RETRY)
