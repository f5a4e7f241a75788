"""Start the stand-in engine: listen on loopback, say where in one JSON line, stop with the parent."""

import asyncio
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable

import uvloop

from bench.fake_engine.config import EngineConfig, parse_flags
from bench.fake_engine.engine import Engine
from bench.fake_engine.knobs import Knobs
from bench.fake_engine.protocol import Connection

BACKLOG = 4096


def main() -> None:
    config = parse_flags(sys.argv[1:], dict(os.environ))
    if config.parent_stdin:
        threading.Thread(target=_exit_with_parent, daemon=True).start()
    if config.start_delay_s:
        time.sleep(config.start_delay_s)
    uvloop.run(serve(config))


async def serve(config: EngineConfig) -> None:
    loop = asyncio.get_running_loop()
    knobs = Knobs()
    knobs.turn(config.knobs)
    engine = Engine(config, knobs, loop)
    engine.record.keeps_bodies = config.record_bodies or knobs.record_bodies
    listener = socket.create_server((config.host, config.port), backlog=BACKLOG)
    port = listener.getsockname()[1]
    listeners = [listener, *(socket.create_server((host, port), backlog=BACKLOG) for host in config.also)]
    servers = [
        await loop.create_server(lambda: Connection(engine), sock=sock, backlog=BACKLOG) for sock in listeners
    ]
    stopped = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, lambda: _terminate(engine, servers, stopped))
    loop.add_signal_handler(signal.SIGINT, stopped.set)
    print(json.dumps({"port": port, "pid": os.getpid()}), flush=True)
    await stopped.wait()
    os._exit(0)


def _terminate(engine: Engine, servers: list[asyncio.Server], stopped: asyncio.Event) -> None:
    """What SIGTERM does is a knob: the real engine was seen to do all of these."""
    knobs = engine.knobs
    how = "drain" if engine.config.shutdown_timeout_s and knobs.sigterm == "exit" else knobs.sigterm
    if how == "exit":
        stopped.set()
    elif how == "stall":
        for server in servers:
            server.close()
        knobs.paused = True
        _stop_when(engine, stopped, lambda: engine.in_flight == 0)
    elif how == "error":
        for turn in [*engine.running, *engine.waiting]:
            turn.fail()
        _stop_when(engine, stopped, lambda: engine.in_flight == 0)
    elif how == "drain":
        knobs.draining = True
        limit = engine.loop.time() + (engine.config.shutdown_timeout_s or 3600)
        _stop_when(engine, stopped, lambda: engine.in_flight == 0 or engine.loop.time() > limit)


def _stop_when(engine: Engine, stopped: asyncio.Event, is_over: Callable[[], bool]) -> None:
    def look(now: float) -> None:
        if is_over():
            stopped.set()
        else:
            engine.wheel.at(now + 0.01, look)

    engine.wheel.at(engine.loop.time() + 0.05, look)


def _exit_with_parent() -> None:
    while os.read(0, 1024):
        pass
    os._exit(0)


if __name__ == "__main__":
    main()
