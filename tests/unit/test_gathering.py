"""Pieces of a moment become one batch; each has its own answer, its own error, and may be left by its caller."""

import asyncio

import pytest

from config.gathering import Gathering
from tests.waiting import eventually


class Work:
    """Carries out batches of numbers: doubles each, refuses odd ones, waits at a closed gate."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def carry_out(self, batch: list[int]) -> list[int | Exception]:
        self.batches.append(batch)
        await self.gate.wait()
        if 0 in batch:
            raise OSError("away")
        return [ValueError(piece) if piece % 2 else 2 * piece for piece in batch]


@pytest.fixture
async def work() -> Work:
    return Work()


async def test_what_comes_while_a_batch_is_carried_out_is_the_next_one(work):
    gathering = Gathering(work.carry_out, gap_s=0.0, most=10)
    work.gate.clear()
    first = asyncio.create_task(gathering.add(2))
    await eventually(lambda: work.batches)
    rest = [asyncio.create_task(gathering.add(piece)) for piece in (4, 6, 8)]
    await asyncio.sleep(0.01)
    assert work.batches == [[2]], "one at a time"
    work.gate.set()
    assert await asyncio.gather(first, *rest) == [4, 8, 12, 16]
    assert work.batches == [[2], [4, 6, 8]]


async def test_pieces_that_come_one_after_the_other_wait_for_the_gap_and_go_together(work):
    gathering = Gathering(work.carry_out, gap_s=0.1, most=10)
    assert await gathering.add(2) == 4, "after a pause at once"
    tasks = []
    for piece in (4, 6):
        tasks.append(asyncio.create_task(gathering.add(piece)))
        await asyncio.sleep(0.001)
    assert await asyncio.gather(*tasks) == [8, 12]
    assert work.batches == [[2], [4, 6]]


async def test_one_that_is_refused_leaves_the_others_alone(work):
    gathering = Gathering(work.carry_out, gap_s=0.0, most=10)
    found = await asyncio.gather(*(gathering.add(piece) for piece in (2, 3, 4)), return_exceptions=True)
    assert (found[0], found[2]) == (4, 8)
    assert isinstance(found[1], ValueError)


async def test_what_fails_as_a_whole_fails_for_all_of_its_batch_and_no_other(work):
    gathering = Gathering(work.carry_out, gap_s=0.0, most=2)
    found = await asyncio.gather(*(gathering.add(piece) for piece in (0, 2, 4, 6)), return_exceptions=True)
    assert [isinstance(each, OSError) for each in found] == [True, True, False, False]
    assert work.batches == [[0, 2], [4, 6]]


async def test_a_caller_that_leaves_takes_its_piece_out_and_nobody_elses(work):
    gathering = Gathering(work.carry_out, gap_s=0.0, most=10)
    work.gate.clear()
    first = asyncio.create_task(gathering.add(2))
    await eventually(lambda: work.batches)
    leaves, stays = asyncio.create_task(gathering.add(4)), asyncio.create_task(gathering.add(6))
    await asyncio.sleep(0)
    leaves.cancel()
    first.cancel()  # amid its batch
    await asyncio.sleep(0)
    work.gate.set()
    assert await stays == 12
    assert work.batches == [[2], [6]]
