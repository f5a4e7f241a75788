"""TLS over real handshakes: what is offered, and what a renewal of the files does."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509

from config.settings import BadSetting, load_settings
from gateway.tls import CertificateUnusable, TlsFiles, check_certificate
from tests.certificates import write_pair


@dataclass
class Server:
    """Something that shakes hands."""

    files: TlsFiles
    folder: Path
    port: int

    async def serial(self, **limits: ssl.TLSVersion) -> int:
        """Of the certificate that a new connection gets."""
        return await asyncio.to_thread(self._serial, **limits)

    def _serial(self, **limits: ssl.TLSVersion) -> int:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        context.set_alpn_protocols(["h2", "http/1.1"])
        for name, version in limits.items():
            setattr(context, name, version)
        # Without a server name: the certificate must be found all the same.
        client = socket.create_connection(("127.0.0.1", self.port), timeout=10)
        with context.wrap_socket(client) as secure:
            assert secure.selected_alpn_protocol() == "http/1.1"
            found = secure.getpeercert(binary_form=True)
        assert found is not None
        return x509.load_der_x509_certificate(found).serial_number

    @property
    def serial_on_disk(self) -> int:
        return x509.load_pem_x509_certificate((self.folder / "chain.pem").read_bytes()).serial_number


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[Server]:
    files = TlsFiles(*write_pair(tmp_path))

    class Quiet(asyncio.Protocol):
        pass

    loop = asyncio.get_running_loop()
    async with await loop.create_server(Quiet, "127.0.0.1", 0, ssl=files.context) as listening:
        yield Server(files, tmp_path, listening.sockets[0].getsockname()[1])


async def test_a_renewed_pair_is_used_by_the_next_handshake(server: Server):
    assert await server.serial() == server.serial_on_disk
    before = server.serial_on_disk
    assert not server.files.refresh(), "nothing changed"
    write_pair(server.folder)
    assert server.files.refresh()
    assert await server.serial() == server.serial_on_disk != before


@pytest.mark.parametrize("broken", ["no PEM", "gone", "half renewed", "with a password"])
async def test_a_broken_new_pair_changes_nothing_and_is_told_once(
    server: Server, broken: str, caplog: pytest.LogCaptureFixture
):
    before = server.serial_on_disk
    if broken == "no PEM":
        (server.folder / "chain.pem").write_text("-----BEGIN CERTIFICATE-----\nnothing\n")
    elif broken == "gone":
        (server.folder / "key.pem").unlink()
    elif broken == "half renewed":
        old_key = (server.folder / "key.pem").read_bytes()
        write_pair(server.folder)
        (server.folder / "key.pem").write_bytes(old_key)
    else:
        write_pair(server.folder, password=b"secret")
    assert [server.files.refresh() for _ in range(3)] == [False] * 3
    assert [record.action for record in caplog.records] == ["certificate_unusable"]  # type: ignore[attr-defined]
    assert await server.serial() == before
    write_pair(server.folder)
    assert server.files.refresh()
    assert await server.serial() == server.serial_on_disk != before


async def test_what_is_older_than_tls_1_2_is_refused(server: Server):
    newest = server.serial_on_disk
    assert await server.serial(maximum_version=ssl.TLSVersion.TLSv1_2) == newest
    assert await server.serial(minimum_version=ssl.TLSVersion.TLSv1_3) == newest
    assert server.files.context.minimum_version == ssl.TLSVersion.TLSv1_2


def test_files_that_can_not_be_used_are_refused_at_the_start(tmp_path: Path):
    chain, key = write_pair(tmp_path)
    settings = load_settings(environ={}, tls_certificate=str(chain), tls_key=str(key))
    check_certificate(settings)
    assert TlsFiles.of(load_settings(environ={})) is None
    key.unlink()
    with pytest.raises(BadSetting, match=f"{chain} with key {key} can't be used"):
        check_certificate(settings)
    with pytest.raises(CertificateUnusable):
        TlsFiles.of(settings)
