"""Engines and workers that die or fall silent under load, under real agents and a real `poolgate serve`.

The long forms are in `make soak`.
"""

from tests.soak import killed


async def test_a_killed_engine_costs_only_the_streams_that_had_begun_on_it(settings, pool, tmp_path):
    numbers = await killed.engine_killed(settings, pool, tmp_path, killed.SHORT)
    assert numbers["usage records"] == numbers["turns"]


async def test_a_silent_engine_costs_only_the_streams_that_had_begun_on_it(settings, pool, tmp_path):
    numbers = await killed.engine_silent(settings, pool, tmp_path, killed.SHORT)
    assert numbers["usage records"] == numbers["turns"]


async def test_a_killed_worker_breaks_only_its_own_connections(settings, pool, tmp_path):
    numbers = await killed.worker_killed(settings, pool, tmp_path, killed.SHORT)
    assert numbers["successors that serve"] == numbers["kills"]
