"""The control websockets that end in this worker: load comes up from agents, commands and what is wanted go down.

What is wanted stands in PostgreSQL (`nodes.commands`), and the change feed says whose news there is, so a command reaches
an agent whichever worker it is connected to. Who may connect is decided in `gateway.api.provider.control_socket`.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import WSMsgType, web

from config.changes import EVERYTHING
from config.postgres import AWAY
from nodes.commands import Briefing, CommandStore
from nodes.control_messages import (
    FENCED,
    GOING_AWAY,
    LEASE_MESSAGE,
    NOT_UNDERSTOOD,
    REFUSED,
    Progress,
    read_loads,
    wanted_message,
)
from nodes.load import LoadShare
from nodes.protocol import BadMessage, Fields

log = logging.getLogger("poolgate.nodes")

LEASE_S = 5.0
"""An agent that is heard is told so this often, a fraction of any lease."""

RETRY_S = 1.0
"""Pause after PostgreSQL did not tell what an agent is to know."""

CLOSE_S = 2.0
CLOSE_BYTES_MAX = 120
"""A close frame has room for 123."""

KeyIsGood = Callable[[], Awaitable[bool]]


class Session:
    """One agent's websocket. `news` is set when its key may be no good any more, or, if a briefing `is_due` as well, when it
    may have to know more."""

    def __init__(
        self,
        socket: web.WebSocketResponse,
        node_id: str,
        instance: str,
        account_id: int,
        key_is_good: KeyIsGood,
    ) -> None:
        self.socket = socket
        self.node_id = node_id
        self.instance = instance
        self.account_id = account_id
        self.key_is_good = key_is_good
        self.news = asyncio.Event()
        self.is_due = False
        self.brief()
        self.wanted = ""
        self.sent: set[int] = set()
        self.lease_told_s = float("-inf")
        self.over: asyncio.Future[tuple[int, str]] = asyncio.get_running_loop().create_future()

    def brief(self) -> None:
        """Ask what its agent is to know."""
        self.is_due = True
        self.news.set()

    def end(self, code: int, why: str) -> None:
        """Close it, for the first reason that there is."""
        if not self.over.done():
            self.over.set_result((code, why))


class ControlHub:
    """All sessions of this worker, by node: a second one of a node takes the place of the first."""

    def __init__(self, commands: CommandStore, load: LoadShare) -> None:
        self._commands = commands
        self._load = load
        self._sessions: dict[str, Session] = {}
        self._is_closing = False

    def __len__(self) -> int:
        return len(self._sessions)

    def node_news(self, entity: str) -> None:
        """For the change feed, kind `node_command`: a node, or EVERYTHING."""
        for node_id in self._sessions if entity == EVERYTHING else {entity} & self._sessions.keys():
            self._sessions[node_id].brief()

    def account_news(self, entity: str) -> None:
        """For the change feed: an account, or EVERYTHING."""
        for session in self._sessions.values():
            if entity in (EVERYTHING, str(session.account_id)):
                session.brief()

    def key_news(self, _entity: str) -> None:
        """For the change feed: a key, which is known by its digest, so all are looked at; the keyring has them in memory."""
        for session in self._sessions.values():
            session.news.set()

    async def serve(self, session: Session) -> None:
        """Until the agent leaves, another one takes its place, or it may not stay."""
        if self._is_closing:
            await _close(session.socket, GOING_AWAY, "the gateway worker ends")
            return
        before = self._sessions.get(session.node_id)
        self._sessions[session.node_id] = session
        if before is not None:
            before.brief()
        log.info(
            "node %s is connected",
            session.node_id,
            extra={"action": "control_opened", "node": session.node_id},
        )
        parts = [asyncio.create_task(self._tell(session)), asyncio.create_task(self._hear(session))]
        any_of: set[asyncio.Future[Any]] = {*parts, session.over}
        try:
            await asyncio.wait(any_of, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for part in parts:
                part.cancel()
            ends = await asyncio.gather(*parts, return_exceptions=True)
            if self._sessions.get(session.node_id) is session:
                del self._sessions[session.node_id]
        if session.over.done():
            await _close(session.socket, *session.over.result())
        for end in ends:
            if isinstance(end, Exception) and not isinstance(end, ConnectionError):
                raise end

    def close(self) -> None:
        """The worker ends: agents connect to another one, also those that come over a connection which they still have."""
        self._is_closing = True
        for session in self._sessions.values():
            session.end(GOING_AWAY, "the gateway worker ends")

    # --- down -----------------------------------------------------------------------------------------------------

    async def _tell(self, session: Session) -> None:
        while True:
            await session.news.wait()
            session.news.clear()
            try:
                if not await self._tell_news(session):
                    return
            except AWAY:
                await asyncio.sleep(RETRY_S)
                session.brief()

    async def _tell_news(self, session: Session) -> bool:
        """False once the session is over."""
        if self._sessions.get(session.node_id) is not session:
            session.end(GOING_AWAY, "connected anew")
            return False
        if not await session.key_is_good():
            session.end(REFUSED, "this key is not valid any more")
            return False
        if not session.is_due:
            return True
        session.is_due = False
        briefing = await self._commands.briefing(session.node_id)
        if briefing is None or not briefing.is_approved:
            session.end(REFUSED, "this key may not act for this node")
            return False
        if briefing.instance not in ("", session.instance):
            session.end(FENCED, "another agent has taken this node")
            return False
        for message in news_of(session, briefing):
            await session.socket.send_json(message)
        return True

    # --- up -------------------------------------------------------------------------------------------------------

    async def _hear(self, session: Session) -> None:
        async for message in session.socket:
            if message.type is not WSMsgType.TEXT:
                break
            try:
                await self._take(session, json.loads(message.data))
            except (ValueError, BadMessage, RecursionError) as error:
                session.end(NOT_UNDERSTOOD, f"not understood: {error}")
                return

    async def _take(self, session: Session, message: object) -> None:
        kind = Fields(message, "").text("type")
        if kind == "load":
            self._load.report(
                {
                    f"{session.node_id}/{engine}": load.to_json()
                    for engine, load in read_loads(message).items()
                }
            )
            await self._renew(session)
        elif kind == "progress":
            report = Progress.from_json(message)
            with contextlib.suppress(*AWAY):  # its next report, or the heartbeat, brings it
                await self._commands.progress(session.node_id, (report,))
            if report.has_ended:
                session.sent.discard(report.id)
                session.brief()

    async def _renew(self, session: Session) -> None:
        now_s = asyncio.get_running_loop().time()
        if now_s - session.lease_told_s >= LEASE_S:
            session.lease_told_s = now_s
            await session.socket.send_json(dict(LEASE_MESSAGE))


def news_of(session: Session, briefing: Briefing) -> list[Mapping[str, Any]]:
    """What of a briefing the session's agent was not told yet; it counts as told from now on."""
    messages: list[Mapping[str, Any]] = []
    if briefing.wanted != session.wanted:
        session.wanted = briefing.wanted
        messages.append(wanted_message(briefing.wanted))
    messages += [command.to_json() for command in briefing.commands if command.id not in session.sent]
    session.sent = {command.id for command in briefing.commands}
    return messages


async def _close(socket: web.WebSocketResponse, code: int, why: str) -> None:
    """An agent that does not answer the close is left to itself."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(CLOSE_S):
            await socket.close(code=code, message=why.encode()[:CLOSE_BYTES_MAX])
