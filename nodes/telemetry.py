"""What a heartbeat's `gpu_status` says, read with care: a field that is absent or odd is not known. Pure.

Agents of others send it too, so nothing in it is refused; what becomes of it is `heartbeats`' affair.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nodes.protocol import TEXT_MAX

GPUS_MAX = 64
MIB_MAX = 2**40
READING_MAX = 1e6
MIB_PER_GIB = 1024


@dataclass(frozen=True, slots=True)
class Telemetry:
    """A node's GPUs. 0 and empty: not known. Readings of None: none was told."""

    gpu_name: str = ""
    gpu_count: int = 0
    vram_mib: int = 0  # of one GPU, as cards are sold
    compute_capability: str = ""
    cuda_version: str = ""
    driver_version: str = ""
    util_pct: float | None = None  # mean of all
    vram_used_mib: int | None = None  # sum of all
    vram_free_mib: int | None = None
    temp_c: float | None = None  # of the hottest
    power_w: float | None = None  # sum of all


def telemetry_of(status: Mapping[str, Any]) -> Telemetry:
    """The contract's fields tell of the first GPU, `all_gpus` of each: readings are of all where it is there."""
    listed = status.get("all_gpus")
    gpus = [gpu for gpu in listed[:GPUS_MAX] if isinstance(gpu, dict)] if isinstance(listed, list) else []
    name = _text(status.get("gpu_name"))
    count = max(_whole(status.get("gpu_count")) or int(bool(name)), len(gpus))
    if count == 0:
        return Telemetry()  # zeros of a host without a GPU are no readings
    if not gpus:
        gpus = [
            {
                "vram_mib": status.get("gpu_vram_mib"),
                "free_vram_mib": status.get("free_vram_mib"),
                "util_pct": status.get("gpu_util_pct"),
                "temp_c": status.get("temp_c"),
                "power_w": status.get("power_w"),
            }
        ]
    utils, temps, powers = _readings(gpus, "util_pct"), _readings(gpus, "temp_c"), _readings(gpus, "power_w")
    sizes, free = _wholes(gpus, "vram_mib"), _wholes(gpus, "free_vram_mib")
    return Telemetry(
        gpu_name=name,
        gpu_count=min(count, GPUS_MAX),
        vram_mib=_whole(status.get("gpu_vram_mib")) or max(sizes, default=0),
        compute_capability=_text(status.get("compute_capability")),
        cuda_version=_text(status.get("cuda_version")),
        driver_version=_text(status.get("driver_version")),
        util_pct=sum(utils) / len(utils) if utils else None,
        vram_used_mib=max(0, sum(sizes) - sum(free)) if sizes and free else None,
        vram_free_mib=sum(free) if free else None,
        temp_c=max(temps, default=None),
        power_w=sum(powers) if powers else None,
    )


def vram_gb(mib: int) -> int:
    """As people quote a card's memory: 24,564 MiB are 24 GB."""
    return round(mib / MIB_PER_GIB)


def _readings(gpus: list[dict[str, Any]], name: str) -> list[float]:
    return [float(value) for gpu in gpus if (value := _number(gpu.get(name), READING_MAX)) is not None]


def _wholes(gpus: list[dict[str, Any]], name: str) -> list[int]:
    return [value for gpu in gpus if (value := _whole(gpu.get(name))) is not None]


def _whole(value: object) -> int | None:
    number = _number(value, MIB_MAX)
    return None if number is None else int(number)


def _number(value: object, most: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if 0 <= value <= most else None  # NaN is neither


def _text(value: object) -> str:
    """Without NULs, which PostgreSQL keeps nowhere."""
    return value.replace("\x00", "")[:TEXT_MAX] if isinstance(value, str) else ""
