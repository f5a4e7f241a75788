"""Downloads a model from a Hugging Face hub (setting `model_source`) into a folder that is either whole or not there.

Goes on where it stopped, tells how far it is, and checks sizes and, where the hub has them, SHA-256. Which models are wanted
is the gateway's affair; pickles are never taken, since loading one runs its author's code.
"""

import asyncio
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

import aiohttp

from nodes.protocol import BadMessage, Fields

FILES = re.compile(r".*\.(safetensors|json|txt|model|jinja|tiktoken)$")
TOKEN_VARIABLE = "HF_TOKEN"  # noqa: S105 - a variable's name
NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
FILES_MAX = 2000
LISTING_BYTES_MAX = 8 * 2**20
PIECE_BYTES = 2**20
QUIET_S = 60.0  # without a byte
ATTEMPTS = 3
SPARE_BYTES = 2**30  # the disk is not filled to its last byte

Tell = Callable[[int, str], None]


class DownloadFailed(RuntimeError):
    """The model could not be had; the text says why."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """`sha256` is empty where the hub does not tell one."""

    path: str
    size: int
    sha256: str = ""


async def download_model(
    session: aiohttp.ClientSession, source: str, name: str, target: Path, tell: Tell
) -> None:
    """Have `name` in `target`. `tell(percent, words)` is called as it goes on. Raises DownloadFailed."""
    if NAME.fullmatch(name) is None:
        raise DownloadFailed(f"{name!r} is no name of a model on a hub")
    part = target.with_name(target.name + ".part")
    try:
        revision, files = await _listing(session, source, name)
        total = sum(file.size for file in files)
        part.mkdir(parents=True, exist_ok=True)
        _check_room(part, total)
        done = 0
        for file in files:
            before = done

            def moved(size: int, before: int = before) -> None:
                percent = 100 * (before + size) // max(1, total)
                tell(percent, f"{(before + size) / 2**20:.0f} of {total / 2**20:.0f} MiB")

            url = f"{source}/{name}/resolve/{quote(revision, safe='')}/{quote(file.path)}"
            await _have(session, url, file, part / file.path, moved)
            done += file.size
        await asyncio.to_thread(_finish, part, target, name)
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        raise DownloadFailed(f"{source}: {str(error) or type(error).__name__}") from error


async def _listing(
    session: aiohttp.ClientSession, source: str, name: str
) -> tuple[str, tuple[RemoteFile, ...]]:
    url = f"{source}/api/models/{name}/revision/main?blobs=true"
    async with session.get(url, headers=_headers(), timeout=aiohttp.ClientTimeout(total=QUIET_S)) as answer:
        if answer.status != 200:
            raise DownloadFailed(f"{source} answered {answer.status} for {name}")
        body = await answer.content.read(LISTING_BYTES_MAX)
    try:
        fields = Fields(json.loads(body), "listing")
        files = tuple(map(_remote_file, fields.items("siblings", FILES_MAX)))
        revision = fields.text("sha", required=True)
    except (ValueError, BadMessage) as error:
        raise DownloadFailed(f"{source} has no listing of {name} that can be read: {error}") from error
    wanted = tuple(file for file in files if FILES.fullmatch(file.path) and ".." not in file.path)
    names = {file.path for file in wanted}
    if "config.json" not in names or not any(path.endswith(".safetensors") for path in names):
        raise DownloadFailed(f"{name} has no config.json and safetensors")
    return revision, wanted


def _remote_file(value: object) -> RemoteFile:
    fields = Fields(value, "siblings[]")
    path = fields.text("rfilename", required=True)
    if PurePosixPath(path).is_absolute():
        raise BadMessage("siblings[].rfilename must be relative")
    lfs = Fields(fields.facts("lfs"), "lfs")
    return RemoteFile(path, fields.count("size"), lfs.text("sha256"))


async def _have(
    session: aiohttp.ClientSession, url: str, file: RemoteFile, path: Path, moved: Callable[[int], None]
) -> None:
    """The file, whole and checked, at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if _size(path) == file.size:
        moved(file.size)
        return
    partial = path.with_name(path.name + ".partial")
    for attempt in range(ATTEMPTS):
        try:
            await _fetch(session, url, partial, file, moved)
        except (aiohttp.ClientError, TimeoutError):
            if attempt + 1 == ATTEMPTS:
                raise
            continue
        break
    size, digest = await asyncio.to_thread(_digest, partial)
    if size != file.size or (file.sha256 and digest != file.sha256):
        partial.unlink()
        raise DownloadFailed(f"{file.path} did not come as the hub describes it")
    partial.rename(path)


async def _fetch(
    session: aiohttp.ClientSession, url: str, partial: Path, file: RemoteFile, moved: Callable[[int], None]
) -> None:
    """Go on at the end of what is there."""
    have = _size(partial)
    if have == file.size:
        return
    if not 0 < have < file.size:
        have = 0  # written anew
    headers = {**_headers(), **({"Range": f"bytes={have}-"} if have else {})}
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=QUIET_S, sock_read=QUIET_S)
    async with session.get(url, headers=headers, timeout=timeout) as answer:
        if answer.status not in (200, 206):
            raise DownloadFailed(f"{file.path}: the hub answered {answer.status}")
        if answer.status == 200:
            have = 0
        with partial.open("ab" if have else "wb") as output:
            async for piece in answer.content.iter_chunked(PIECE_BYTES):
                have += len(piece)
                if have > file.size:
                    raise DownloadFailed(f"{file.path} is larger than the hub said")
                await asyncio.to_thread(output.write, piece)
                moved(have)


def _finish(part: Path, target: Path, name: str) -> None:
    """The name that turns use is not the folder's."""
    (part / "poolgate.json").write_text(json.dumps({"name": name}) + "\n")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)


def _check_room(folder: Path, total: int) -> None:
    free = shutil.disk_usage(folder).free
    have = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    if total - have + SPARE_BYTES > free:
        raise DownloadFailed(f"it has {total // 2**20} MiB and the disk {free // 2**20} MiB left")


def _size(path: Path) -> int:
    """-1 where there is none."""
    return path.stat().st_size if path.exists() else -1


def _digest(path: Path) -> tuple[int, str]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        return file.tell(), digest.hexdigest()


def _headers() -> dict[str, Any]:
    """aiohttp drops this header where a redirect leads to another host."""
    token = os.environ.get(TOKEN_VARIABLE)
    return {"Authorization": f"Bearer {token}"} if token else {}
