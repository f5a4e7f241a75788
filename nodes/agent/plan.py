"""Decides which engine gets which GPUs and how much of their memory, and which engines must go for it. Pure.

A seat is what an engine has. One that is running keeps its seat until it ends: vLLM takes its memory at the start and never
gives any back. A host without GPUs is one device, its memory.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

VLLM_SHARE = 0.9
"""Of a GPU's memory, at most: the rest is CUDA's own and what allocations waste (vLLM's default)."""

CPU_SHARE = 0.8
CPU_ENGINE_MIB = 3072
"""What vLLM needs on a CPU besides the weights: 2 GiB of its own, 1 GiB of KV cache (measured)."""

WEIGHTS_FACTOR = 1.2
KV_LEAST_MIB = 1024
"""A model is not worth serving with less room for its KV cache, nor with less than a fifth of its weights around them."""

GIB_MIB = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or the host. Engines may take `budget_mib` of it together."""

    index: int
    total_mib: int
    budget_mib: int


@dataclass(frozen=True, slots=True)
class Seat:
    """What one engine has: so much on each of its devices."""

    devices: tuple[int, ...]
    mib_each: int


@dataclass(frozen=True, slots=True)
class Sitter:
    """An engine that has a seat; `used_s` is when it last had a turn, by any clock."""

    name: str
    seat: Seat
    is_busy: bool
    used_s: float


@dataclass(frozen=True, slots=True)
class Need:
    """Memory that a model needs over all its devices; `exact`: it takes no more even if there is more."""

    mib: int
    exact: bool = False


@dataclass(frozen=True, slots=True)
class Plan:
    """A seat once those in `leave` have gone; or None and why there is none."""

    seat: Seat | None
    leave: tuple[str, ...] = ()
    reason: str = ""


def devices_of(
    vram_mib: Sequence[int], ram_mib: int, *, cap_pct: int = 100, reserve_gb: float = 0.0
) -> tuple[Device, ...]:
    """A host's devices: its GPUs less what their owner keeps for himself, or else its memory."""
    reserve_mib = int(reserve_gb * GIB_MIB)
    if not vram_mib:
        return (Device(0, ram_mib, int(ram_mib * CPU_SHARE)),)
    return tuple(
        Device(index, mib, max(0, min(int(mib * min(VLLM_SHARE, cap_pct / 100)), mib - reserve_mib)))
        for index, mib in enumerate(vram_mib)
    )


def need_of(weights_bytes: int, declared_gb: float, *, on_gpu: bool) -> Need:
    """What a model needs, as its owner said (poolgate.json's `vram_gb`) or by the size of its weights."""
    if declared_gb > 0 and on_gpu:
        return Need(int(declared_gb * GIB_MIB), exact=True)
    weights_mib = weights_bytes / 2**20
    if not on_gpu:
        return Need(int(weights_mib * WEIGHTS_FACTOR) + CPU_ENGINE_MIB, exact=True)
    return Need(int(max(weights_mib * WEIGHTS_FACTOR, weights_mib + KV_LEAST_MIB)))


def place(need: Need, sitters: Sequence[Sitter], devices: Sequence[Device]) -> Plan:
    """The best seat: on as few devices as can hold it; nobody leaves if there is room, else as few as it takes, idle ones
    before busy ones, and those longest without a turn before others."""
    for size in _sizes(len(devices)):
        each = -(-need.mib // size)
        groups = [group for group in _groups(devices, size) if all(d.budget_mib >= each for d in group)]
        if groups:
            plans = [_plan_on(group, each, need, sitters) for group in groups]
            return min(plans, key=lambda plan: _cost(plan, sitters))
    most = sum(device.budget_mib for device in devices[: max(_sizes(len(devices)), default=0)])
    return Plan(None, reason=f"it needs {need.mib} MiB and this host has {most} MiB for engines")


def overfull(sitters: Sequence[Sitter], devices: Sequence[Device]) -> tuple[str, ...]:
    """Engines on devices whose budget has become too small for what is taken."""
    tight = {device.index for device in devices if _taken(device, sitters) > device.budget_mib}
    return tuple(sitter.name for sitter in sitters if tight & set(sitter.seat.devices))


def _plan_on(group: Sequence[Device], each: int, need: Need, sitters: Sequence[Sitter]) -> Plan:
    staying = list(sitters)
    leave: list[str] = []
    indexes = {device.index for device in group}
    for sitter in sorted(sitters, key=lambda sitter: (sitter.is_busy, sitter.used_s)):
        if _free(group, staying) >= each:
            break
        if indexes & set(sitter.seat.devices):
            staying.remove(sitter)
            leave.append(sitter.name)
    # Who left first may not have been needed after all: a later one was larger.
    for name in list(leave):
        kept = next(sitter for sitter in sitters if sitter.name == name)
        if _free(group, [*staying, kept]) >= each:
            staying.append(kept)
            leave.remove(name)
    mib_each = each if need.exact else _free(group, staying)
    return Plan(Seat(tuple(device.index for device in group), mib_each), tuple(leave))


def _cost(plan: Plan, sitters: Sequence[Sitter]) -> tuple[int, int, float, int]:
    leaving = [sitter for sitter in sitters if sitter.name in plan.leave]
    assert plan.seat is not None
    return (
        sum(sitter.is_busy for sitter in leaving),
        len(leaving),
        max((sitter.used_s for sitter in leaving), default=0.0),
        -plan.seat.mib_each,
    )


def _free(group: Iterable[Device], sitters: Sequence[Sitter]) -> int:
    return min(device.budget_mib - _taken(device, sitters) for device in group)


def _taken(device: Device, sitters: Iterable[Sitter]) -> int:
    return sum(sitter.seat.mib_each for sitter in sitters if device.index in sitter.seat.devices)


def _sizes(devices: int) -> list[int]:
    """1, 2, 4 ... : attention heads divide by powers of two in about every model."""
    return [1 << power for power in range(devices.bit_length()) if 1 << power <= devices]


def _groups(devices: Sequence[Device], size: int) -> Iterator[Sequence[Device]]:
    """Neighbours: GPUs that are linked have neighbouring numbers."""
    for start in range(0, len(devices) - size + 1, size):
        yield devices[start : start + size]
