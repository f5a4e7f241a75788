"""What numbers were measured on: commit, machine and versions, for the head of a report."""

import os
import platform
import subprocess
import sys
import sysconfig
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import psutil

from bench.processes import ROOT
from config import compiled

PACKAGES = ("aiohttp", "uvloop", "httptools", "orjson", "pydantic", "asyncpg", "redis")


def machine() -> dict[str, str]:
    """One line each, in the order to show them."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="minutes").replace("+00:00", "Z"),
        "commit": _commit(),
        "machine": f"{os.cpu_count()} cores ({_processor()}), {psutil.virtual_memory().total / 2**30:.0f} GiB",
        "load before": f"{os.getloadavg()[0]:.2f} (1 min)",
        "system": f"{platform.system()} {platform.release()}, {_python()}",
        "poolgate": _how(),
        "packages": ", ".join(f"{name} {version(name)}" for name in PACKAGES),
    }


def _python() -> str:
    """With what decides on its speed."""
    named = f"Python {platform.python_version()}"
    if sys.base_prefix == "/usr" and sys.platform == "linux":
        return f"{named} as {platform.freedesktop_os_release()['NAME']} builds it"
    is_optimized = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    return f"{named} built {'with' if is_optimized else 'without'} profile-guided optimization"


def _how() -> str:
    """As its processes are started here, so is this one."""
    if not compiled.is_used():
        return compiled.how()
    try:
        return f"{compiled.how()} by mypyc {version('mypy')}"
    except PackageNotFoundError:  # it was, elsewhere
        return f"{compiled.how()} by mypyc"


def _commit() -> str:
    try:
        commit = _git("rev-parse", "--short=12", "HEAD")
        return f"{commit}, with changes" if _git("status", "--porcelain", "--untracked-files=no") else commit
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*args: str) -> str:
    return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:  # noqa: PTH123 - no file of ours
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()
