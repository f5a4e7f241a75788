"""SIGHUP and SIGTERM of a real supervisor under load; the long forms are in `make soak`."""


import pytest

from tests.soak import reload

pytestmark = pytest.mark.timeout(240)


async def test_reloads_and_a_killed_worker_fail_only_what_was_on_the_killed_one(settings, pool, tmp_path):
    numbers = await reload.reloaded(settings, pool, tmp_path, reload.RELOADS_SHORT)
    assert numbers["broken elsewhere"] == 0


async def test_sigterm_answers_whatever_was_connected_before_it(settings, pool, tmp_path):
    numbers = await reload.stopped(settings, pool, tmp_path, reload.STOPS_SHORT)
    assert numbers["turns"] == numbers["usage records"]
