"""The CPU time and the memory of processes and their descendants, as the kernel counts them.

CPU is read from a process's own clock (clock_getcpuclockid(3)): user and system time of all its threads, ended ones too, in
nanoseconds. What ended children took is known only in steps of 10 ms, from their parent.
"""

import time
from pathlib import Path

import psutil


class CpuClock:
    """CPU time of the processes under `roots`, whoever of them lives now."""

    def __init__(self, *roots: int) -> None:
        self.roots = roots

    def read_s(self) -> float:
        """Seconds since they began."""
        return sum(_cpu_s(process) for process in self.processes())

    def processes(self) -> list[psutil.Process]:
        found = [psutil.Process(root) for root in self.roots]
        return found + [child for root in found for child in root.children(recursive=True)]


def _cpu_s(process: psutil.Process) -> float:
    try:
        ended = process.cpu_times()
        own_s = time.clock_gettime((~process.pid << 3) | 2)
        return own_s + ended.children_user + ended.children_system
    except (psutil.NoSuchProcess, OSError):  # it ended just now, and its parent will tell
        return 0.0


def private_bytes(processes: list[psutil.Process]) -> int:
    """Memory that is no file's: heaps and stacks. Buffers of sockets are the kernel's and in nobody's number."""
    return sum(_anonymous_bytes(process.pid) for process in processes)


def _anonymous_bytes(pid: int) -> int:
    rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
    (line,) = (line for line in rollup.splitlines() if line.startswith("Anonymous:"))
    return int(line.split()[1]) * 1024
