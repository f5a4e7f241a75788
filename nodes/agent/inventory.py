"""Reads what the host is: GPUs through NVML where there are any, and cores, memory and system.

Honest where nothing is known: zeros and empty strings, never guesses. Reporting it is `reporter`'s affair.
"""

import contextlib
import importlib
import json
import logging
import os
import platform
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nodes.protocol import AGENT_VERSION

log = logging.getLogger("poolgate.agent")

MIB = 2**20
NO_GPU = {
    "name": "", "vram_mib": 0, "free_vram_mib": 0, "util_pct": 0, "temp_c": 0, "power_w": 0, "compute_capability": "",
}  # fmt: skip


class Inventory:
    """One look at the hardware at start; `gpu_status` reads telemetry anew (blocking, some milliseconds)."""

    def __init__(self, telemetry_file: str = "") -> None:
        """`telemetry_file`: JSON list of GPUs, each with the fields of `all_gpus`, which is read instead of NVML."""
        self._file = Path(telemetry_file) if telemetry_file else None
        self._nvml: Any = None if self._file else _open_nvml()
        self._told: list[dict[str, Any]] = []
        self.gpu_indexes: tuple[int, ...] = tuple(
            range(len(self._from_file()) if self._file else self._count())
        )
        self.cores: tuple[int, ...] = _cores()
        self.vram_mib: tuple[int, ...] = tuple(int(gpu["vram_mib"]) for gpu in self._gpus())
        self.ram_mib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // MIB

    def gpu_status(self) -> dict[str, Any]:
        """The contract's fields: those of the first GPU, and `all_gpus`."""
        gpus = self._gpus()
        first = gpus[0] if gpus else {}
        return {
            "gpu_name": first.get("name", ""),
            "gpu_vram_mib": first.get("vram_mib", 0),
            "driver_version": self._text("nvmlSystemGetDriverVersion"),
            "gpu_util_pct": first.get("util_pct", 0),
            "temp_c": first.get("temp_c", 0),
            "power_w": first.get("power_w", 0),
            "free_vram_mib": first.get("free_vram_mib", 0),
            "daemon_version": AGENT_VERSION,
            "python_version": platform.python_version(),
            "os_info": platform.platform(),
            "compute_capability": first.get("compute_capability", ""),
            "cuda_version": self._cuda_version(),
            "gpu_count": len(gpus),
            "all_gpus": gpus,
        }

    def resource_spec(self) -> dict[str, Any]:
        return {
            "hostname": socket.gethostname(),
            "os": platform.system(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "cpu_count": len(self.cores),
            "ram_gb": round(self.ram_mib / 1024, 1),
        }

    def checks(self, python: Path) -> dict[str, Any]:
        """The contract's readiness; `python` is the engines' interpreter."""
        status = self.gpu_status()
        return {
            "cuda": bool(status["gpu_count"]),
            "pytorch": any(python.parent.parent.glob("lib/python3*/site-packages/torch/__init__.py")),
            "vram_gb": round(sum(gpu["vram_mib"] for gpu in status["all_gpus"]) / 1024, 1),
            "driver": status["driver_version"],
        }

    def _gpus(self) -> list[dict[str, Any]]:
        return self._from_file() if self._file else [self._gpu(index) for index in self.gpu_indexes]

    def _from_file(self) -> list[dict[str, Any]]:
        """What the file says; what it said before while it is being written."""
        assert self._file is not None
        try:
            told = json.loads(self._file.read_text())
            self._told = [{**NO_GPU, "index": index, **gpu} for index, gpu in enumerate(told)]
        except (OSError, ValueError, TypeError):
            log.debug("%s can't be read", self._file, extra={"action": "telemetry_unreadable"})
        return self._told

    def _gpu(self, index: int) -> dict[str, Any]:
        nvml = self._nvml
        handle = nvml.nvmlDeviceGetHandleByIndex(index)

        def ask(what: Callable[[], Any], default: Any = 0) -> Any:
            """A card that does not support one reading still has the others."""
            try:
                return what()
            except nvml.NVMLError:
                return default

        memory = ask(lambda: nvml.nvmlDeviceGetMemoryInfo(handle), None)
        capability = ask(lambda: nvml.nvmlDeviceGetCudaComputeCapability(handle), ())
        return {
            "index": index,
            "name": _text(ask(lambda: nvml.nvmlDeviceGetName(handle), "")),
            "vram_mib": memory.total // MIB if memory else 0,
            "free_vram_mib": memory.free // MIB if memory else 0,
            "util_pct": ask(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu),
            "temp_c": ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "power_w": ask(lambda: round(nvml.nvmlDeviceGetPowerUsage(handle) / 1000, 1)),
            "compute_capability": ".".join(str(part) for part in capability),
        }

    def _count(self) -> int:
        if self._nvml is None:
            return 0
        try:
            return int(self._nvml.nvmlDeviceGetCount())
        except self._nvml.NVMLError:
            return 0

    def _cuda_version(self) -> str:
        if self._nvml is None:
            return ""
        with contextlib.suppress(self._nvml.NVMLError):
            number = int(self._nvml.nvmlSystemGetCudaDriverVersion())  # 12080 is 12.8
            return f"{number // 1000}.{number % 1000 // 10}"
        return ""

    def _text(self, function: str) -> str:
        if self._nvml is None:
            return ""
        with contextlib.suppress(self._nvml.NVMLError):
            return _text(getattr(self._nvml, function)())
        return ""


def local_address(gateway: str) -> str:
    """The address by which this host reaches the gateway; empty when there is no route. Sends nothing."""
    parts = urlsplit(gateway)
    try:
        found = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_DGRAM)
        family, kind, protocol, _, address = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(address)
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _open_nvml() -> Any:
    """The NVML module, ready for use, or None: no package, no driver, no GPU."""
    try:
        nvml = importlib.import_module("pynvml")
        nvml.nvmlInit()
    except Exception:  # noqa: BLE001 - a broken driver must not keep a CPU host from serving
        return None
    return nvml


def _cores() -> tuple[int, ...]:
    """The cores that this process may use, which in a container are not all."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)
