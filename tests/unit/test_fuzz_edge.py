"""Some thousand seeded inputs of a fuzzed client; `make soak ARGS=fuzz` has ten million."""

import random

import pytest

from tests.fuzz.edge import fuzz
from tests.fuzz.inputs import REQUESTS, draw


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_whatever_a_client_sends_the_edge_answers_in_order_and_keeps_nothing_of_it(seed: int):
    assert await fuzz(seed, 2000) == 2000


def test_an_input_can_be_drawn_again_by_its_number():
    first, again, other = (draw(random.Random(seed)) for seed in ("1/5", "1/5", "1/6"))
    assert first == again != other
    assert len(REQUESTS) > 10
