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
    REFUSED,
    Progress,
    read_loads,
    wanted_message,
)
from nodes.load import LoadShare
from nodes.protocol import BadMessage, Fields

log = logging.getLogger("poolgate.nodes")

LOAD_FLUSH_S = 0.25
"""Loads that came since are written to Valkey together: thousands of nodes cost four commands a second."""

LEASE_S = 5.0
"""An agent that is heard is told so this often, a fraction of any lease."""

RETRY_S = 1.0
"""Pause after PostgreSQL did not tell what an agent is to know."""

CLOSE_S = 2.0

MayStay = Callable[[], Awaitable[bool]]


class Session:
    """One agent's websocket. `news` is set when the agent may have to know more."""

    def __init__(self, socket: web.WebSocketResponse, node_id: str, instance: str, may_stay: MayStay) -> None:
        self.socket = socket
        self.node_id = node_id
        self.instance = instance
        self.may_stay = may_stay
        self.news = asyncio.Event()
        self.news.set()
        self.wanted = ""
        self.sent: set[int] = set()
        self.lease_told_s = float("-inf")


class ControlHub:
    """All sessions of this worker, by node: a second one of a node takes the place of the first."""

    def __init__(self, commands: CommandStore, load: LoadShare) -> None:
        self._commands = commands
        self._load = load
        self._sessions: dict[str, Session] = {}
        self._loads: dict[str, dict[str, Any]] = {}

    def __len__(self) -> int:
        return len(self._sessions)

    def node_news(self, entity: str) -> None:
        """For the change feed, kind `node_command`: a node, or EVERYTHING."""
        if entity == EVERYTHING:
            self.all_news()
        elif entity in self._sessions:
            self._sessions[entity].news.set()

    def all_news(self, _entity: str = "") -> None:
        """For the change feed, kinds `key` and `account`: whoever is connected may have lost the right to be."""
        for session in self._sessions.values():
            session.news.set()

    async def run(self) -> None:
        """Write what agents told of their load, until cancelled."""
        while True:
            await asyncio.sleep(LOAD_FLUSH_S)
            loads, self._loads = self._loads, {}
            if loads:
                await self._load.report(loads)

    async def serve(self, session: Session) -> None:
        """Until the agent leaves, another one takes its place, or it may not stay."""
        before = self._sessions.get(session.node_id)
        self._sessions[session.node_id] = session
        if before is not None:
            before.news.set()
        log.info(
            "node %s is connected",
            session.node_id,
            extra={"action": "control_opened", "node": session.node_id},
        )
        telling = asyncio.create_task(self._tell(session))
        try:
            await self._hear(session)
        finally:
            telling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await telling
            if self._sessions.get(session.node_id) is session:
                del self._sessions[session.node_id]

    async def close(self) -> None:
        """The worker ends: agents connect to another one."""
        sessions = list(self._sessions.values())
        await asyncio.gather(
            *(_close(session, GOING_AWAY, "the gateway worker ends") for session in sessions)
        )

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
                session.news.set()

    async def _tell_news(self, session: Session) -> bool:
        """False once the session is over."""
        if self._sessions.get(session.node_id) is not session:
            await _close(session, GOING_AWAY, "connected anew")
            return False
        briefing = await self._commands.briefing(session.node_id)
        if briefing is None or not await session.may_stay():
            await _close(session, REFUSED, "this key may not act for this node")
            return False
        if briefing.instance not in ("", session.instance):
            await _close(session, FENCED, "another agent has taken this node")
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
                await _close(session, 4400, f"not understood: {error}")
                return

    async def _take(self, session: Session, message: object) -> None:
        kind = Fields(message, "").text("type")
        if kind == "load":
            for engine_id, load in read_loads(message).items():
                self._loads[f"{session.node_id}/{engine_id}"] = load.to_json()
            await self._renew(session)
        elif kind == "progress":
            report = Progress.from_json(message)
            with contextlib.suppress(*AWAY):  # its next report, or the heartbeat, brings it
                await self._commands.progress(session.node_id, (report,))
            if report.has_ended:
                session.sent.discard(report.id)
                session.news.set()

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


async def _close(session: Session, code: int, why: str) -> None:
    """An agent that does not answer the close is left to itself."""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(CLOSE_S):
            await session.socket.close(code=code, message=why.encode()[:120])
