"""TLS by certificate files, which may be renewed under a running gateway.

New handshakes use the newest pair that could be loaded; a pair that can't be is logged and changes nothing.
"""

import asyncio
import logging
import ssl
from pathlib import Path
from typing import Self

from config.defaults import Settings
from config.settings import BadSetting

log = logging.getLogger("poolgate.tls")

CHECK_S = 5.0
"""How often the files' times are looked at: a renewal has days, and two calls of the system cost nothing."""

ALPN = ["http/1.1"]

_Stamp = tuple[tuple[int, int, int], ...]


class CertificateUnusable(Exception):
    """The certificate or its key can't be read, or they are not a pair."""


class TlsFiles:
    """`context` is for servers, and stays the same object for life; `run` watches the files."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises CertificateUnusable."""
        self._certificate, self._key = certificate, key
        self._stamp = self._stamp_now()
        self._current = self._load()
        self.context = _empty_context()
        # A pair is taken as a whole or not at all. Loading a new one into a context in use can't promise that: when it fails
        # halfway, the old key is gone.
        self.context.sni_callback = self._use_current

    @classmethod
    def of(cls, settings: Settings) -> Self | None:
        """As set; None for plain HTTP. Raises CertificateUnusable."""
        if not settings.tls_certificate:
            return None
        return cls(Path(settings.tls_certificate), Path(settings.tls_key))

    async def run(self) -> None:
        """Take renewed files up, until cancelled."""
        while True:
            await asyncio.sleep(CHECK_S)
            self.refresh()

    def refresh(self) -> bool:
        """Whether the files changed and the new pair is in use."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return False
        self._stamp = (
            stamp  # told once: half a renewal is followed by its other half, which is a change again
        )
        try:
            self._current = self._load()
        except CertificateUnusable as error:
            log.error(  # noqa: TRY400 - a file to mend, no fault of ours
                "%s: the certificate in use stays", error, extra={"action": "certificate_unusable"}
            )
            return False
        log.info("a renewed certificate is in use", extra={"action": "certificate_renewed"})
        return True

    def _load(self) -> ssl.SSLContext:
        context = _empty_context()
        try:
            # An encrypted key would ask at the terminal for its password.
            context.load_cert_chain(self._certificate, self._key, password="")
        except (OSError, ValueError) as error:
            raise CertificateUnusable(
                f"the TLS certificate {self._certificate} with key {self._key} can't be used: {error}"
            ) from error
        return context

    def _stamp_now(self) -> _Stamp:
        """Changes whenever a file does; empty while one is missing."""
        try:
            found = [path.stat() for path in (self._certificate, self._key)]
        except OSError:
            return ()
        return tuple((file.st_mtime_ns, file.st_ino, file.st_size) for file in found)

    def _use_current(self, connection: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """OpenSSL asks in every handshake, whether or not the client names a server."""
        connection.context = self._current


def check_certificate(settings: Settings) -> None:
    """Raises BadSetting: told once, instead of by each worker that can't start."""
    try:
        TlsFiles.of(settings)
    except CertificateUnusable as error:
        raise BadSetting(f"tls_certificate, tls_key: {error}") from error


def _empty_context() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # a client could make us compute for nothing
    context.set_alpn_protocols(ALPN)
    return context
