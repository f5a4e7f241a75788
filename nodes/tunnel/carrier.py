"""Moves a tunnel's messages over a websocket, in both directions, until either ends. What is in them is `streams`'."""

import asyncio
import contextlib
import logging
from typing import Any

from aiohttp import ClientError, WSCloseCode, WSMsgType

from nodes.tunnel.frames import BadFrame
from nodes.tunnel.streams import Tunnel

log = logging.getLogger("poolgate.tunnel")

HEARTBEAT_S = 15.0
"""A websocket is pinged this often, and given up when no answer comes within half of it: what lies between the two ends
(NAT, balancers) forgets connections that are silent for a minute."""

CLOSE_S = 2.0
"""What the other end has to answer a goodbye."""


async def carry(tunnel: Tunnel, socket: Any) -> str:
    """Until it ends, whoever ends it; why. `socket` is aiohttp's websocket, of a client or of a server."""
    writing = asyncio.create_task(_write(tunnel, socket), name="tunnel writer")
    reason = "the tunnel was closed"
    try:
        async for message in socket:
            if message.type is not WSMsgType.BINARY:
                raise BadFrame("a message that is not binary")  # noqa: TRY301 - as `received` does for the rest
            tunnel.received(message.data)
            if tunnel.is_lost:
                break
    except BadFrame as error:
        reason = f"the tunnel's other end broke the rules: {error}"
        log.warning("%s", reason, extra={"action": "tunnel_broken"})
        with contextlib.suppress(ClientError, OSError):
            await socket.close(code=WSCloseCode.PROTOCOL_ERROR)
    except (ClientError, OSError) as error:
        reason = f"the tunnel was cut: {str(error) or type(error).__name__}"
    finally:
        tunnel.lost(reason)
        writing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await writing
    return reason


async def _write(tunnel: Tunnel, socket: Any) -> None:
    """Send what streams have to say, all of one turn of the loop in one message."""
    news = asyncio.Event()
    tunnel.wake = news.set
    try:
        while not tunnel.is_lost:
            news.clear()
            while message := tunnel.take():
                await socket.send_bytes(message)
            await news.wait()
    except (ClientError, OSError):
        tunnel.lost("the tunnel was cut")
    finally:
        # Whoever reads is to hear of it, too, if nothing more comes.
        if not socket.closed:
            await socket.close(code=WSCloseCode.GOING_AWAY)
