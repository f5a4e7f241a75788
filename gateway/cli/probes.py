"""Owns what `poolgate up` and `doctor` ask over HTTP: does the gateway answer, which models can it serve?

What to do about the answers is up to them.
"""

import http.client
import json
import socket
from typing import Any
from urllib.parse import urlsplit

PROBE_TIMEOUT_S = 2.0
ANSWER_BYTES_MAX = 4 * 2**20


def get_json(url: str, *, timeout_s: float = PROBE_TIMEOUT_S) -> tuple[int, Any]:
    """Status and decoded body of a GET; OSError when there is no such answer. No proxies, no redirects."""
    parts = urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=timeout_s)
    try:
        connection.request("GET", parts.path or "/", headers={"Accept": "application/json"})
        answer = connection.getresponse()
        return answer.status, json.loads(answer.read(ANSWER_BYTES_MAX))
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(f"{url} gave no JSON: {error}") from error
    finally:
        connection.close()


def answers(base_url: str) -> bool:
    """True once the gateway has opened its routes, healthy or not."""
    try:
        get_json(f"{base_url}/api/health")
    except OSError:
        return False
    return True


def available_models(base_url: str) -> list[str]:
    """Models that a turn can be served with now."""
    try:
        _, body = get_json(f"{base_url}/v1/models")
        return [entry["id"] for entry in body["data"] if entry.get("available")]
    except (OSError, LookupError, TypeError, AttributeError):
        return []


def why_port_is_taken(host: str, port: int) -> str:
    """Empty when a listener can be opened there, else why not."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        return f"the address {host!r} is not known here ({error.strerror})"
    for family, kind, protocol, _, address in addresses:
        try:
            with socket.socket(family, kind, protocol) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
        except PermissionError:
            return f"ports below 1024 need rights that this user lacks, and {port} is one"
        except OSError as error:
            return f"port {port} on {host} can't be used ({error.strerror})"
    return ""


def reachable_base_url(host: str, port: int) -> str:
    """How this machine reaches a gateway that listens on `host`."""
    own = {"0.0.0.0": "127.0.0.1", "": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - told apart, not bound
    return f"http://{f'[{own}]' if ':' in own else own}:{port}"
