"""Installer scripts for GPU hosts, with the gateway's address and the provider's key filled in.

GET /api/providers/setup, setup-windows, download, download/setup, installer, daemon/linux. The scripts are in `installers`.
"""

import re
import shlex
from importlib import resources
from typing import Literal

from aiohttp import web

from gateway.api.credentials import authenticate, presented_key
from gateway.api.provider.downloads import attachment, exe, zipapp
from gateway.api.routes import Media, Query, Routes
from gateway.api.services import SETTINGS
from gateway.errors import BadRequest
from nodes.agent.package import REQUIREMENTS

routes = Routes(surface="plain", tag="Providers")

HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(:\d{1,5})?|\[[0-9A-Fa-f:.]{2,45}\](:\d{1,5})?")
KEY_QUERY = Query("key", str, "Provider key; or in the header x-provider-key")
SHELL, PLAIN, FILE = "text/x-shellscript", "text/plain", "application/octet-stream"
SHELL_NAME, POWERSHELL_NAME = "poolgate-install.sh", "poolgate-install.ps1"
LINUX, MAC, WINDOWS = "linux", "mac", "windows"


@routes.get(
    "/api/providers/setup", summary="Installer script for Linux and macOS", query=(KEY_QUERY,),
    answers={200: Media(SHELL, None, "A shell script")}, errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def setup(request: web.Request) -> web.StreamResponse:
    """With the key filled in: `curl -fsSL '.../api/providers/setup?key=KEY' | sh` sets up the agent and ends with the node
    online."""
    return script(await shell_script(request, await _key(request)), SHELL)


@routes.get(
    "/api/providers/setup-windows", summary="Installer script for Windows", query=(KEY_QUERY,),
    answers={200: Media(PLAIN, None, "A PowerShell script")}, errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def setup_windows(request: web.Request) -> web.StreamResponse:
    """With the key filled in: it sets up the agent inside WSL 2, where vLLM runs on Windows, and a scheduled task."""
    return script(powershell_script(request, await _key(request)), PLAIN)


@routes.get(
    "/api/providers/download", summary="Installer script as a file",
    query=(KEY_QUERY, Query("platform", Literal["linux", "mac", "darwin", "windows"], "Default: linux")),
    answers={200: Media(FILE, None, "A script")}, errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def download(request: web.Request) -> web.StreamResponse:
    """The script of `setup` or `setup-windows`, to be saved."""
    system = _choice(request, "platform", {LINUX: LINUX, MAC: MAC, "darwin": MAC, WINDOWS: WINDOWS}, LINUX)
    return await _file(request, system, await _key(request), FILE)


@routes.get(
    "/api/providers/download/setup", summary="Installer script by system",
    query=(KEY_QUERY, Query("os", Literal["windows", "linux", "mac"], "Default: linux")),
    answers={200: (Media(SHELL, None, "A script"), Media(PLAIN, None, "A PowerShell script"))},
    errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def download_setup(request: web.Request) -> web.StreamResponse:
    """The one line that sets up a host: `curl -fsSL '.../api/providers/download/setup?key=KEY' | bash`."""
    system = _choice(request, "os", {LINUX: LINUX, MAC: MAC, WINDOWS: WINDOWS}, LINUX)
    return await _file(request, system, await _key(request), PLAIN if system == WINDOWS else SHELL)


@routes.get(
    "/api/providers/installer", summary="Installer by system",
    query=(KEY_QUERY, Query("os", Literal["Windows", "Linux", "Mac"], "", required=True)),
    answers={200: Media(FILE, None, "A script, or on Windows the .exe where the operator has one")},
    errors=(400, 401, 403, 503), auth="node",
)  # fmt: skip
async def installer(request: web.Request) -> web.StreamResponse:
    """What there is for a system: the .exe for Windows if the operator configured one, else the script."""
    system = _choice(request, "os", {"Linux": LINUX, "Mac": MAC, "Windows": WINDOWS}, "")
    key = await _key(request)
    if system == WINDOWS and request.app[SETTINGS].agent_exe:
        return await exe(request)
    return await _file(request, system, key, FILE)


@routes.get(
    "/api/providers/daemon/linux", summary="Installer script for Linux, without a key",
    answers={200: Media(SHELL, None, "A shell script")}, errors=(400, 404), auth="open",
)  # fmt: skip
async def daemon_linux(request: web.Request) -> web.StreamResponse:
    """As `setup`; the key is read from POOLGATE_AGENT_KEY when it runs."""
    return script(await shell_script(request, ""), SHELL, SHELL_NAME)


async def shell_script(request: web.Request, key: str) -> str:
    """For Linux and macOS."""
    app = await zipapp()
    values = {
        "GATEWAY": gateway_url(request), "KEY": key, "SHA256": app.sha256, "REQUIREMENTS": " ".join(REQUIREMENTS),
    }  # fmt: skip
    return filled("install.sh", {name: shlex.quote(value) for name, value in values.items()})


def powershell_script(request: web.Request, key: str) -> str:
    """For Windows."""
    values = {"GATEWAY": gateway_url(request), "KEY": key}
    return filled(
        "install.ps1", {name: "'" + value.replace("'", "''") + "'" for name, value in values.items()}
    )


def filled(name: str, values: dict[str, str]) -> str:
    """A script of `installers` with `@NAME@` replaced by values that are quoted already."""
    text = resources.files("gateway.api.provider").joinpath("installers", name).read_text("utf-8")
    return re.sub(r"@([A-Z0-9]+)@", lambda match: values[match[1]], text)


def gateway_url(request: web.Request) -> str:
    """Where hosts reach this gateway: as the operator says, or as the one who asks has reached it. Raises BadRequest."""
    settings = request.app[SETTINGS]
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = request.headers.get("host", "")
    if HOST.fullmatch(host) is None:
        raise BadRequest("The Host header does not name this gateway.")
    return f"{request.scheme}://{host}"


def script(text: str, media_type: str, name: str = "") -> web.Response:
    """Never kept anywhere: it may have a key in it."""
    headers = {"cache-control": "no-store", **(attachment(name) if name else {})}
    return web.Response(text=text, content_type=media_type, charset="utf-8", headers=headers)


async def _file(request: web.Request, system: str, key: str, media_type: str) -> web.Response:
    if system == WINDOWS:
        return script(powershell_script(request, key), media_type, POWERSHELL_NAME)
    return script(await shell_script(request, key), media_type, SHELL_NAME)


async def _key(request: web.Request) -> str:
    """The key that was presented, once it is known to be a provider's."""
    await authenticate(request, "node")
    key = presented_key(request)
    assert key is not None
    return key


def _choice(request: web.Request, name: str, choices: dict[str, str], otherwise: str) -> str:
    given = request.query.get(name) or otherwise
    for choice, system in choices.items():
        if given.lower() == choice.lower():
            return system
    raise BadRequest(f"{name} must be one of {', '.join(choices)}.", param=name)
