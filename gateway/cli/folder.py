"""Owns that one `poolgate up` at a time uses a data folder.

The lock of the stores themselves is config/embedded.py's; this one also holds where the stores are elsewhere.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gateway.cli.output import Refused


@contextmanager
def own(data_dir: Path, address: str) -> Iterator[None]:
    """Hold the folder while the block runs; Refused names who holds it already, and where it answers."""
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(data_dir / "up.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise Refused(
            f"the data folder {data_dir} can't be used ({error.strerror}): name another one with --data-dir"
        ) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid, _, where = os.pread(lock, 512, 0).decode(errors="replace").strip().partition(" ")
            raise Refused(
                f"poolgate already runs on the data folder {data_dir} (process {pid or 'unknown'}, {where}): "
                "stop that one, or name another folder with --data-dir"
            ) from None
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()} {address}\n".encode(), 0)
        yield
    finally:
        os.close(lock)
