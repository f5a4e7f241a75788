"""kill -9 of the whole gateway, of PostgreSQL and of Valkey under load; the long forms are in `make soak`."""

import pytest

from tests.soak import money_crash

pytestmark = pytest.mark.timeout(180)


async def test_what_was_received_whole_is_charged_once_however_often_the_gateway_is_killed(
    settings, pool, tmp_path
):
    numbers = await money_crash.gateway_killed(settings, pool, tmp_path, money_crash.CRASHES_SHORT)
    assert numbers["answers received whole"] > 100


async def test_without_postgres_warm_accounts_notice_nothing_and_others_get_503(settings, tmp_path):
    numbers = await money_crash.store_away(settings, tmp_path, money_crash.OUTAGE_SHORT, "postgres")
    assert numbers["failed"] == 0


async def test_without_valkey_nobody_fails(settings, tmp_path):
    numbers = await money_crash.store_away(settings, tmp_path, money_crash.OUTAGE_SHORT, "valkey")
    assert numbers["failed"] == 0
