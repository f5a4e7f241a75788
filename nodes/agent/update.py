"""Replaces this agent's zipapp by the gateway's when that wants a newer one; the launcher starts it, and goes back.

Only a zipapp that the launcher runs can be replaced; what was installed by pip is its owner's to update. The download is
held against the SHA-256 that the gateway tells, and must be able to say its version, before anything is touched.
"""

import asyncio
import hashlib
import json
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp

from nodes.agent.launcher import (
    CURRENT,
    LAUNCHED,
    NEW,
    RESTART_CODE,
    TRIAL,
    is_refused,
    prepare_trial,
)
from nodes.protocol import AGENT_VERSION, BadMessage, Fields

log = logging.getLogger("poolgate.agent")

DOWNLOAD_PATH = "/api/providers/download/daemon"
BYTES_MAX = 64 * 2**20
TIMEOUT_S = 120.0
ASK_S = 30.0
AGAIN_S = 600.0
"""Pause after an update came to nothing."""


class CannotUpdate(RuntimeError):
    """This agent stays as it is; the text says why."""


class Updater:
    """`restart()` is called once the new zipapp is in place: the agent is to end, with `exit_code`."""

    exit_code = RESTART_CODE

    def __init__(
        self, session: aiohttp.ClientSession, *, gateway: str, key: str, restart: Callable[[], None]
    ) -> None:
        self._session, self._gateway, self._key, self._restart = session, gateway.rstrip("/"), key, restart
        self._folder = launched_folder()
        self._task: asyncio.Task[None] | None = None
        self._next_s = 0.0
        self._is_going = asyncio.Lock()
        self.has_replaced = False

    def wanted(self) -> bool:
        """The gateway finds this agent too old. True if something is done about it, now or soon."""
        if self._folder is None:
            return False
        now_s = asyncio.get_running_loop().time()
        if (self._task is None or self._task.done()) and now_s >= self._next_s:
            self._next_s = now_s + AGAIN_S
            self._task = asyncio.create_task(self._update_quietly(), name="update")
        return True

    def came_up(self) -> None:
        """A heartbeat was taken: this version works. Unless it has just made room for another one, whose trial it is."""
        if self._folder is not None and not self.has_replaced:
            (self._folder / TRIAL).unlink(missing_ok=True)

    async def update(self) -> str:
        """Get and put in place what the gateway has; in words, what comes. Raises CannotUpdate."""
        if self._folder is None:
            raise CannotUpdate("this agent was not set up by the installer: update it as it was installed")
        async with self._is_going:
            if self.has_replaced:
                return "it restarts"
            version, sha256 = await self._ask()
            if version == AGENT_VERSION:
                return f"{version} is what the gateway has"
            if is_refused(self._folder, sha256):
                raise CannotUpdate(f"{version} was tried before, and did not come up")
            new = self._folder / NEW
            await self._download(new, sha256)
            await _says_version(new, version)
            await asyncio.to_thread(prepare_trial, self._folder, sha256)
            self.has_replaced = True
        log.info("%s takes the place of %s", version, AGENT_VERSION, extra={"action": "agent_updated"})
        self._restart()
        return f"{version} takes the place of {AGENT_VERSION}"

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _update_quietly(self) -> None:
        try:
            await self.update()
        except (CannotUpdate, OSError) as error:
            log.warning("no update: %s", error, extra={"action": "agent_not_updated"})

    async def _ask(self) -> tuple[str, str]:
        try:
            async with self._session.get(
                self._gateway + DOWNLOAD_PATH,
                params={"check_only": "true"},
                headers={"x-provider-key": self._key},
                timeout=aiohttp.ClientTimeout(total=ASK_S),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise CannotUpdate(f"the gateway answered {answer.status}")
                fields = Fields(json.loads(await answer.content.read(65536)), "")
            return fields.text("version", required=True), fields.text("sha256", required=True)
        except (aiohttp.ClientError, TimeoutError, ValueError, BadMessage) as error:
            raise CannotUpdate(f"the gateway did not tell its version: {error}") from error

    async def _download(self, new: Path, sha256: str) -> None:
        digest, size = hashlib.sha256(), 0
        try:
            async with self._session.get(
                self._gateway + DOWNLOAD_PATH,
                headers={"x-provider-key": self._key},
                timeout=aiohttp.ClientTimeout(total=TIMEOUT_S),
                allow_redirects=False,
            ) as answer:
                if answer.status != 200:
                    raise CannotUpdate(f"the gateway answered {answer.status} to the download")
                with new.open("wb") as output:
                    async for piece in answer.content.iter_chunked(2**16):
                        size += len(piece)
                        if size > BYTES_MAX:
                            raise CannotUpdate("the download does not end")
                        digest.update(piece)
                        output.write(piece)
        except (aiohttp.ClientError, TimeoutError) as error:
            raise CannotUpdate(f"the download broke: {error}") from error
        if digest.hexdigest() != sha256:
            raise CannotUpdate("what came is not what the gateway told: its SHA-256 differs")


def launched_folder() -> Path | None:
    """Where the launcher keeps the zipapp that runs now; None if it was started in another way."""
    folder = os.environ.get(LAUNCHED)
    if not folder or Path(sys.argv[0]).name != CURRENT:
        return None
    return Path(folder)


async def _says_version(new: Path, version: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", str(new), "--version",
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        async with asyncio.timeout(ASK_S):
            said, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise CannotUpdate("the new agent does not start") from None
    if process.returncode != 0 or version not in said.decode(errors="replace"):
        raise CannotUpdate(f"the new agent does not say that it is {version}")
