"""Which core a worker keeps to, and when it moves."""

import asyncio
import os
import threading

import pytest

from config import cores
from config.cores import Times, core_of, is_crowded

pytestmark = pytest.mark.skipif(not cores.ALL, reason="this system has no affinity")


def test_each_worker_has_a_core_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cores, "ALL", [2, 3, 5])
    assert [core_of(number, 3) for number in (4, 5, 6)] == [3, 5, 2]


@pytest.mark.parametrize(("given", "workers"), [([], 1), ([4], 1), ([0, 1], 3)])
def test_where_there_are_too_few_nobody_keeps_to_one(
    monkeypatch: pytest.MonkeyPatch, given: list[int], workers: int
) -> None:
    monkeypatch.setattr(cores, "ALL", given)
    assert core_of(0, workers) is None


@pytest.mark.parametrize(
    ("ran_s", "waited_s", "crowded"),
    [
        (0.0, 0.0, False),
        (0.01, 0.4, False),  # it wants little, and gets it soon enough
        (3.0, 2.0, False),  # busy, and so is the machine
        (2.0, 3.0, True),
        (0.0, 5.0, True),
    ],
)
def test_a_core_is_crowded_where_one_waits_longer_than_one_runs(
    ran_s: float, waited_s: float, crowded: bool
) -> None:
    before = Times(7.0, 9.0)
    assert is_crowded(before, Times(7.0 + ran_s, 9.0 + waited_s), 5.0) is crowded


def in_a_thread(work: object) -> None:
    """Its affinity ends with it."""
    thread = threading.Thread(target=lambda: asyncio.run(work()))  # type: ignore[operator]
    thread.start()
    thread.join()


@pytest.mark.skipif(len(cores.ALL) < 2, reason="a second core is needed")
def test_a_thread_keeps_to_its_core_and_moves_where_that_is_crowded(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, *_ = cores.ALL
    seen: list[set[int]] = []
    waited = iter((0.0, 0.0, 0.0, 1.0, 0.0))
    monkeypatch.setattr(cores, "ALL", [first, second])
    monkeypatch.setattr(cores, "LOOK_S", 1e-3)

    def times() -> Times:
        seen.append(os.sched_getaffinity(0))
        return Times(0.0, next(waited))

    async def work() -> None:
        monkeypatch.setattr(cores, "_times", times)
        with pytest.raises(RuntimeError):  # all is told
            await cores.keep(first)
        cores.roam()
        seen.append(os.sched_getaffinity(0))

    in_a_thread(work)
    # Looked at before and after each time: at first it stayed, then it had waited.
    assert seen == [{first}, {first}, {first}, {first}, {second}, {second}, {first, second}]


@pytest.mark.skipif(len(cores.ALL) < 2, reason="a second core is needed")
def test_a_thread_whose_core_is_taken_away_runs_where_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[int]] = []
    monkeypatch.setattr(cores, "LOOK_S", 1e-3)

    def times() -> Times:
        if seen:
            raise FileNotFoundError("no such process")
        seen.append(os.sched_getaffinity(0))
        return Times(0.0, 0.0)

    async def work() -> None:
        monkeypatch.setattr(cores, "_times", times)
        await cores.keep(cores.ALL[1])
        seen.append(os.sched_getaffinity(0))

    in_a_thread(work)
    assert seen == [{cores.ALL[1]}, set(cores.ALL)]


def test_what_the_system_tells_of_a_thread_is_read() -> None:
    before = cores._times()
    sum(range(200_000))
    now = cores._times()
    assert now.ran_s >= before.ran_s > 0
    assert now.waited_s >= before.waited_s
