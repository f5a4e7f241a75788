"""The secrets that come from the installation's pepper: nothing of them is stored, and every worker finds the same."""

import hashlib
import hmac


def node_token(pepper: bytes, account_id: int, node_id: str) -> str:
    """By which a node's listener knows a gateway. Another provider's node of the same id has another one."""
    return hmac.digest(pepper, f"node-token:{account_id}:{node_id}".encode(), hashlib.sha256).hex()


def hop_secret(pepper: bytes) -> bytes:
    """By which workers know each other."""
    return hmac.digest(pepper, b"hop", hashlib.sha256)
