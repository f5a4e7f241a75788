"""An engine dies, or falls silent, or a worker dies, under load: who sees an error, and does every turn have its record.

Engines are stand-ins under real agents: one agent starts its own, the other watches one that was started by somebody else.
"""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import asyncpg
import psutil

from bench.processes import MODEL, ROOT, Served, environment, served
from config.defaults import Settings
from config.procs import Child, spawn_python
from tests.fakes.agent import agent_process, engine_of
from tests.fakes.engine import FakeEngine
from tests.soak.crowd import TOKENS, Crowd, crowd
from tests.waiting import eventually

KNOBS = {"ttft_ms": 20.0, "pace_ms": 15.0, "jitter": 0.3}
FLAGS = ("--no-record",)
BUSY = 12


@dataclass(frozen=True, slots=True)
class Size:
    """How many clients, how often each engine is killed, how many turns lie between two events."""

    clients: int
    kills: int
    turns: int
    waits_for_agent: bool = False


SHORT = Size(clients=64, kills=1, turns=96)
LONG = Size(clients=64, kills=3, turns=700, waits_for_agent=True)


async def engine_killed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """kill -9 of one of two engines, in turn. Only streams that had begun on it may fail, by an error event."""
    async with (
        served(settings, pool, folder) as gateway,
        two_nodes(gateway, folder, settings) as (agent, attached),
    ):
        async with crowd(gateway.url, gateway.key, size.clients) as seen:
            for _ in range(size.kills):
                await _more(seen, size.turns)
                own = engine_of(agent)
                assert own is not None
                await _until_busy(_engine_in(own))
                own.kill()
                tell(f"killed the agent's own engine after {seen.turns} turns")
                await _more(seen, size.turns)
                await _takes_turns_again(agent, own)
                tell(f"its agent's next one takes turns, {seen.turns} turns")
                await gateway.until_engines(2)
                await _until_busy(attached)
                await attached.kill()
                tell(f"killed the attached engine after {seen.turns} turns")
                await _more(seen, size.turns)
                await attached.start()
                await attached.until(lambda record: record["served"] > 0)
                await gateway.until_engines(2)
            await _more(seen, size.turns)
        numbers = {"kills": 2 * size.kills, **await _judge(gateway, seen)}
    tell(str(numbers))
    return numbers


