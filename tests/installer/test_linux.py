"""The Linux installer, fetched from a running gateway by its one line, in a clean Debian: it ends with a node online."""

import asyncio
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.protocol import AGENT_VERSION
from tests.fakes.gateway_process import GatewayProcess
from tests.installer.chroot import make_chroot, running_in

pytestmark = [pytest.mark.installer, pytest.mark.timeout(600)]

HOLD = "sleep infinity"  # the agent lives as long as the first process of its namespace
INSTALL_S = 400


@pytest.fixture(scope="module")
def debian(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("debian")
    make_chroot(folder)
    yield folder
    shutil.rmtree(folder)  # 300 MB; what was mounted there was so only in namespaces that are gone


async def test_one_line_sets_up_a_node_that_is_online_and_a_second_time_repairs_it(
    settings, pool, tmp_path, debian
):
    told = replace(settings, heartbeat_interval_s=1.0, heartbeat_grace_s=20.0)
    owner = await AccountStore(pool).create("owner", is_provider=True)
    _, key = await KeyStore(pool, load_pepper(told)).create(
        owner.id, prefix="dc1-provider-", scopes=("node",)
    )
    async with GatewayProcess(told, tmp_path) as gateway:
        line = f"curl -fsSL '{gateway.url}/api/providers/download/setup?key={key}' | bash"
        log = tmp_path / "installed"
        with running_in(debian, f"{line}; echo code=$?; {HOLD}", log) as chroot:
            await said(log, chroot, "code=")
            text = log.read_text()
            assert "poolgate: this node is online\ncode=0" in text, text
            rows = await pool.fetch("select id, state, agent_version from nodes")
            assert [(row["state"], row["agent_version"]) for row in rows] == [("online", AGENT_VERSION)]
        folder = debian / "opt" / "poolgate-agent"
        secret = folder / "agent.env"
        assert (key in secret.read_text(), secret.stat().st_mode & 0o077) == (True, 0)
        assert (folder / "data" / "node_id").read_text().strip() == str(rows[0]["id"])
        again = tmp_path / "again"
        with running_in(debian, f"{line}; echo code=$?; {HOLD}", again) as chroot:
            await said(again, chroot, "code=")
            assert "this node is online\ncode=0" in again.read_text()
            assert await pool.fetchval("select count(*) from nodes") == 1, "it is the same node"


async def test_a_wrong_key_gets_no_script_and_a_script_without_a_key_says_what_is_missing(
    settings, pool, tmp_path, debian
):
    async with GatewayProcess(settings, tmp_path) as gateway:
        url = f"{gateway.url}/api/providers"
        log = tmp_path / "refused"
        wrong = f"curl -fsSL '{url}/download/setup?key=dc1-provider-wrong' | bash"
        keyless = f"curl -fsSL {url}/daemon/linux | sh"
        with running_in(debian, f"{wrong}; {keyless}; echo over", log) as chroot:
            await said(log, chroot, "over")
    text = log.read_text()
    assert "401" in text
    assert "no provider key: set POOLGATE_AGENT_KEY" in text
    assert "installing into" not in text


async def said(log: Path, chroot: "subprocess.Popen[bytes]", words: str) -> None:
    await asyncio.to_thread(wait_for_words, log, chroot, words)


def wait_for_words(log: Path, chroot: "subprocess.Popen[bytes]", words: str) -> None:
    """Minutes may pass: packages are installed."""
    ends_s = time.monotonic() + INSTALL_S
    while words not in log.read_text():
        is_over = chroot.poll() is not None and words not in log.read_text()
        assert not is_over, log.read_text()
        assert time.monotonic() < ends_s, log.read_text()
        time.sleep(0.2)
