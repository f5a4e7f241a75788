"""TLS to whoever has a certificate of a known fingerprint: no name and no authority is asked, and nobody else will do."""

import asyncio
import hashlib
import hmac
import ssl
from collections.abc import Callable
from typing import Any


class WrongCertificate(ConnectionError):
    """Somebody else answers at that address."""


def pinning_context() -> ssl.SSLContext:
    """For `connect_pinned`: what is checked there OpenSSL need not check."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols(["http/1.1"])
    return context


async def connect_pinned(
    factory: Callable[[], asyncio.Protocol],
    host: str,
    port: int,
    *,
    fingerprint: str,
    context: ssl.SSLContext,
) -> None:
    """Nothing was sent but the handshake when it raises OSError, or WrongCertificate. `fingerprint`: SHA-256, in hex."""
    loop = asyncio.get_running_loop()
    transport, _ = await loop.create_connection(factory, host, port, ssl=context)
    connection: Any = transport.get_extra_info("ssl_object")
    certificate = connection.getpeercert(binary_form=True) or b""
    if not hmac.compare_digest(hashlib.sha256(certificate).hexdigest(), fingerprint):
        transport.abort()
        raise WrongCertificate("another certificate than the agent's")
