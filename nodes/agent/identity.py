"""The node's name to the gateway: an id kept in the data folder, which only one agent may use at a time."""

import fcntl
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
    try:
        return str(uuid.UUID(path.read_text().strip()))
    except (FileNotFoundError, ValueError):
        node_id = str(uuid.uuid4())
        part = path.with_name("node_id.part")
        part.write_text(node_id + "\n")
        part.replace(path)
        return node_id
