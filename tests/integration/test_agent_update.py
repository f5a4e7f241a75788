"""A zipapp under its launcher: it replaces itself when the gateway wants a newer one, and goes back when that fails."""

import asyncio
import hashlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from aiohttp import web

from nodes.agent.launcher import CURRENT, OLD, REFUSED, TRIAL
from nodes.agent.package import build_zipapp
from nodes.agent.update import DOWNLOAD_PATH
from tests.fakes.heartbeats import HeartbeatGateway, heartbeat_gateway
from tests.waiting import eventually

ROOT = Path(__file__).resolve().parents[2]
NEWER = "0.2.0"


def zipapp_of(folder: Path, version: str, *, spoil: str = "") -> bytes:
    """As another version's sources would make it; `spoil` is added to its main module."""
    for name in ("nodes", "config"):
        for file in (ROOT / name).rglob("*"):
            if file.suffix in (".py", ".txt"):
                copy = folder / file.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes(file.read_bytes())
    protocol = folder / "nodes" / "protocol.py"
    protocol.write_text(
        protocol.read_text().replace('AGENT_VERSION = "0.1.0"', f'AGENT_VERSION = "{version}"')
    )
    main = folder / "nodes" / "agent" / "main.py"
    main.write_text(main.read_text() + spoil)
    return build_zipapp(folder).content


class Releases:
    """What the gateway gives as `download/daemon`."""

    def __init__(self, gateway: HeartbeatGateway) -> None:
        self.gateway = gateway
        self.content = b""
        self.sha256 = ""
        self.downloads = 0

    def publish(self, content: bytes, sha256: str = "") -> None:
        self.content, self.sha256 = content, sha256 or hashlib.sha256(content).hexdigest()
        self.gateway.reply = replace(self.gateway.reply, needs_update=True)

    async def handle(self, request: web.Request) -> web.Response:
        assert request.headers["x-provider-key"] == "dc1-provider-test"
        if request.query.get("check_only") == "true":
            return web.json_response({"version": NEWER, "sha256": self.sha256})
        self.downloads += 1
        return web.Response(body=self.content)


@pytest.fixture
async def gateway() -> AsyncIterator[HeartbeatGateway]:
    async with heartbeat_gateway() as gateway:
        yield gateway


@pytest.fixture
def releases(gateway: HeartbeatGateway) -> Releases:
    releases = Releases(gateway)
    gateway.extra[DOWNLOAD_PATH] = releases.handle
    return releases


def install(folder: Path) -> None:
    folder.mkdir()
    (folder / CURRENT).write_bytes(build_zipapp().content)
    (folder / "launcher.py").write_bytes((ROOT / "nodes" / "agent" / "launcher.py").read_bytes())


