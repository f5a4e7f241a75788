"""What a provider prefers, the hour and the heat become one duty; what can't be read is as if it were not there."""

from datetime import time
from typing import Any

import pytest

from nodes.agent.lease import Lease
from nodes.agent.orders import HOLD, REST, SERVE, SLEEP, Duty, Orders
from nodes.agent.preferences import Heat, Preferences, duty_of, heat_now, read_preferences

NOON = time(12)


def duty(preferences: Preferences, **given: Any) -> Duty:
    facts: dict[str, Any] = {"wanted": "serve", "heat": Heat(), "at": NOON, "was_started": False}
    return duty_of(preferences, **(facts | given))


def test_preferences_are_read_by_the_contracts_names() -> None:
    fields = {
        "run_mode": "scheduled", "scheduled_start": "23:00", "scheduled_end": "07:00", "gpu_usage_cap_pct": 80,
        "vram_reserve_gb": 1.5, "temp_limit_c": 85, "time_zone": "Asia/Riyadh",
    }  # fmt: skip
    assert read_preferences(fields) == Preferences(
        "scheduled", time(23), time(7), 80, 1.5, 85, time_zone="Asia/Riyadh"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"run_mode": "lunar", "temp_limit_c": "hot", "gpu_usage_cap_pct": 300, "vram_reserve_gb": -1},
        {"run_mode": 5, "scheduled_start": "25:00", "scheduled_end": [], "temp_limit_c": True},
    ],
)
def test_what_can_not_be_read_is_as_if_it_were_not_there(fields: dict[str, Any]) -> None:
    assert read_preferences(fields) == Preferences()


@pytest.mark.parametrize(
    ("preferences", "facts", "level", "word"),
    [
        (Preferences(), {}, SERVE, ""),
        (Preferences(), {"wanted": "pause"}, HOLD, "paused"),
        (Preferences(), {"wanted": "drain"}, REST, "drained"),
        (Preferences(gpu_usage_cap_pct=0), {}, REST, "gpu_usage_cap_pct"),
        (Preferences("manual"), {}, REST, "manual"),
        (Preferences("manual"), {"was_started": True}, SERVE, ""),
        (Preferences("manual"), {"was_started": True, "wanted": "pause"}, HOLD, "paused"),
        (Preferences("scheduled", time(23), time(7)), {"at": time(3)}, SERVE, ""),
        (Preferences("scheduled", time(23), time(7)), {"at": time(7)}, REST, "23:00 to 07:00"),
        (Preferences("scheduled", time(23), time(7)), {"at": time(22, 59)}, REST, "23:00"),
        (Preferences("scheduled", time(9), time(17)), {"at": time(9)}, SERVE, ""),
        (Preferences("scheduled", time(9), time(17)), {"at": time(17)}, REST, "09:00"),
        (Preferences("scheduled"), {}, SERVE, ""),
        (Preferences(temp_limit_c=85), {"heat": Heat(1.0)}, HOLD, "limit is 85 °C"),
        (Preferences(temp_limit_c=85), {"heat": Heat(1.0, True)}, REST, "engines end until it has 80 °C"),
        (Preferences(temp_limit_c=85), {"heat": Heat(1.0), "wanted": "drain"}, REST, "drained"),
    ],
)
def test_the_strictest_reason_decides(
    preferences: Preferences, facts: dict[str, Any], level: str, word: str
) -> None:
    decided = duty(preferences, **facts)
    assert decided.level == level
    assert word in decided.reason


def test_heat_sheds_load_then_ends_engines_and_goes_only_well_below_the_limit() -> None:
    heat = heat_now(Heat(), 85, 84, 0)
    assert heat == Heat()
    heat = heat_now(heat, 85, 85, 10)
    assert heat == Heat(10)
    assert heat_now(heat, 85, 86, 69) == Heat(10)  # turns may still be ending
    assert heat_now(heat, 85, 81, 600) == Heat(10)  # no more than warm: waiting helps
    ended = heat_now(heat, 85, 86, 70)
    assert ended == Heat(10, has_ended_engines=True)
    assert heat_now(ended, 85, 81, 80) == ended
    assert heat_now(ended, 85, 80, 90) == Heat()


def test_a_gpu_far_too_hot_ends_engines_at_once_and_one_that_tells_nothing_is_cool() -> None:
    assert heat_now(Heat(), 85, 92, 0) == Heat(0, has_ended_engines=True)
    assert heat_now(Heat(5, True), 85, 0, 9) == Heat()
    assert heat_now(Heat(5, True), 0, 99, 9) == Heat()


def test_of_several_orders_the_strictest_holds_until_its_side_takes_it_back() -> None:
    orders = Orders()
    orders.give("node", Duty(HOLD, "paused"))
    assert orders.news.is_set()
    orders.give("plan", Duty(SLEEP, "room"))
    orders.give("person", Duty(REST, "stopped"))
    assert orders.now == Duty(REST, "stopped")
    orders.give("person", Duty())
    assert orders.now == Duty(SLEEP, "room")
    orders.news.clear()
    orders.give("node", Duty())
    assert not orders.news.is_set(), "what holds has not changed"
    orders.give("plan", Duty())
    assert (orders.now.level, orders.news.is_set()) == (SERVE, True)


def test_a_lease_runs_out_counted_from_the_question_and_only_once_there_was_one() -> None:
    now = [0.0]
    lease = Lease(10, lambda: now[0])
    now[0] = 100
    assert lease.is_held
    lease.renew(95)
    now[0] = 104.9
    assert lease.is_held
    now[0] = 105
    assert not lease.is_held
    lease.renew(104, 90)
    assert lease.is_held
    lease.renew(50)  # a late answer to an old question shortens nothing
    now[0] = 193
    assert lease.is_held
