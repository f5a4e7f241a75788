"""Reads what the host is: GPUs through NVML where there are any, and cores, memory and system.

Honest where nothing is known: zeros and empty strings, never guesses. Reporting it is `reporter`'s affair.
"""

import contextlib
import importlib
import os
import platform
import socket
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

from nodes.protocol import AGENT_VERSION

MIB = 2**20


class Inventory:
    """One look at the hardware at start; `gpu_status` reads telemetry anew (blocking, some milliseconds)."""

    def __init__(self) -> None:
        self._nvml = _open_nvml()
        self.gpu_indexes: tuple[int, ...] = tuple(range(self._count()))
        self.cores: tuple[int, ...] = _cores()

    def gpu_status(self) -> dict[str, Any]:
        """The contract's fields: those of the first GPU, and `all_gpus`."""
        gpus = [self._gpu(index) for index in self.gpu_indexes]
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
            "ram_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        }

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
