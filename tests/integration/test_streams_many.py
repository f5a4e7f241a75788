"""Many streams at once, and clients that read nothing, through a real `poolgate serve`; long forms in `make soak`."""

from tests.soak import stalled, streams


async def test_many_slow_streams_are_all_whole_and_cost_little_memory(settings, pool, tmp_path):
    numbers = await streams.many_slow_streams(settings, pool, tmp_path, streams.SHORT)
    assert numbers["whole"] == streams.SHORT.streams


async def test_clients_that_read_nothing_do_not_grow_a_worker_and_give_the_engine_back(
    settings, pool, tmp_path
):
    numbers = await stalled.clients_that_read_nothing(settings, pool, tmp_path, stalled.SHORT)
    assert numbers["turns ended by client_stall_s"] == stalled.SHORT.clients
