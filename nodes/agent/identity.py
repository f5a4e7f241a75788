"""The node's name to the gateway: an id kept in the data folder, which only one agent may use at a time."""

import fcntl
import hashlib
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class NodeInUse(RuntimeError):
    """Another agent runs on this data folder."""


@contextmanager
def node_identity(data_dir: Path) -> Iterator[str]:
    """The node's id, made at the first start; raises `NodeInUse`. Two agents of one id would end each other's
    engines in the gateway's eyes."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with (data_dir / "agent.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise NodeInUse(f"another agent runs on {data_dir}: stop it or use another --data-dir") from None
        yield _read_or_make(data_dir / "node_id")


def _read_or_make(path: Path) -> str:
    """An id that came to this machine with another one's disk is that one's: a new one is made."""
    machine, known = _machine(), path.with_name("machine")
    try:
        node_id = str(uuid.UUID(path.read_text().strip()))
        is_copied = bool(machine) and known.exists() and known.read_text().strip() not in ("", machine)
    except (FileNotFoundError, ValueError):
        is_copied, node_id = True, ""
    if is_copied:
        node_id = str(uuid.uuid4())
        part = path.with_name("node_id.part")
        part.write_text(node_id + "\n")
        part.replace(path)
    if machine:
        known.write_text(machine + "\n")
    return node_id


def _machine() -> str:
    """Tells machines apart by systemd's id, hashed, since it is not to be shown. Empty where there is none, as in many
    containers, whose names change with each start."""
    try:
        machine = Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""
    return hashlib.sha256(f"poolgate {machine}".encode()).hexdigest()[:16] if machine else ""
