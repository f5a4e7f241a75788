"""The agent's data listener: TLS on the address that the agent advertises, with a certificate that it makes itself.

No authority vouches for it: the agent tells its fingerprint in heartbeats, and gateways take that certificate and no other.
What may be asked there is `doorway`'s.
"""

import asyncio
import datetime
import hashlib
import os
import ssl
from pathlib import Path

from nodes.agent.doorway import Doorway

HANDSHAKE_S = 10.0
BACKLOG = 1024
VALID = datetime.timedelta(days=3650)
RENEWED_BEFORE = datetime.timedelta(days=30)


class CannotListen(RuntimeError):
    """The listener can't be started; the text says why."""


class Listener:
    """`await start()`, then `fingerprint` is what is to be told."""

    def __init__(self, door: Doorway, folder: Path, host: str, port: int) -> None:
        self._door = door
        self._file = folder / "listener.pem"
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None
        self.fingerprint = ""

    @property
    def port(self) -> int:
        """The one it has, also if it was asked for any (0)."""
        assert self._server is not None, "not started"
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Raises CannotListen."""
        try:
            context, self.fingerprint = await asyncio.to_thread(listener_context, self._file)
        except ImportError:
            words = "a listener's certificate needs the package cryptography: install it, or leave --advertise away"
            raise CannotListen(words) from None
        try:
            self._server = await asyncio.get_running_loop().create_server(
                self._door.from_outside, self._host or None, self._port, ssl=context, backlog=BACKLOG,
                ssl_handshake_timeout=HANDSHAKE_S,
            )  # fmt: skip
        except OSError as error:
            where = f"{self._host or '*'}:{self._port}"
            raise CannotListen(
                f"can't listen on {where}: {error.strerror or error}; choose another --listen"
            ) from None

    def close(self) -> None:
        """Take no more connections; those that are open are the doorway's."""
        if self._server is not None:
            self._server.close()


def listener_context(file: Path) -> tuple[ssl.SSLContext, str]:
    """A server's side with the certificate in `file`, made if there is none or it ends soon; and its fingerprint."""
    # Here: it takes memory, and only an agent that advertises an address needs it.
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    now = datetime.datetime.now(datetime.UTC)
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
        is_good = certificate.not_valid_after_utc - RENEWED_BEFORE > now
    except (OSError, ValueError):
        is_good = False
    if not is_good:
        _make(file, now)
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    context.load_cert_chain(file)
    der = certificate.public_bytes(serialization.Encoding.DER)
    return context, hashlib.sha256(der).hexdigest()


def _make(file: Path, now: datetime.datetime) -> None:
    """Key and certificate in one file that its owner alone may read, whole or not at all."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "poolgate node")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # clocks differ
        .not_valid_after(now + VALID)
        .sign(key, hashes.SHA256())
    )
    pem, pkcs8, plain = (
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(file.name + ".part")
    part.unlink(missing_ok=True)
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as output:
        output.write(key.private_bytes(pem, pkcs8, plain) + certificate.public_bytes(pem))
    part.replace(file)
