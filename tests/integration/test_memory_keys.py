"""Many keys through a real `poolgate serve`: what it remembers is bounded; the long form is in `make soak`."""

from tests.soak import memory


async def test_a_worker_that_forgets_and_relearns_keys_leases_and_limits_does_not_grow(
    settings, pool, tmp_path
):
    numbers = await memory.many_keys(settings, pool, tmp_path, memory.SHORT)
    assert numbers["turns"] == memory.SHORT.keys * memory.SHORT.rounds
