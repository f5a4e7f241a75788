"""A place for an engine's temporary files: vLLM leaves sockets and folders behind whenever it is killed.

What is put there is the engine's affair.
"""

import shutil
import tempfile
from pathlib import Path

# vLLM's sockets are named by a UUID, and the path of a unix socket has 107 bytes at most.
PREFIX = "poolgate-engine-"
PATH_BYTES_MAX = 107 - len("/") - 36


class Scratch:
    """`make()` gives an empty folder at `path`: the wanted one or, if its path is too long, one in the system's
    temporary folder with a link to it at the wanted place, by which the next `make()` finds and removes it."""

    def __init__(self, wanted: Path) -> None:
        self._wanted = wanted.absolute()
        self.path = self._wanted

    def make(self) -> None:
        self.remove()
        if len(str(self._wanted).encode()) <= PATH_BYTES_MAX:
            self._wanted.mkdir(parents=True)
            return
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._wanted.parent.mkdir(parents=True, exist_ok=True)
        self._wanted.symlink_to(self.path)

    def remove(self) -> None:
        if self._wanted.is_symlink():
            target = self._wanted.readlink()
            if target.name.startswith(PREFIX):  # never follow a link that is not ours
                shutil.rmtree(target, ignore_errors=True)
            self._wanted.unlink()
        else:
            shutil.rmtree(self._wanted, ignore_errors=True)
        self.path = self._wanted
