"""`poolgate up` with a real vLLM: real text, and no engine left behind, whichever process is killed."""

import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes.processes import eventually
from tests.fakes.up import Up

MODEL = "smollm2-135m"
# 25 s on an idle machine of two cores; several times that beside other work.
START_BOUND_S = 240.0

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]


@pytest.fixture
def up(tmp_path: Path) -> Iterator[Up]:
    with Up(tmp_path / "data") as started:
        started.await_ready(within_s=START_BOUND_S)
        yield started


def test_it_answers_with_real_text_and_a_signal_leaves_nothing(up: Up) -> None:
    status, answer = up.chat(MODEL)
    assert status == 200
    assert answer["choices"][0]["message"]["content"].strip()
    assert answer["usage"]["completion_tokens"] > 0
    assert f"serves {MODEL}" in up.told
    assert up.stop(signal.SIGTERM) == 0
    assert eventually(up.leaves_nothing)


def test_killing_it_takes_the_engine_and_its_children_along(up: Up) -> None:
    assert any("vllm" in " ".join(process.cmdline()) for process in up.tree())
    up.process.kill()
    assert eventually(up.leaves_nothing)


def test_a_killed_agent_server_or_core_takes_the_rest_along_and_another_engine_serves(up: Up) -> None:
    for which in ("agent", "server", "core"):
        agent = up.part("agent")
        assert agent is not None
        engines = agent.children(recursive=True)
        victim = agent if which == "agent" else next(one for one in engines if is_engine(one, which))
        victim.kill()
        eventually(lambda engines=engines: not any(is_there(process) for process in engines))
        eventually(lambda: up.chat(MODEL)[0] == 200, within_s=START_BOUND_S)
    assert up.stop() == 0
    assert eventually(up.leaves_nothing)


def is_engine(process: psutil.Process, which: str) -> bool:
    words = " ".join(process.cmdline())
    if which == "core":
        return "EngineCore" in words or "EngineCore" in process.name()
    return "vllm.entrypoints.cli.main" in words and not any("watchdog.py" in word for word in words)


def is_there(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
