"""What a provider prefers and how hot it is become one duty of the node. Pure: time and temperature are passed in.

Preferences come in the heartbeat's reply. One that can't be read is as if it were not there: an agent must not stop for a
gateway that is newer than itself.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import time
from typing import Any

from nodes.agent.orders import HOLD, LEVELS, REST, SERVING, Duty
from nodes.control_messages import DRAIN, PAUSE

ALWAYS_ON, MANUAL, SCHEDULED = "always-on", "manual", "scheduled"

COOL_DEGREES = 5
"""So far below its limit a GPU is cool again: at the limit itself it would come and go."""

HOTTER_DEGREES = 7
"""So far above it, waiting for turns to end does not help."""

SHED_S = 60.0
"""A GPU that is still too hot so long after it got its last new turn is not heated by turns: its engines end."""


@dataclass(frozen=True, slots=True)
class Preferences:
    """As the contract names them; `temp_limit_c` 0 is none."""

    run_mode: str = ALWAYS_ON
    scheduled_start: time | None = None
    scheduled_end: time | None = None
    gpu_usage_cap_pct: int = 100
    vram_reserve_gb: float = 0.0
    temp_limit_c: int = 0
    time_zone: str = ""  # of the hours; empty: the host's


@dataclass(frozen=True, slots=True)
class Heat:
    """Since when (seconds of any clock) it is too hot, None if it is not; and whether engines were ended for it."""

    since_s: float | None = None
    has_ended_engines: bool = False


def read_preferences(fields: Mapping[str, Any]) -> Preferences:
    """Of a heartbeat's reply, field by field."""
    mode = fields.get("run_mode")
    return Preferences(
        run_mode=mode if mode in (ALWAYS_ON, MANUAL, SCHEDULED) else ALWAYS_ON,
        scheduled_start=_clock(fields.get("scheduled_start")),
        scheduled_end=_clock(fields.get("scheduled_end")),
        gpu_usage_cap_pct=int(_number(fields.get("gpu_usage_cap_pct"), 0, 100, 100)),
        vram_reserve_gb=_number(fields.get("vram_reserve_gb"), 0, 1024, 0),
        temp_limit_c=int(_number(fields.get("temp_limit_c"), 1, 150, 0)),
        time_zone=str(fields.get("time_zone") or ""),
    )


def heat_now(before: Heat, limit_c: int, temp_c: float, now_s: float) -> Heat:
    """`temp_c` is the hottest GPU's; 0 where nothing tells."""
    if limit_c <= 0 or temp_c <= 0:
        return Heat()
    if before.since_s is not None and temp_c <= limit_c - COOL_DEGREES:
        return Heat()
    if before.since_s is None and temp_c < limit_c:
        return before
    since_s = now_s if before.since_s is None else before.since_s
    too_long = now_s - since_s >= SHED_S and temp_c >= limit_c
    return Heat(since_s, before.has_ended_engines or too_long or temp_c >= limit_c + HOTTER_DEGREES)


def duty_of(preferences: Preferences, *, wanted: str, heat: Heat, at: time, was_started: bool) -> Duty:
    """The strictest of what each of them asks. `at` is the time of `time_zone`; `was_started`: by a person, for `manual`."""
    duties = [SERVING]
    if wanted == PAUSE:
        duties.append(Duty(HOLD, "paused"))
    if wanted == DRAIN:
        duties.append(Duty(REST, "drained"))
    if preferences.gpu_usage_cap_pct == 0:
        duties.append(Duty(REST, "gpu_usage_cap_pct is 0"))
    if preferences.run_mode == MANUAL and not was_started:
        duties.append(Duty(REST, "run_mode is manual: resume it, or start an engine"))
    if preferences.run_mode == SCHEDULED and not _is_open(preferences, at):
        hours = f"{preferences.scheduled_start:%H:%M} to {preferences.scheduled_end:%H:%M}"
        duties.append(Duty(REST, f"outside its hours, {hours}"))
    if heat.since_s is not None:
        duties.append(_cooling(heat, preferences.temp_limit_c))
    return max(duties, key=lambda duty: LEVELS.index(duty.level))


def _cooling(heat: Heat, limit_c: int) -> Duty:
    cool_c = limit_c - COOL_DEGREES
    if heat.has_ended_engines:
        return Duty(
            REST, f"a GPU is too hot, its limit is {limit_c} °C: engines end until it has {cool_c} °C"
        )
    return Duty(HOLD, f"a GPU is too hot, its limit is {limit_c} °C: no new turns until it has {cool_c} °C")


def _is_open(preferences: Preferences, at: time) -> bool:
    """Hours that end before they begin go over midnight; without both there are none to keep."""
    start, end = preferences.scheduled_start, preferences.scheduled_end
    if start is None or end is None or start == end:
        return True
    return start <= at < end if start < end else at >= start or at < end


def _clock(value: object) -> time | None:
    try:
        hours, minutes = str(value).split(":")[:2]
        return time(int(hours), int(minutes))
    except ValueError:
        return None


def _number(value: object, low: float, high: float, otherwise: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        return otherwise
    return value
