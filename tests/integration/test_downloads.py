"""The agent and its installers, as GPU hosts fetch them."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from gateway.identity.accounts import AccountStore
from gateway.identity.keys import KeyStore
from gateway.identity.secrets import load_pepper
from nodes.agent.package import build_zipapp
from nodes.protocol import AGENT_VERSION
from tests.gateways import TestGateway, running_gateway

WITH_KEY = (
    "/api/providers/setup", "/api/providers/setup-windows", "/api/providers/download", "/api/providers/download/setup",
    "/api/providers/installer?os=Linux", "/api/providers/download/daemon",
)  # fmt: skip


@pytest.fixture
async def gw(settings, pool) -> AsyncIterator[TestGateway]:
    async with running_gateway(settings, pool) as running:
        yield running


@pytest.fixture
async def key(gw) -> str:
    account = await AccountStore(gw.pool).create("provider", is_provider=True, approval_status="pending")
    _, key = await KeyStore(gw.pool, load_pepper(gw.gateway.settings)).create(
        account.id, prefix="dc1-provider-", scopes=("node",)
    )
    return key


async def get(gw: TestGateway, path: str, key: str = "", **headers: str) -> tuple[int, str, bytes]:
    if key:
        path += f"{'&' if '?' in path else '?'}key={key}"
    async with gw.http.get(gw.url + path, headers=headers) as answer:
        return answer.status, answer.headers.get("content-type", ""), await answer.read()


@pytest.mark.parametrize("path", WITH_KEY)
async def test_a_provider_that_waits_for_its_approval_may_install_and_nobody_else(gw, key, path):
    assert (await get(gw, path, key))[0] == 200
    assert (await get(gw, path, **{"x-provider-key": key}))[0] == 200
    for wrong in ("", "dc1-provider-wrong"):
        status, kind, body = await get(gw, path, wrong)
        assert (status, kind.partition(";")[0]) == (401, "application/json")
        assert b"error" in body
    assert (await get(gw, path, gw.key))[0] == 403


async def test_the_agent_comes_whole_with_its_hash_and_version(gw, key):
    async with gw.http.get(gw.url + f"/api/providers/download/daemon?key={key}") as answer:
        content = await answer.read()
        assert (
            answer.headers["x-checksum-sha256"]
            == hashlib.sha256(content).hexdigest()
            == build_zipapp().sha256
        )
        assert answer.headers["content-type"] == "application/octet-stream"
    async with gw.http.get(gw.url + f"/api/providers/download/daemon?check_only=true&key={key}") as answer:
        told = await answer.json()
    assert told == {
        "version": AGENT_VERSION, "min_version": gw.gateway.settings.agent_version_min,
        "download_url": "/api/providers/download/daemon", "sha256": build_zipapp().sha256, "size": len(content),
    }  # fmt: skip
    assert (await get(gw, "/api/providers/download/daemon?check_only=maybe", key))[0] == 400


@pytest.mark.parametrize(
    ("path", "kind", "first"),
    [
        ("setup", "text/x-shellscript", b"#!/bin/sh"),
        ("setup-windows", "text/plain", b"# Sets up the poolgate agent on Windows"),
        ("download", "application/octet-stream", b"#!/bin/sh"),
        ("download?platform=darwin", "application/octet-stream", b"#!/bin/sh"),
        ("download?platform=windows", "application/octet-stream", b"# Sets up"),
        ("download/setup", "text/x-shellscript", b"#!/bin/sh"),
        ("download/setup?os=mac", "text/x-shellscript", b"#!/bin/sh"),
        ("download/setup?os=windows", "text/plain", b"# Sets up"),
        ("installer?os=Linux", "application/octet-stream", b"#!/bin/sh"),
        ("installer?os=Windows", "application/octet-stream", b"# Sets up"),
    ],
)
async def test_each_system_gets_its_script_with_key_and_address_filled_in(gw, key, path, kind, first):
    status, told, body = await get(gw, f"/api/providers/{path}", key)
    assert (status, told.partition(";")[0]) == (200, kind)
    assert body.startswith(first)
    assert f"'{key}'".encode() in body or f"={key}\n".encode() in body
    assert gw.url.encode() in body
    assert b"@KEY@" not in body
    assert b"@GATEWAY@" not in body


@pytest.mark.parametrize(
    "path", ["download?platform=amiga", "download/setup?os=beos", "installer?os=", "installer"]
)
async def test_an_unknown_system_is_a_400(gw, key, path):
    assert (await get(gw, f"/api/providers/{path}", key))[0] == 400


async def test_the_script_without_a_key_needs_none(gw):
    status, kind, body = await get(gw, "/api/providers/daemon/linux")
    assert (status, kind.partition(";")[0]) == (200, "text/x-shellscript")
    assert b"key=''" in body


async def test_there_is_an_exe_only_where_the_operator_has_one(settings, pool, tmp_path):
    paths = ("/api/providers/download-windows-exe", "/api/providers/daemon/windows")
    async with running_gateway(settings, pool) as gw:
        for path in paths:
            status, _, body = await get(gw, path)
            assert (status, b"setup-windows" in body) == (404, True)
    exe = tmp_path / "agent.exe"
    exe.write_bytes(b"MZ")
    await pool.execute("delete from accounts")
    async with running_gateway(replace(settings, agent_exe=str(exe)), pool) as gw:
        for path in paths:
            assert (await get(gw, path))[::2] == (200, b"MZ")


async def test_the_address_is_the_operators_word_and_never_what_a_header_smuggles_in(settings, pool, key, gw):
    evil = "x$(reboot)"
    status, _, body = await get(gw, "/api/providers/setup", key, host=evil)
    assert (status, evil.encode() in body) == (400, False)
    await gw.gateway.stop()
    known = replace(settings, public_url="https://gateway.example.com/")
    await pool.execute("update accounts set name = 'old ' || id")
    async with running_gateway(known, pool) as other:
        _, _, body = await get(other, "/api/providers/setup", key, host=evil)
        assert b"gateway=https://gateway.example.com\n" in body


@pytest.mark.parametrize("shell", ["sh", "bash"])
async def test_the_script_is_one_that_shells_can_read(gw, key, tmp_path: Path, shell):
    script = tmp_path / "install.sh"
    script.write_bytes((await get(gw, "/api/providers/setup", key))[2])
    reading = await asyncio.create_subprocess_exec(shell, "-n", script, stderr=asyncio.subprocess.PIPE)
    _, complaints = await reading.communicate()
    assert (reading.returncode, complaints) == (0, b"")
    assert script.read_bytes().isascii(), "PowerShell's pipes carry nothing else"


async def test_an_agent_that_is_too_old_is_told_so(settings, pool):
    async with running_gateway(replace(settings, agent_version_min="9.0"), pool) as gw:
        _, key = await KeyStore(pool, load_pepper(settings)).create(
            gw.account_id, prefix="dc1-provider-", scopes=("node",)
        )
        for version, is_too_old in (("0.1.0", True), ("9.0.0", False), ("10.1", False), ("", False)):
            body = {"api_key": key, "agent_version": version}
            async with gw.http.post(gw.url + "/api/providers/heartbeat", json=body) as answer:
                told = await answer.json()
            assert (told["needs_update"], told["min_version"]) == (is_too_old, "9.0")