async def engine_silent(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """SIGSTOP of one of two engines: its sockets stay open and nothing comes. The time-outs find out.

    A whole answer has one time-out for everything, which is over when it is over: such a turn is not tried again.
    """
    settings = replace(settings, first_byte_timeout_s=2.5, chunk_timeout_s=2.5, answer_timeout_s=4.0)
    async with (
        served(settings, pool, folder) as gateway,
        two_nodes(gateway, folder, settings) as (agent, _),
    ):
        async with crowd(gateway.url, gateway.key, size.clients) as seen:
            await _more(seen, size.turns)
            own = engine_of(agent)
            assert own is not None
            await _until_busy(_engine_in(own))
            own.suspend()
            tell(f"stopped an engine after {seen.turns} turns")
            try:
                await eventually(lambda: _is_noticed(gateway))
                tell(f"its breaker is open, {seen.turns} turns")
                if size.waits_for_agent:  # three checks of 10 s each
                    await _takes_turns_again(agent, own)
                    tell(f"its agent replaced it, {seen.turns} turns")
            finally:
                if own.is_running():
                    own.resume()
            await gateway.until_engines(2)
            await _more(seen, size.turns)
        numbers = await _judge(gateway, seen, may_time_out=True)
    tell(str(numbers))
    return numbers


async def worker_killed(
    settings: Settings, pool: asyncpg.Pool, folder: Path, size: Size, tell: Callable[[str], None] = print
) -> dict[str, float]:
    """kill -9 of one of two workers: only its own connections break, and a successor serves on its socket."""
    settings = replace(settings, workers=2, heartbeat_grace_s=3600.0, heartbeat_interval_s=30.0)
    broken = successors = 0
    async with (
        served(settings, pool, folder) as gateway,
        FakeEngine(*FLAGS, **KNOBS) as engine,
    ):
        await gateway.register(engine.url)
        async with crowd(gateway.url, gateway.key, size.clients) as seen:
            for _ in range(size.kills):
                await _more(seen, size.turns)
                before = gateway.workers()
                victim = max(before, key=lambda worker: len(_client_ports(worker, gateway)))
                failed_before = len(seen.failures)
                connected = _client_ports(victim, gateway)
                victim.kill()
                tell(f"killed a worker with {len(connected)} connections after {seen.turns} turns")
                await eventually(lambda: len(_successors(gateway, before)) == 1)  # noqa: B023
                await _more(seen, size.turns)
                failed = [answer for _, answer in seen.failures[failed_before:]]
                assert {answer.verdict for answer in failed} <= {"reset", "cut"}, seen.told()
                assert {answer.local_port for answer in failed} <= connected, seen.told()
                broken += len(failed)
                (successor,) = _successors(gateway, before)
                await eventually(lambda: _client_ports(successor, gateway))  # noqa: B023
                successors += 1
        await eventually(lambda: _is_idle(engine))
    # Counted when the gateway has stopped, which writes what is left.
    records = sum((await gateway.outcomes()).values())
    assert records <= seen.turns, (records, seen.verdicts)
    numbers = {
        "kills": size.kills,
        "turns": seen.turns,
        "whole": seen.verdicts["whole"],
        "broken on the killed workers' connections": broken,
        "broken elsewhere": seen.turns - seen.verdicts["whole"] - broken,
        "successors that serve": successors,
        "turns without a record (in the killed workers' memory)": seen.turns - records,
    }
    tell(str(numbers))
    assert numbers["broken elsewhere"] == 0, seen.told()
    return numbers


@asynccontextmanager
async def two_nodes(
    gateway: Served, folder: Path, settings: Settings
) -> AsyncIterator[tuple[Child, FakeEngine]]:
    """An agent with an engine of its own, and `poolgate agent --engine-url` beside an engine of somebody else's."""
    watcher = folder / "watcher"
    watcher.mkdir()
    with agent_process(
        gateway.url, gateway.provider_key, folder / "owner", settings, model=MODEL, knobs=KNOBS, flags=FLAGS
    ) as agent:
        async with FakeEngine(*FLAGS, **KNOBS) as engine:
            with _watching(gateway, engine.url, watcher, settings):
                await gateway.until_engines(2)
                yield agent, engine


@contextmanager
def _watching(gateway: Served, engine_url: str, folder: Path, settings: Settings) -> Iterator[None]:
    own = replace(settings, data_dir=str(folder))
    with (folder / "agent.log").open("wb") as output:
        process = spawn_python(
            "gateway", "agent", "--gateway", gateway.url, "--engine-url", engine_url, cwd=ROOT,
            env=environment(own) | {"POOLGATE_AGENT_KEY": gateway.provider_key},
            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
        )  # fmt: skip
    try:
        yield
    finally:
        process.terminate()
        process.wait(30)


async def _more(seen: Crowd, turns: int) -> None:
    """Until the clients have had so many more answers."""
    enough = seen.turns + turns
    await eventually(lambda: seen.turns >= enough)


async def _takes_turns_again(agent: Child, dead: psutil.Process) -> None:
    """Until the engine after `dead` has served turns."""
    await eventually(lambda: (found := engine_of(agent)) is not None and found.pid != dead.pid)
    found = engine_of(agent)
    assert found is not None
    engine = _engine_in(found)

    async def has_served() -> bool:
        try:
            return (await engine.record())["served"] > 0
        except OSError:
            return False  # it does not listen yet

    await eventually(has_served)


def _engine_in(process: psutil.Process) -> FakeEngine:
    """The stand-in that an agent started, to ask it."""
    command = process.cmdline()
    engine = FakeEngine()
    engine.port = int(command[command.index("--port") + 1])
    return engine


async def _until_busy(engine: FakeEngine) -> None:
    """Until it has so many turns that some of them are streams that have begun."""
    await engine.until(lambda record: record["running"] >= BUSY)


async def _is_noticed(gateway: Served) -> bool:
    return await asyncio.to_thread(gateway.engines) < 2


async def _is_idle(engine: FakeEngine) -> bool:
    record = await engine.record()
    return record["running"] == 0 and record["waiting"] == 0


async def _judge(gateway: Served, seen: Crowd, *, may_time_out: bool = False) -> dict[str, float]:
    """Every turn has one record that says what its client saw, and nobody failed who should not have."""
    await gateway.until_settled(seen.turns)
    rows = await gateway.pool.fetch(
        "select outcome, count(*), sum(completion_tokens)::bigint as tokens from usage group by 1"
    )
    records = {row["outcome"]: (row["count"], row["tokens"]) for row in rows}
    whole, cut, refused = (seen.verdicts[verdict] for verdict in ("whole", "error_event", "refused"))
    late = sum(
        answer.status == 504 and answer.verdict == "refused" and not wants_stream
        for wants_stream, answer in seen.failures
    )
    numbers = {
        "turns": seen.turns,
        "whole": whole,
        "begun streams ended by an error event": cut,
        "whole answers that came not within answer_timeout_s": late,
        "errors before the first byte": refused - late + seen.verdicts["reset"],
        "answers cut without a word": seen.verdicts["cut"],
        "left hanging": seen.verdicts["silent"],
        "usage records": sum(count for count, _ in records.values()),
    }
    assert whole + cut + late == seen.turns, seen.told()
    assert may_time_out or not late, seen.told()
    assert cut > 0, "nothing was in flight where it should hurt"
    assert records.pop("finished") == (whole, whole * TOKENS), (records, seen.verdicts)
    assert sum(count for count, _ in records.values()) == cut + late, (records, seen.verdicts)
    assert sum(tokens for _, tokens in records.values()) == seen.cut_tokens, (records, seen.verdicts)
    return numbers


def _successors(gateway: Served, before: list[psutil.Process]) -> list[psutil.Process]:
    known = {worker.pid for worker in before}
    return [worker for worker in gateway.workers() if worker.pid not in known]


def _client_ports(worker: psutil.Process, gateway: Served) -> set[int]:
    """The clients' ends of the connections that a worker serves."""
    port = int(gateway.url.rsplit(":", 1)[1])
    return {
        connection.raddr.port
        for connection in worker.net_connections("tcp")
        if connection.laddr.port == port and connection.raddr
    }
