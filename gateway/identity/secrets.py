"""API key secrets: how they are made, hashed and shown to people; they are stored and logged nowhere.

The pepper makes the hashes useless without this installation; accounts and keys are other modules' business.
"""

import contextlib
import hmac
import os
import secrets
from pathlib import Path

from config.defaults import Settings

SECRET_BYTES = 24
"""192 random bits: past guessing, so one plain HMAC suffices and a look-up stays cheap."""

PEPPER_CHARS_MIN = 16
SECRET_CHARS_MIN, SECRET_CHARS_MAX = 8, 512
"""Of a secret that a person brings along; ours have 48 hex digits after their prefix."""


def new_secret(prefix: str) -> str:
    """A fresh key secret: `prefix` and 48 hexadecimal digits."""
    return prefix + secrets.token_hex(SECRET_BYTES)


def hash_secret(pepper: bytes, secret: str) -> bytes:
    """What is stored and looked up in place of the secret: HMAC-SHA256, 32 bytes.

    Comparing digests by look-up leaks nothing of use: without the pepper nobody can choose what a guess
    hashes to.
    """
    return hmac.digest(pepper, secret.encode("utf-8", "surrogatepass"), "sha256")


def display_prefix(secret: str) -> str:
    """The start of a secret, by which its owner may recognise it: never more than is safe to show."""
    head = max(secret.rfind("-"), secret.rfind("_")) + 1
    if len(secret) - head >= SECRET_BYTES:
        return secret[: head + 6]
    return secret[: min(6, len(secret) // 4)]


def check_secret(secret: str) -> None:
    """ValueError unless a secret that a person brings along fits a header and is not trivially short."""
    fits = SECRET_CHARS_MIN <= len(secret) <= SECRET_CHARS_MAX
    if not fits or not secret.isascii() or any(c <= " " or c == "\x7f" for c in secret):
        raise ValueError(
            f"a key has {SECRET_CHARS_MIN} to {SECRET_CHARS_MAX} printable ASCII characters without spaces"
        )


def load_pepper(settings: Settings) -> bytes:
    """This installation's pepper: the setting, or a file in the data folder, made once with mode 0600."""
    if settings.key_pepper:
        return _checked(settings.key_pepper, "the setting key_pepper")
    file = Path(settings.data_dir) / "pepper"
    if not file.exists():
        _create(file)
    return _checked(file.read_text("ascii").strip(), str(file))


def _create(file: Path) -> None:
    """Whole or not at all, and by one of several processes at once: a link never replaces a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".pepper-{os.getpid()}-{secrets.token_hex(4)}")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(handle, "w", encoding="ascii") as stream:
            stream.write(secrets.token_hex(32) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
    finally:
        draft.unlink()


def _checked(text: str, where: str) -> bytes:
    if len(text) < PEPPER_CHARS_MIN:
        raise ValueError(f"{where}: a pepper of at least {PEPPER_CHARS_MIN} characters is expected")
    return text.encode()