@asynccontextmanager
async def launched(gateway: HeartbeatGateway, folder: Path) -> AsyncIterator["asyncio.subprocess.Process"]:
    """The launcher as the installer leaves it."""
    install(folder)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POOLGATE_")}
    with (folder / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, folder / "launcher.py", "--gateway", gateway.url, "--data-dir", folder / "data",
            cwd=folder, env=environment | {"POOLGATE_AGENT_KEY": "dc1-provider-test"}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
        await process.wait()


def said(folder: Path) -> str:
    return (folder / "log").read_text()


def versions(gateway: HeartbeatGateway) -> list[str]:
    return [beat.agent_version for beat in gateway.beats]


async def test_an_agent_that_is_too_old_replaces_itself_and_keeps_the_old_one(
    gateway: HeartbeatGateway, releases: Releases, tmp_path: Path
) -> None:
    folder = tmp_path / "agent"
    newer = zipapp_of(tmp_path / "newer", NEWER)
    async with launched(gateway, folder) as launcher:
        first = await gateway.until(lambda _: True)
        releases.publish(newer)
        await gateway.until(lambda beat: beat.agent_version == NEWER)
        gateway.reply = replace(gateway.reply, needs_update=False)
        await eventually(lambda: not (folder / TRIAL).exists())
        assert (folder / CURRENT).read_bytes() == newer
        assert (folder / OLD).read_bytes() == build_zipapp().content
        later = await gateway.until(lambda beat: beat.agent_version == NEWER and beat.epoch > 0)
        assert later.node_id == first.node_id
        launcher.send_signal(signal.SIGTERM)
        assert await launcher.wait() == 0


@pytest.mark.parametrize(
    "spoil",
    [
        "\nraise RuntimeError('born broken')\n",
        "\nimport sys\nasync def run_agent(options):\n    sys.exit(9)\n",
    ],
    ids=["does not load", "ends at once"],
)
async def test_a_new_agent_that_does_not_come_up_makes_room_for_the_old_one(
    gateway, releases, tmp_path, spoil
):
    folder = tmp_path / "agent"
    broken = zipapp_of(tmp_path / "broken", NEWER, spoil=spoil)
    async with launched(gateway, folder):
        await gateway.until(lambda _: True)
        releases.publish(broken)
        await eventually(lambda: "going back to the old one" in said(folder))
        seen = len(gateway.beats)
        await gateway.until(lambda beat: beat.epoch > 0, after=seen + 2)
        assert set(versions(gateway)) == {"0.1.0"}
        assert (folder / CURRENT).read_bytes() == build_zipapp().content
        assert hashlib.sha256(broken).hexdigest() in (folder / REFUSED).read_text()
        await eventually(lambda: "was tried before, and did not come up" in said(folder))
        assert releases.downloads == 1


@pytest.mark.parametrize("wrong", ["hash", "version"])
async def test_a_download_that_is_not_what_it_should_be_is_not_put_in_place(
    gateway, releases, tmp_path, wrong
):
    folder = tmp_path / "agent"
    async with launched(gateway, folder):
        await gateway.until(lambda _: True)
        if wrong == "hash":
            releases.publish(zipapp_of(tmp_path / "newer", NEWER), sha256="0" * 64)
        else:
            releases.publish(zipapp_of(tmp_path / "newer", "0.1.5"))
        words = "its SHA-256 differs" if wrong == "hash" else f"does not say that it is {NEWER}"
        await eventually(lambda: words in said(folder))
        assert (folder / CURRENT).read_bytes() == build_zipapp().content
        assert not (folder / TRIAL).exists()
        await gateway.until(lambda beat: beat.agent_version == "0.1.0", after=len(gateway.beats))


async def test_the_launcher_starts_an_agent_that_died_again(
    gateway: HeartbeatGateway, releases: Releases, tmp_path: Path
) -> None:
    async with launched(gateway, tmp_path / "agent") as launcher:
        first = await gateway.until(lambda _: True)
        for child in psutil.Process(launcher.pid).children():
            child.kill()
        again = await gateway.until(lambda beat: beat.instance != first.instance)
        assert again.node_id == first.node_id
        assert "ended with code 137" in said(tmp_path / "agent")


async def test_the_launcher_does_not_start_a_fenced_agent_again(
    gateway: HeartbeatGateway, releases: Releases, tmp_path: Path
) -> None:
    async with launched(gateway, tmp_path / "agent") as launcher:
        await gateway.until(lambda beat: beat.epoch > 0)
        gateway.status = 409
        assert await launcher.wait() == 0
        assert versions(gateway)[-1] == "0.1.0"


async def test_an_agent_without_a_launcher_is_left_as_it_is(
    gateway: HeartbeatGateway, releases: Releases, tmp_path: Path
) -> None:
    file = tmp_path / "agent.pyz"
    file.write_bytes(build_zipapp().content)
    releases.publish(b"not asked for")
    log = tmp_path / "log"
    with log.open("wb") as output:
        agent = await asyncio.create_subprocess_exec(
            sys.executable, file, "--gateway", gateway.url, "--data-dir", tmp_path / "data", "--key",
            "dc1-provider-test", stdout=output, stderr=output,
        )  # fmt: skip
    try:
        await eventually(lambda: "update poolgate on this host" in log.read_text())
        assert releases.downloads == 0
    finally:
        agent.terminate()
        await agent.wait()
