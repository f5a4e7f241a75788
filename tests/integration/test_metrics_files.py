"""Metrics of several processes, living and dead, in the folder that they share."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from config import metrics

COUNTING = """
from config.metrics import Metrics
counted = Metrics()
counted.turns.labels("chat", "a", "finished").inc(3)
counted.turns.labels("chat", "b{n}", "finished").inc(1)
counted.first_event.labels("a").observe(0.02)
counted.in_flight.set(2)
print(__import__("os").getpid())
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, "")
    metrics.prepare_folder(tmp_path / "metrics")
    return tmp_path / "metrics"


def process(number: int) -> int:
    """One that counts, and ends; its id."""
    done = subprocess.run(
        [sys.executable, "-c", COUNTING.replace("{n}", str(number))],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def value(start: str) -> float:
    lines = [line for line in metrics.merged().decode().splitlines() if line.startswith(start)]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def test_what_the_dead_counted_stays_in_one_file_of_each_kind(folder: Path):
    pids = [process(number) for number in range(3)]
    before = metrics.merged()
    assert value("poolgate_turns_in_flight") == 6
    for pid in pids:
        metrics.forget_process(pid)
        assert value("poolgate_turns_total") == 12
        assert value('poolgate_first_event_seconds_bucket{le="0.025",model="a"}') == 3
        assert value("poolgate_first_event_seconds_sum") == pytest.approx(0.06)
    assert {file.name for file in folder.glob("*.db")} == {"counter_0.db", "histogram_0.db"}
    assert value("poolgate_turns_in_flight") == 0
    assert set(before.splitlines()) > set(metrics.merged().splitlines()), "only gauges are gone"


def test_a_process_that_counted_nothing_is_forgotten_too(folder: Path):
    metrics.forget_process(1)
    assert metrics.merged() == b""


def test_no_reader_sees_counts_twice_or_not_at_all(folder: Path):
    pids = [process(number) for number in range(6)]
    seen, is_over = set(), threading.Event()

    def read() -> None:
        while not is_over.is_set():
            seen.add(value("poolgate_turns_total"))

    reader = threading.Thread(target=read)
    reader.start()
    for pid in pids:
        metrics.forget_process(pid)
    is_over.set()
    reader.join()
    assert seen == {24}
    assert os.environ[metrics.FOLDER_VARIABLE] == str(folder)
