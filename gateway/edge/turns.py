"""Inference straight off the connection: what the edge does with a plain request for a turn.

Where memory knows the key, can admit the turn and has a connection to an engine at hand, the turn is sent off here and comes
back through callbacks. Where something has to be waited for, a task does that, until the turn is under way.
"""

import asyncio
import logging
from collections.abc import Callable, Coroutine, Mapping
from typing import Any, Protocol

from config.defaults import Settings
from config.metrics import Metrics
from gateway.api.credentials import NO_KEY, check_scope, key_in, principal_of
from gateway.api.inference import SCOPE, AskOf, log_crash
from gateway.edge.head import Head
from gateway.edge.refusals import refusal
from gateway.errors import ApiError, InvalidApiKey
from gateway.flight import Flight
from gateway.idempotent import KeyedTurns, key_of
from gateway.identity.keyring import KeyRing, Principal
from gateway.lifecycle import Lifecycle
from gateway.relay.downstream import ClientConnection, ClientGone, HttpDownstream
from gateway.turn import Ask, Turn, new_request_id

log = logging.getLogger("poolgate.edge")


class Connection(ClientConnection, Protocol):
    """The client's connection, which is told when its turn is over."""

    def answered(self, turn: "EdgeTurn", *, keep_alive: bool) -> None:
        """The answer was sent, or broke off; another request may come only with `keep_alive`."""
        ...

    def key_refused(self, head: Head) -> None:
        """The request with this head came without a valid key."""
        ...


class EdgeTurns:
    """Begins turns. `routes` decodes the body of each path that it serves."""

    def __init__(
        self, settings: Settings, *, routes: Mapping[bytes, AskOf], keyring: KeyRing, lifecycle: Lifecycle,
        keyed_turns: KeyedTurns, metrics: Metrics,
    ) -> None:  # fmt: skip
        self.settings = settings
        self.routes = routes
        self.keyring = keyring
        self.lifecycle = lifecycle
        self.keyed_turns = keyed_turns
        self.metrics = metrics
        self.is_draining = False
        self.stall_s = settings.client_stall_s

    def begun(self, connection: Connection, head: Head) -> "EdgeTurn":
        """One request's turn, to be begun with its body."""
        return EdgeTurn(self, connection, head)

    def knows(self, head: Head) -> bool:
        """Whether memory knows the key of a request."""
        secret = self.secret_of(head)
        return secret is not None and self.keyring.lookup(secret) is not None

    def drain(self) -> None:
        """From now on each answer asks its client to go elsewhere."""
        self.is_draining = True

    def secret_of(self, head: Head) -> str | None:
        """The key that a request presents."""
        fields = head.all_fields()

        def header(name: str) -> str | None:
            value = fields.get(name.encode())
            return None if value is None else value.decode("utf-8", "surrogateescape")

        return key_in(header)


