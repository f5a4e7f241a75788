"""The API page in a real browser (Debian's chromium, which `make browser` installs), as its users open it."""

import asyncio
import re
import shutil
from pathlib import Path

import pytest

from tests.gateways import running_gateway

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or "chromium"

# A browser that asks nobody but the page's own server.
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip

PAGE_MS = 10_000
"""Virtual time for scripts to run; it ends as soon as nothing is left to do."""


async def rendered(url: str, profile: Path) -> tuple[str, str]:
    """The page's document after its scripts ran, and what the browser's console said."""
    process = await asyncio.create_subprocess_exec(
        CHROMIUM, *QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr", f"--virtual-time-budget={PAGE_MS}",
        "--dump-dom", url, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, errors = await process.communicate()
    console = [line for line in errors.decode().splitlines() if "CONSOLE" in line]
    return out.decode(), "\n".join(console)


async def test_the_api_page_shows_every_operation_without_an_error(settings, pool, tmp_path):
    async with running_gateway(settings, pool) as gw:
        page, console = await rendered(gw.url + "/api/docs/ui", tmp_path / "profile")
    shown = set(re.findall(r'data-path="([^"]+)"', page))
    assert {
        "/v1/chat/completions",
        "/v1/complete/stream",
        "/v1/models/{model}",
        "/health",
        "/api/docs",
    } <= shown
    assert "Refused to" not in console, "the page's own security policy must let it work"
    assert "Error" not in console, console
