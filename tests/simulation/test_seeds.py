"""Some seeds of the simulation, short; `make soak` runs longer ones. One again: `python -m tests.simulation --seed N`."""

import pytest

from tests.simulation.plan import LONG, SHORT, draw
from tests.simulation.run import simulate

pytestmark = pytest.mark.timeout(180)


@pytest.mark.parametrize("seed", [1, 5])
async def test_whatever_fails_the_book_is_what_the_engines_did(seed: int, tmp_path):
    numbers = await simulate(seed, SHORT, tmp_path)
    assert numbers["seen_whole"] > 50
    assert numbers["keys_answered"] > 5


def test_a_seed_is_a_schedule():
    assert draw(7, LONG) == draw(7, LONG)
    assert draw(7, LONG) != draw(8, LONG)
