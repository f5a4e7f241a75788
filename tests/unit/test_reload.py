"""The way of a reload from worker to worker, with workers that only say what the test lets them."""

import socket
from dataclasses import dataclass, field
from typing import Any

import pytest

from config.defaults import Settings
from config.settings import load_settings
from gateway import slots
from gateway.reload import Reload, reloadable
from gateway.slots import RESTART_MAX_S, Slot

OLD, NEW = load_settings(environ={}), load_settings(environ={}, reload_ready_s=5, chunk_timeout_s=7)


@dataclass
class FakeWorker:
    """Stands for a WorkerProcess."""

    sock: socket.socket
    settings: Settings
    started_s: float
    number: int = 0
    waits: bool = False
    pid: int = 0
    says_ready: bool = False
    code: int | None = None
    is_killed: bool = False
    hangs: bool = False

    def is_hung(self, _now_s: float) -> bool:
        return self.hangs

    def poll(self, _now_s: float) -> int | None:
        return self.code

    def kill(self) -> None:
        self.is_killed, self.code = True, -9


@dataclass
class Scene:
    """Two slots, and every worker that was ever started."""

    slots: list[Slot] = field(default_factory=list)
    started: list[FakeWorker] = field(default_factory=list)
    released: list[FakeWorker] = field(default_factory=list)
    fails: bool = False

    def start(self, *args: Any, **options: Any) -> FakeWorker:
        if self.fails:
            raise OSError("no memory")
        self.started.append(FakeWorker(*args, **options, pid=len(self.started)))
        return self.started[-1]

    def tend(self, settings: Settings, now_s: float) -> None:
        for slot in self.slots:
            slot.tend(settings, now_s)

    def reload(self) -> Reload:
        return Reload(NEW, self.slots, self.released.append)  # type: ignore[arg-type]


@pytest.fixture
def scene(monkeypatch: pytest.MonkeyPatch) -> Scene:
    made = Scene()
    monkeypatch.setattr(slots, "WorkerProcess", made.start)
    with socket.socket() as sock:
        made.slots = [Slot(sock), Slot(sock)]
    made.tend(OLD, 0.0)
    for worker in made.started:
        worker.says_ready = True
    return made


def test_a_successor_takes_over_when_it_is_ready_and_then_the_next_one_starts(scene: Scene):
    first, second = scene.started
    reload = scene.reload()
    assert reload.step(1.0) == "going"
    successor = scene.started[2]
    assert (successor.settings, successor.waits) == (NEW, True)
    assert reload.step(2.0) == "going"
    assert (scene.slots[0].worker, scene.released) == (first, [])
    successor.says_ready = True
    assert reload.step(3.0) == "going"
    assert (scene.slots[0].worker, scene.released) == (successor, [first])
    assert reload.step(4.0) == "going"
    scene.started[3].says_ready = True
    assert reload.step(5.0) == "done"
    assert (scene.released, reload.replaced) == ([first, second], 2)
    assert len(scene.started) == 4


def test_one_that_is_not_ready_in_time_is_killed_and_nothing_changed(scene: Scene):
    reload = scene.reload()
    reload.step(1.0)
    assert reload.step(5.9) == "going"
    assert reload.step(6.1) == "failed"
    assert scene.started[2].is_killed
    assert [slot.worker for slot in scene.slots] == scene.started[:2]
    assert (scene.released, reload.replaced) == ([], 0)


def test_one_that_dies_ends_the_reload_where_it_is(scene: Scene):
    reload = scene.reload()
    reload.step(1.0)
    scene.started[2].says_ready = True
    reload.step(2.0)
    reload.step(3.0)
    scene.started[3].code = 70
    assert reload.step(4.0) == "failed"
    assert [slot.worker for slot in scene.slots] == [scene.started[2], scene.started[1]]
    assert reload.replaced == 1


def test_one_that_can_not_be_started_ends_the_reload(scene: Scene):
    scene.fails = True
    assert scene.reload().step(1.0) == "failed"
    assert [slot.worker for slot in scene.slots] == scene.started


def test_a_worker_that_dies_while_its_successor_starts_gets_no_other(scene: Scene):
    reload = scene.reload()
    reload.step(1.0)
    scene.started[0].code = -9
    for now_s in (1.1, 2.0, 3.0):
        scene.tend(OLD, now_s)
        assert reload.step(now_s) == "going"
    assert len(scene.started) == 3
    scene.started[2].says_ready = True
    assert reload.step(3.1) == "going"
    assert scene.slots[0].worker is scene.started[2]
    assert scene.released == []


def test_a_worker_that_hangs_is_killed_and_replaced_at_its_socket(scene: Scene):
    scene.started[0].hangs = True
    scene.tend(OLD, 1.0)
    assert scene.started[0].is_killed
    assert scene.slots[0].worker is None
    scene.tend(OLD, 1.0 + RESTART_MAX_S)
    assert scene.slots[0].worker is scene.started[2]
    assert scene.started[2].sock is scene.started[0].sock
    assert scene.slots[1].worker is scene.started[1]


def test_and_if_its_successor_fails_too_it_is_replaced_as_any_dead_one(scene: Scene):
    reload = scene.reload()
    reload.step(1.0)
    scene.started[0].code = scene.started[2].code = -9
    scene.tend(OLD, 1.1)
    assert reload.step(1.2) == "failed"
    scene.tend(OLD, 1.1 + RESTART_MAX_S)
    assert scene.slots[0].worker is scene.started[3]
    assert (scene.started[3].settings, scene.started[3].waits) == (OLD, False)


def test_addresses_and_folders_stay_until_a_restart():
    found, fixed = reloadable(OLD, load_settings(environ={}, port=9, data_dir="other", workers=3, host="::"))
    assert fixed == ["host", "port", "data_dir"]
    assert (found.host, found.port, found.data_dir, found.workers) == (OLD.host, OLD.port, OLD.data_dir, 3)
    assert reloadable(OLD, NEW) == (NEW, [])
