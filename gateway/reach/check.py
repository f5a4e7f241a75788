"""Is a listener what its agent says? Its address must be one that may be called, and whoever is there must have its token.

An agent only names an address; nothing is sent there but a nonce until what answers has proved that it has the token which
the node was given. So neither this gateway, nor a metadata service, nor another's listener can be named as one's own.
"""

import asyncio
import hmac
import json
import logging
import secrets
import socket
from datetime import UTC, datetime, timedelta

from config.defaults import Settings
from config.postgres import AWAY
from gateway.reach.ask import NoAnswer, ask
from gateway.reach.tokens import node_token
from gateway.reach.ways import Ways
from gateway.relay.upstream import ConnectFailed, UpstreamPool
from nodes.networks import AllowedNetworks, EngineAddress, EngineUrlRefused
from nodes.protocol import PROOF_PATH, ReachAsked, listener_proof
from nodes.reach import LISTENER, Listener
from nodes.reaching import NodeReach, ReachStore

log = logging.getLogger("poolgate.nodes")

CHECKS_MAX = 64
"""At a time, each of a node: the others are checked at a later heartbeat."""

AGAIN_S = 5.0
"""After a check that failed, at the earliest."""

ANSWER_BYTES_MAX = 1024


class ListenerUnusable(Exception):
    """The listener is not used; the text says why, to its own agent."""


class ListenerChecks:
    """`consider` each heartbeat; what is found is written into the node's row, which every worker reads."""

    def __init__(
        self, settings: Settings, *, store: ReachStore, networks: AllowedNetworks, ways: Ways, pepper: bytes
    ) -> None:
        self._settings = settings
        self._store = store
        self._networks = networks
        self._ways = ways
        self._pepper = pepper
        self._running: dict[str, asyncio.Task[None]] = {}

    def token(self, account_id: int, node_id: str) -> str:
        """What the node's agent is given, to prove its listener by and to know gateways by."""
        return node_token(self._pepper, account_id, node_id)

    def consider(self, node_id: str, account_id: int, asked: ReachAsked, known: NodeReach) -> None:
        """Begin a check if one is due."""
        if node_id in self._running or len(self._running) >= CHECKS_MAX or not self._is_due(asked, known):
            return
        task = asyncio.create_task(self._run(node_id, account_id, asked))
        self._running[node_id] = task
        task.add_done_callback(lambda _: self._running.pop(node_id, None))

    def _is_due(self, asked: ReachAsked, known: NodeReach) -> bool:
        if asked.mode != "agent" or not asked.advertise:
            return False
        if known.checked_at is None:
            return True
        wait_s = self._settings.listener_check_s if known.way == LISTENER else AGAIN_S
        return datetime.now(UTC) - known.checked_at > timedelta(seconds=wait_s)

    async def _run(self, node_id: str, account_id: int, asked: ReachAsked) -> None:
        address, problem = None, ""
        try:
            address = await self.check(node_id, account_id, asked)
        except ListenerUnusable as error:
            problem = f"the listener at {asked.advertise} is not used: {error}"
            log.info("node %s: %s", node_id, problem, extra={"action": "listener_unusable", "node": node_id})
        try:
            found = (address.host, address.port) if address else None
            await self._store.listener_checked(node_id, asked, found, problem)
        except AWAY:
            log.debug("a check of a listener is not written", extra={"action": "listener_check_lost"})

    async def check(self, node_id: str, account_id: int, asked: ReachAsked) -> EngineAddress:
        """The address at which the node's own listener answered. Raises ListenerUnusable."""
        address = await self._resolve(asked.advertise)
        reach = Listener(address.host, address.port, asked.fingerprint, account_id, node_id, "")
        pool = UpstreamPool(address.host, address.port, self._settings, reach=reach, ways=self._ways)
        nonce = secrets.token_hex(16)
        question = f"GET {PROOF_PATH}?nonce={nonce} HTTP/1.1\r\nhost: node\r\n\r\n".encode()
        try:
            status, body = await ask(
                pool, question, timeout_s=2 * self._settings.connect_timeout_s, bytes_max=ANSWER_BYTES_MAX
            )
        except ConnectFailed as error:
            raise ListenerUnusable(f"{error} ({error.__cause__ or error})") from error
        except NoAnswer as error:
            raise ListenerUnusable(str(error)) from error
        if status != 200 or not hmac.compare_digest(
            _proof(body), listener_proof(self.token(account_id, node_id), nonce)
        ):
            raise ListenerUnusable("who answers there does not have this node's token")
        return address

    async def _resolve(self, advertise: str) -> EngineAddress:
        """A name is looked up once: the address that was judged is the one that is connected to, now and later."""
        host, _, port = advertise.rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            raise ListenerUnusable("it must be given as HOST:PORT")
        try:
            async with asyncio.timeout(self._settings.connect_timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(
                    host.strip("[]"), int(port), type=socket.SOCK_STREAM
                )
        except (OSError, UnicodeError, TimeoutError):
            raise ListenerUnusable("its name can't be resolved") from None
        refused: Exception | None = None
        for *_, address in found:
            try:
                return self._networks.check_listener(str(address[0]), int(port))
            except EngineUrlRefused as error:
                refused = error
        raise ListenerUnusable(str(refused or "its name has no address"))

    async def close(self) -> None:
        """Give up those under way."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _proof(body: bytes) -> str:
    try:
        shown = json.loads(body)["proof"]
    except (ValueError, KeyError, TypeError):
        return ""
    return shown if isinstance(shown, str) and shown.isascii() else ""
