"""Waiting for facts about processes: conditions are asked again until they hold, and a test fails if they never do."""

import time
from collections.abc import Callable, Iterable
from typing import TypeVar

import psutil

T = TypeVar("T")


def eventually(ask: Callable[[], T | None], *, within_s: float = 30.0) -> T:
    """What `ask` gives once it is true."""
    deadline = time.monotonic() + within_s
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"still not so after {within_s} s"
        time.sleep(0.02)
    return answer


def all_gone(pids: Iterable[int]) -> None:
    """Every process has ended (a zombie has)."""
    for pid in pids:
        eventually(lambda pid=pid: not is_alive(pid))


def is_alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
