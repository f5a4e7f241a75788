"""The agent itself, for hosts that have it or get it: GET /api/providers/download/daemon, and the .exe paths.

The zipapp is made from this gateway's own sources, so that both always speak the same protocol.
"""

import asyncio
from functools import cache
from pathlib import Path
from typing import Literal

from aiohttp import web
from pydantic import BaseModel

from gateway.api.credentials import authenticate
from gateway.api.routes import Media, Query, Routes
from gateway.api.services import SETTINGS
from gateway.api.system.answers import json_answer
from gateway.errors import BadRequest, NotFound
from nodes.agent.package import Zipapp, build_zipapp

routes = Routes(surface="plain", tag="Providers")

DAEMON_PATH = "/api/providers/download/daemon"
FILE = "application/octet-stream"


class DaemonVersion(BaseModel):
    """What `check_only` tells."""

    version: str
    min_version: str
    download_url: str
    sha256: str
    size: int


@routes.get(
    DAEMON_PATH, summary="The agent, as one file",
    query=(
        Query("key", str, "Provider key; or in the header x-provider-key"),
        Query("check_only", Literal["true", "false"], "true: tell the version, and send nothing"),
    ),
    answers={200: (Media(FILE, None, "A Python zipapp"), Media(shape=DaemonVersion))},
    errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def daemon(request: web.Request) -> web.StreamResponse:
    """A zipapp, which Python 3.11 or newer with aiohttp runs. Its SHA-256 is in the header `x-checksum-sha256`."""
    await authenticate(request, "node")
    check_only = request.query.get("check_only", "false")
    if check_only not in ("true", "false"):
        raise BadRequest("check_only must be true or false.", param="check_only")
    app = await zipapp()
    if check_only == "true":
        version = DaemonVersion(
            version=app.version, min_version=request.app[SETTINGS].agent_version_min, download_url=DAEMON_PATH,
            sha256=app.sha256, size=len(app.content),
        )  # fmt: skip
        return json_answer(version.model_dump())
    headers = {"x-checksum-sha256": app.sha256, **attachment("agent.pyz")}
    return web.Response(body=app.content, content_type=FILE, headers=headers)


@routes.get(
    "/api/providers/download-windows-exe", summary="Windows installer as an .exe",
    answers={200: Media(FILE, None, "The operator's file")}, errors=(404,), auth="open",
)  # fmt: skip
async def exe(request: web.Request) -> web.StreamResponse:
    """404 unless the operator has configured one (setting `agent_exe`): the installer for Windows is a script."""
    path = request.app[SETTINGS].agent_exe
    if not path or not await asyncio.to_thread(Path(path).is_file):
        raise NotFound(
            "No .exe has been built. The installer for Windows is a script: GET /api/providers/setup-windows."
        )
    return web.FileResponse(path, headers=attachment("poolgate-agent.exe"))


@routes.get(
    "/api/providers/daemon/windows", summary="Windows installer as an .exe",
    answers={200: Media(FILE, None, "The operator's file")}, errors=(404,), auth="open",
)  # fmt: skip
async def daemon_windows(request: web.Request) -> web.StreamResponse:
    """The same as download-windows-exe."""
    return await exe(request)


async def zipapp() -> Zipapp:
    """Made at the first question, which takes some 100 ms, and kept: 250 KB."""
    return await asyncio.to_thread(_zipapp)


@cache
def _zipapp() -> Zipapp:
    return build_zipapp()


def attachment(name: str) -> dict[str, str]:
    """Browsers save it by this name."""
    return {"content-disposition": f'attachment; filename="{name}"'}
