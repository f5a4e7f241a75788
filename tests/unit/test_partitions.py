"""Which day partitions of usage are made and which dropped."""

import datetime as dt

from billing.retention import DAYS_AHEAD, plan_partitions

TODAY = dt.date(2026, 3, 1)


def days(first: int, last: int) -> set[dt.date]:
    return {TODAY + dt.timedelta(days=n) for n in range(first, last + 1)}


def test_today_and_a_week_ahead_are_made() -> None:
    assert set(plan_partitions((), TODAY, 400).make) == days(0, DAYS_AHEAD)


def test_the_last_day_of_retention_is_kept_and_the_day_before_goes() -> None:
    plan = plan_partitions(days(-12, 7), TODAY, 10)
    assert plan.make == ()
    assert set(plan.drop) == days(-12, -11)