class EdgeTurn(HttpDownstream):
    """One request of a connection, and its answer's way. `begin` it; `connection.answered` is told when that is done."""

    __slots__ = ("_edge", "_flight", "_head", "_task", "_turn", "_turns", "request_id")

    def __init__(self, turns: EdgeTurns, connection: Connection, head: Head) -> None:
        super().__init__(
            connection, is_http_11=head.is_http_11, keep_alive=head.keep_alive and not turns.is_draining,
            stall_s=turns.stall_s, own_lines=head.own_lines,
        )  # fmt: skip
        self._turns = turns
        self._edge: Connection = connection
        self._head = head
        self._flight: Flight | None = None
        self._task: asyncio.Task[None] | None = None
        self._turn: Turn | None = None
        self.request_id = new_request_id()

    def begin(self, body: bytes) -> None:
        """Answer it as far as memory goes, and in a task where it does not; perhaps before this returns."""
        turns = self._turns
        try:
            principal = self._known()
            if principal is None or self._head.is_keyed:
                self._go_on(self._from_the_key, body)
                return
            check_scope(principal, SCOPE)
            ask: Ask = self._head.for_(body, turns.settings)
            ask.hints = self._head.hints
            turn = self._turn = turns.lifecycle.try_admit(ask, principal, self.request_id)
            if turn is None:
                self._go_on(turns.lifecycle.send_off, ask, principal, self.request_id, self, self._landed)
                return
            self._flight = turns.lifecycle.launch(turn, self, self._landed)
            if self._flight is None:
                self._go_on(turns.lifecycle.carry, turn, self, None, self._landed)
        except ApiError as error:
            self._refuse(error)
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            self._crash(error)

    def end_keep_alive(self) -> None:
        """The worker ends: if the answer has not begun it says so."""
        if not self.is_started:
            self.keep_alive = False

    def leave(self) -> None:
        """The client left."""
        if self._task is not None:
            self._task.cancel()
        elif self._turn is not None:
            flight, self._flight = self._flight, None
            self._turns.lifecycle.leave(self._turn, flight)

    def _known(self) -> Principal | None:
        """Whose key it is, if that is remembered. Raises InvalidApiKey where there is none."""
        head, keyring = self._head, self._turns.keyring
        if not head.digest:
            secret = self._turns.secret_of(head)
            if secret is None:
                raise InvalidApiKey(NO_KEY)
            head.digest = keyring.digest_of(secret)
        return keyring.known(head.digest)

    def _landed(self, flight: Flight) -> None:
        """The flight is over: by an answer, or to go on from its error."""
        self._flight = None
        if flight.error is None:
            self._edge.answered(self, keep_alive=self.keep_alive)
        else:
            self._go_on(self._turns.lifecycle.carry, flight.turn, self, flight, self._landed)

    # --- in a task ------------------------------------------------------------------------------------------------

    def _go_on(self, work: Callable[..., Coroutine[Any, Any, Flight | None]], *given: Any) -> None:
        self._task = asyncio.get_running_loop().create_task(self._carry_out(work, *given), name="turn")
        self._task.add_done_callback(self._ended)

    async def _carry_out(self, work: Callable[..., Coroutine[Any, Any, Flight | None]], *given: Any) -> None:
        """`work` until the turn is under way or over, and what became of it told to the client and its connection."""
        keep_alive = False
        try:
            flight = await work(*given)
            if flight is not None:
                self._flight, self._turn, self._task = flight, flight.turn, None
                return
            keep_alive = self.keep_alive
        except ClientGone:
            pass
        except ApiError as error:
            self._refuse(error)
            return
        except Exception as error:  # noqa: BLE001 - whatever it is, the client gets an answer
            self._crash(error)
            return
        self._edge.answered(self, keep_alive=keep_alive)

    def _ended(self, task: "asyncio.Task[None]") -> None:
        """A task that was cancelled before it began has settled nothing."""
        if task.cancelled():
            if self._turn is not None:
                self._turns.lifecycle.leave(self._turn, None)
        elif (error := task.exception()) is not None:
            log.error("a request escaped its task", exc_info=error, extra={
                "action": "request_crashed", "request_id": self.request_id,
            })  # fmt: skip

    async def _from_the_key(self, body: bytes) -> Flight | None:
        """From the look-up of the key on, and with an Idempotency-Key."""
        turns, head = self._turns, self._head
        secret = turns.secret_of(head)
        assert secret is not None
        principal = await principal_of(turns.keyring, secret, SCOPE)
        field = head.all_fields().get(b"idempotency-key") if head.is_keyed else None
        key = key_of(None if field is None else field.decode("latin-1"))
        ask: Ask = head.for_(body, turns.settings)
        ask.hints = head.hints
        if key is None:
            return await turns.lifecycle.send_off(ask, principal, self.request_id, self, self._landed)
        request_hash = turns.keyed_turns.request_hash("POST", head.target.decode("ascii"), body)
        await turns.keyed_turns.run(ask, principal, self.request_id, self, key=key, request_hash=request_hash)
        return None

    # --- saying no ------------------------------------------------------------------------------------------------

    def _refuse(self, error: ApiError) -> None:
        if isinstance(error, InvalidApiKey):
            self._edge.key_refused(self._head)
        status, headers, body = refusal(error, "openai", self.request_id, self._turns.metrics)
        self.answer(status, headers, body)
        self._edge.answered(self, keep_alive=self.keep_alive)

    def _crash(self, error: Exception) -> None:
        """A fault of ours, in the log with its cause and told without."""
        if self.is_started:
            log_crash(self.request_id, error)
            self._edge.answered(self, keep_alive=False)
            return
        path = self._head.target.decode("ascii")
        extra = {"action": "request_crashed", "request_id": self.request_id, "path": path}
        log.error("a request failed inside poolgate", exc_info=error, extra=extra)
        self._refuse(ApiError())
