"""How a provider and moments look on the wire. Pure."""

from datetime import UTC, datetime
from typing import Any

from billing.money import NANO
from gateway.identity.providers import Earned
from nodes.providers import Provider
from nodes.telemetry import Telemetry

LIVE_S = 120.0
"""A provider is live whose last heartbeat is no older (contract)."""


def moment(at: datetime | None) -> str | None:
    """ISO 8601 in UTC, as the contract's examples have it."""
    if at is None:
        return None
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def is_live(provider: Provider) -> bool:
    """Whether it was heard of lately."""
    return provider.heartbeat_age_s is not None and provider.heartbeat_age_s <= LIVE_S


def minor(nano: int, minor_per_major: int) -> int:
    """Whole halala that were earned: what is not a whole one yet is not told."""
    return nano * minor_per_major // NANO


def profile(provider: Provider, readings: Telemetry, earned: Earned, minor_per_major: int) -> dict[str, Any]:
    """The contract's Provider, as its owner sees it. Jobs come with the job queue: until then there are none."""
    wanted = provider.preferences
    shown: dict[str, Any] = {
        "id": provider.id,
        "name": provider.name,
        "gpu_model": provider.gpu_model,
        "status": provider.status,
        "approval_status": provider.approval_status,
        "last_heartbeat": moment(provider.last_heartbeat_at),
        "daemon_version": provider.daemon_version or None,
        "run_mode": wanted.run_mode,
        "scheduled_start": wanted.scheduled_start,
        "scheduled_end": wanted.scheduled_end,
        "time_zone": wanted.time_zone,
        "uptime_percent": provider.uptime_percent or 0.0,
        "reliability_score": provider.reliability_score,
        "total_earnings_halala": minor(earned.total_nano, minor_per_major),
        "today_earnings_halala": minor(earned.today_nano, minor_per_major),
        "week_earnings_halala": minor(earned.week_nano, minor_per_major),
        "total_jobs": provider.jobs_completed,
        "gpu_vram_mib": provider.vram_mib or None,
        "gpu_count_reported": provider.gpu_count,
        "gpu_compute_capability": provider.compute_capability or None,
        "gpu_cuda_version": provider.cuda_version or None,
        "is_paused": provider.is_paused,
        "gpu_usage_cap_pct": wanted.gpu_usage_cap_pct,
        "vram_reserve_gb": wanted.vram_reserve_gb,
        "temp_limit_c": wanted.temp_limit_c,
        "location": provider.location,
        "readiness_status": provider.readiness_status,
        "nodes": dict(provider.states),
        "cached_models": provider.cached_models,
        "gpu_metrics": gpu_metrics(readings),
        "active_job": None,
    }
    if provider.email is not None:
        shown["email"] = provider.email
    return shown


def gpu_metrics(readings: Telemetry) -> dict[str, Any]:
    """Readings that nobody told are left out."""
    values = {
        "utilization_pct": readings.util_pct,
        "vram_used_mib": readings.vram_used_mib,
        "vram_free_mib": readings.vram_free_mib,
        "temperature_c": readings.temp_c,
        "power_w": readings.power_w,
    }
    return {name: value for name, value in values.items() if value is not None}
