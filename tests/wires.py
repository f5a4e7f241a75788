"""A client of the edge that sends any bytes, and requests as bytes."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self

from tests.gateways import MODEL, TestGateway

PATH = "/v1/chat/completions"
ASK = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
STREAM = ASK | {"stream": True}
HOST, JSON = "host: x", "content-type: application/json"


@dataclass
class Reply:
    """One answer as it came."""

    status: int
    headers: dict[str, str]
    body: bytes
    version: str = "HTTP/1.1"

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


class Wire:
    """A client that sends any bytes and reads answers one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def send(self, data: bytes) -> Self:
        self.writer.write(data)
        await self.writer.drain()
        return self

    async def reply(self, *, to: str = "POST") -> Reply:
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        line, *fields = head.rstrip("\r\n").split("\r\n")
        version, status, _ = line.split(" ", 2)
        headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
        body = b""
        if to == "HEAD" or int(status) in (100, 204):
            pass
        elif headers.get("transfer-encoding") == "chunked":
            while (size := int(await self.reader.readline(), 16)) > 0:
                body += (await self.reader.readexactly(size + 2))[:-2]
            await self.reader.readline()
        elif "content-length" in headers:
            body = await self.reader.readexactly(int(headers["content-length"]))
        else:
            body = await self.reader.read()
        return Reply(int(status), headers, body, version)

    async def is_closed(self) -> bool:
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True


@asynccontextmanager
async def wire(gw: TestGateway, *, tls: ssl.SSLContext | None = None) -> AsyncIterator[Wire]:
    host, port = gw.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port), limit=2**22, ssl=tls)
    try:
        yield Wire(reader, writer)
    finally:
        writer.close()


def request(
    gw: TestGateway,
    body: bytes = b"",
    *headers: str,
    line: str = f"POST {PATH} HTTP/1.1",
    length: bool = True,
) -> bytes:
    lines = [line, HOST, JSON, f"authorization: Bearer {gw.key}", *headers]
    if length:
        lines.append(f"content-length: {len(body)}")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1") + body


def chat(gw: TestGateway, body: Any = ASK, *headers: str, **options: Any) -> bytes:
    return request(gw, json.dumps(body).encode(), *headers, **options)


def get(path: str, *headers: str) -> bytes:
    return ("\r\n".join([f"GET {path} HTTP/1.1", HOST, *headers]) + "\r\n\r\n").encode()


def is_openai(reply: Reply, status: int, code: str | None) -> bool:
    """OpenAI's envelope, whole, with a request id."""
    assert reply.status == status, reply
    assert set(reply.error) == {"message", "type", "param", "code"}
    assert reply.error["code"] == code, reply.error
    assert reply.error["message"]
    assert reply.headers["content-type"].startswith("application/json")
    assert reply.headers["x-request-id"].startswith("req_")
    return True
