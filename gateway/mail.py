"""Mail: a text to one address, by SMTP or, in developer mode, into a folder; without either there is none.

What is written, and to whom, is decided by whoever asks. An address or a text never reaches a log.
"""

import asyncio
import os
from email.errors import MessageError
from email.message import EmailMessage
from email.utils import formatdate, make_msgid
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

import aiosmtplib

from config.defaults import Settings
from config.ids import uuid7

TIMEOUT_S = 20.0
"""Of each step with the server; nobody waits for it."""

LOOPBACK = ("localhost", "127.0.0.1", "::1")
PORTS = {"smtp": 587, "smtps": 465}


class MailFailed(Exception):
    """The server did not take the mail; the text says why, without the address."""


class Mailer(Protocol):
    """Sends one text."""

    async def send(self, to: str, subject: str, text: str) -> None:
        """Raises MailFailed."""
        ...


def mailer_of(settings: Settings) -> Mailer | None:
    """What the settings ask for; None: mail can't be sent."""
    if settings.mail_url:
        return SmtpMailer(settings.mail_url, settings.mail_from)
    if settings.developer_mode:
        return FolderMailer(Path(settings.data_dir) / "mail", settings.mail_from)
    return None


class SmtpMailer:
    """One connection a mail: there are few."""

    def __init__(self, url: str, sender: str) -> None:
        parts = urlsplit(url)
        self._sender = sender
        self._host = parts.hostname or ""
        self._port = parts.port or PORTS[parts.scheme]
        self._user = unquote(parts.username) if parts.username else None
        self._password = unquote(parts.password) if parts.password else None
        self._is_tls = parts.scheme == "smtps"
        # A password travels in the clear within this machine only.
        needs_tls = self._password is not None and not self._is_tls and self._host not in LOOPBACK
        self._starts_tls = True if needs_tls else None  # None: where it is offered

    def __repr__(self) -> str:
        return f"<SmtpMailer {self._host}:{self._port}>"

    async def send(self, to: str, subject: str, text: str) -> None:
        """Raises MailFailed."""
        try:
            await aiosmtplib.send(
                _message(self._sender, to, subject, text), hostname=self._host, port=self._port,
                username=self._user, password=self._password, use_tls=self._is_tls, start_tls=self._starts_tls,
                timeout=TIMEOUT_S,
            )  # fmt: skip
        except (aiosmtplib.SMTPException, OSError, TimeoutError, ValueError, MessageError) as error:
            raise MailFailed(type(error).__name__) from error


class FolderMailer:
    """A file a mail, for its developer to read."""

    def __init__(self, folder: Path, sender: str) -> None:
        self._folder = folder
        self._sender = sender

    async def send(self, to: str, subject: str, text: str) -> None:
        """Raises MailFailed."""
        try:
            await asyncio.to_thread(self._write, _message(self._sender, to, subject, text).as_bytes())
        except (OSError, ValueError, MessageError) as error:
            raise MailFailed(type(error).__name__) from error

    def _write(self, content: bytes) -> None:
        """Whole or not at all: it appears under its name when it is written."""
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        file = self._folder / f"{uuid7()}.eml"
        draft = file.with_suffix(".part")
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
            stream.write(content)
        draft.rename(file)


def _message(sender: str, to: str, subject: str, text: str) -> EmailMessage:
    message = EmailMessage()
    message["From"], message["To"], message["Subject"] = sender, to, subject
    message["Date"] = formatdate()
    message["Message-ID"] = make_msgid(domain=sender.rpartition("@")[2])
    message["Auto-Submitted"] = "auto-generated"
    message.set_content(text)
    return message
