"""Answers that are kept for a while, encrypted, so that whoever reads the database reads no one's conversation.

AES-256-GCM under keys derived from the installation's pepper; where the sealed bytes are kept is others' business.
"""

import hashlib
import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

NONCE_BYTES = 12
"""GCM's own size. Random ones are safe for 2³² messages under a key (NIST SP 800-38D, 8.3), a year of 136 a second."""

KEY_BYTES = 32


class Unreadable(Exception):
    """The bytes were not sealed here for this account and key: another pepper, or somebody changed them."""


class Sealer:
    """Seals, opens and marks with keys that nothing but the pepper gives (HKDF-SHA256, RFC 5869)."""

    def __init__(self, pepper: bytes) -> None:
        self._cipher = AESGCM(_derived(pepper, b"poolgate idempotency answer 1"))
        self._mark_key = _derived(pepper, b"poolgate idempotency request 1")

    def seal(self, account_id: int, key: str, answer: bytes) -> bytes:
        """The nonce and `answer` encrypted: it opens for this account and key only."""
        nonce = os.urandom(NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, answer, _whose(account_id, key))

    def open(self, account_id: int, key: str, sealed: bytes) -> bytes:
        """What was sealed. Raises Unreadable."""
        try:
            return self._cipher.decrypt(sealed[:NONCE_BYTES], sealed[NONCE_BYTES:], _whose(account_id, key))
        except (InvalidTag, ValueError) as error:  # ValueError: too short to have a nonce
            raise Unreadable(f"{len(sealed)} bytes of account {account_id} can't be opened") from error

    def mark(self, *parts: bytes) -> bytes:
        """32 bytes by which a request is known again, and nobody without the pepper can test a guess of what it was."""
        digest = hmac.new(self._mark_key, digestmod=hashlib.sha256)
        for part in parts:  # with its length, so that no part can end in another
            digest.update(len(part).to_bytes(8, "big") + part)
        return digest.digest()


def _derived(pepper: bytes, purpose: bytes) -> bytes:
    return HKDF(algorithm=hashes.SHA256(), length=KEY_BYTES, salt=None, info=purpose).derive(pepper)


def _whose(account_id: int, key: str) -> bytes:
    return account_id.to_bytes(8, "big") + key.encode()
