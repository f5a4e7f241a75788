"""`poolgate up` over a stand-in engine, from the first line to the last process."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gateway.cli.restarts import QUICK_DEATHS_MAX
from tests.fakes.engine import FakeEngine
from tests.fakes.processes import eventually
from tests.fakes.up import ROOT, Up, clean_environment, free_port

PARTS = ("supervisor", "worker", "agent", "postgres", "valkey")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def engine() -> Iterator[FakeEngine]:
    stand_in = FakeEngine("--model", "fake-model")
    asyncio.run(stand_in.start())
    yield stand_in
    asyncio.run(stand_in.kill())


@pytest.fixture
def up(engine: FakeEngine, tmp_path: Path) -> Iterator[Up]:
    """A system that serves."""
    with Up(tmp_path / "data", "--engine-url", engine.url) as started:
        started.await_ready()
        yield started


def test_what_is_printed_can_be_pasted(up: Up) -> None:
    printed = up.out.read_text()
    curls = re.findall(r"^curl .*?'$(?=\n\n)", printed, re.MULTILINE | re.DOTALL)
    assert len(curls) == 2
    answer, stream = (shell(command) for command in curls)
    assert '"chat.completion"' in answer
    assert stream.rstrip().endswith("data: [DONE]")
    script = re.search(r"^from openai import.*?^print\(\)$", printed, re.MULTILINE | re.DOTALL)
    assert script
    said = subprocess.run(
        [sys.executable, "-c", script[0]], capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.strip()


def test_usage_and_keys_are_seen_while_it_runs(up: Up) -> None:
    assert up.chat()[0] == 200
    assert eventually(lambda: "fake-model" in poolgate(up, "usage").stdout)
    made = poolgate(up, "key", "create", "--account", "development").stdout.strip()
    assert eventually(lambda: up.chat(key=made)[0] == 200)
    poolgate(up, "key", "revoke", made[:12])
    assert eventually(lambda: up.chat(key=made)[0] == 401)


def test_a_provider_that_registers_works_without_a_click_and_its_code_is_in_the_mail_folder(up: Up) -> None:
    """On loopback `up` is in developer mode."""
    base = f"http://127.0.0.1:{up.port}/api/providers"

    def post(path: str, **body: str) -> Any:
        data = json.dumps(body).encode()
        request = urllib.request.Request(f"{base}/{path}", data, {"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    made = post("register", name="Ahmed", email="ahmed@example.sa", gpu_model="RTX 4090", os="linux")
    assert made["approval_status"] == "approved"
    assert post("heartbeat", api_key=made["api_key"])["approved"] is True
    post("login-email", email="ahmed@example.sa")
    assert eventually(lambda: list((up.folder / "mail").glob("*.eml")))


def test_a_second_one_on_the_same_folder_is_told_of_the_first(up: Up) -> None:
    second = poolgate(up, "up", "--port", str(up.port))
    assert second.returncode == 1
    assert f"process {up.process.pid}, {up.base_url}" in second.stderr
    assert second.stderr.count("\n") == 1
    assert up.chat()[0] == 200


def test_a_taken_port_is_told_before_anything_starts(up: Up, tmp_path: Path) -> None:
    other = tmp_path / "other"
    refused = poolgate(up, "up", "--port", str(up.port), folder=other)
    assert refused.returncode == 1
    assert f"port {up.port} on 127.0.0.1 can't be used" in refused.stderr
    assert not (other / "postgres").exists()


def test_a_sighup_reloads_the_gateway_and_nothing_else(up: Up) -> None:
    before = {name: up.part(name) for name in PARTS}
    up.process.send_signal(signal.SIGHUP)
    up.await_words("SIGHUP: the gateway reads its settings again")
    log = up.folder / "logs" / "gateway.log"
    assert eventually(lambda: "reloaded, with 1 worker(s)" in log.read_text(), within_s=30)
    assert up.chat()[0] == 200
    assert eventually(lambda: up.part("worker") not in (None, before["worker"]))
    others = [name for name in PARTS if name != "worker"]
    assert [up.part(name) for name in others] == [before[name] for name in others]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_in_order(up: Up, number: signal.Signals) -> None:
    assert up.stop(number) == 0
    assert up.alive() == []
    assert f"stopping everything ({number.name})" in up.told
    assert "Traceback" not in up.told


def test_a_second_signal_hurries_a_stop_that_waits_for_a_turn(tmp_path: Path) -> None:
    slow = FakeEngine("--model", "fake-model", ttft_ms=60_000)
    asyncio.run(slow.start())
    try:
        with Up(tmp_path / "data", "--engine-url", slow.url) as up:
            up.await_ready()
            up.tree()
            with ThreadPoolExecutor(1) as pool:
                turn = pool.submit(up.chat)
                eventually(lambda: asyncio.run(slow.record())["running"] == 1)
                up.process.send_signal(signal.SIGINT)
                up.await_words("stopping everything (SIGINT)")
                eventually(lambda: up.process.send_signal(signal.SIGINT) or up.process.poll() is not None)
                assert turn.result()[0] != 200
            assert up.process.returncode == 0
            assert eventually(up.leaves_nothing, within_s=5)
    finally:
        asyncio.run(slow.kill())


def test_the_key_of_the_first_start_is_shown_again_and_works(up: Up, engine: FakeEngine) -> None:
    key = up.key
    assert (up.folder / "dev-key").stat().st_mode & 0o777 == 0o600
    assert up.stop() == 0
    with Up(up.folder, "--engine-url", engine.url) as again:
        again.await_ready()
        assert again.key == key
        assert again.chat()[0] == 200


def test_no_secret_is_in_a_process_list_or_a_log(up: Up) -> None:
    up.chat()
    arguments = "\n".join(" ".join(process.cmdline()) for process in up.tree())
    logs = "\n".join(log.read_text() for log in (up.folder / "logs").glob("*.log"))
    for text in (arguments, logs):
        assert text
        assert up.key not in text
        assert "dc1-provider-" not in text


def test_each_part_that_is_killed_comes_back_and_nothing_is_left_at_the_end(up: Up) -> None:
    for name in PARTS:
        before = up.part(name)
        assert before is not None, name
        before.kill()
        eventually(lambda name=name, before=before: (up.part(name) or before) != before)
        assert eventually(lambda: up.chat()[0] == 200), name
    for name in set(PARTS) - {"worker"}:
        called = "gateway" if name == "supervisor" else name
        assert re.search(
            rf"^{called}\S* (was ended by signal 9|died): starting it again$", up.told, re.MULTILINE
        ), name
    assert up.stop() == 0
    assert eventually(up.leaves_nothing)


def test_a_gateway_that_is_killed_amid_turns_comes_back_on_its_port(tmp_path: Path) -> None:
    slow = FakeEngine("--model", "fake-model", pace_ms=200, tokens=100)
    asyncio.run(slow.start())
    try:
        with Up(tmp_path / "data", "--engine-url", slow.url) as up, ThreadPoolExecutor(1) as pool:
            up.await_ready()
            turn = pool.submit(up.chat, max_tokens=100)  # 20 s, if it is let
            eventually(lambda: asyncio.run(slow.record())["running"] == 1)
            supervisor = up.part("supervisor")
            assert supervisor is not None
            supervisor.kill()
            eventually(lambda: (up.part("supervisor") or supervisor) != supervisor)
            assert eventually(lambda: up.chat(max_tokens=1)[0] == 200, within_s=60)
            turn.result()
            assert up.stop() == 0
            assert eventually(up.leaves_nothing)
    finally:
        asyncio.run(slow.kill())


@pytest.mark.parametrize("name", PARTS)
def test_a_part_killed_just_before_the_end_leaves_nothing(up: Up, name: str) -> None:
    part = up.part(name)
    assert part is not None
    part.kill()
    assert up.stop() == 0
    assert eventually(up.leaves_nothing)


def test_killing_it_leaves_nothing_and_the_next_start_works(up: Up, engine: FakeEngine) -> None:
    up.tree()
    up.process.kill()
    assert eventually(up.leaves_nothing)
    with Up(up.folder, "--engine-url", engine.url) as again:
        again.await_ready()
        assert again.chat()[0] == 200


def test_killing_it_amid_a_turn_leaves_nothing_either(tmp_path: Path) -> None:
    slow = FakeEngine("--model", "fake-model", ttft_ms=60_000)
    asyncio.run(slow.start())
    try:
        with Up(tmp_path / "data", "--engine-url", slow.url) as up, ThreadPoolExecutor(1) as pool:
            up.await_ready()
            up.tree()
            turn = pool.submit(up.chat)
            eventually(lambda: asyncio.run(slow.record())["running"] == 1)
            up.process.kill()
            assert eventually(up.leaves_nothing, within_s=20)
            assert turn.result()[0] != 200
            eventually(lambda: asyncio.run(slow.record())["running"] == 0)
    finally:
        asyncio.run(slow.kill())


def test_it_ends_with_a_parent_that_asked_for_it(engine: FakeEngine, tmp_path: Path) -> None:
    """`make up` does: killing make must not leave the system running."""
    command = [
        sys.executable,
        "-m",
        "gateway",
        "up",
        "--port",
        str(free_port()),
        "--data-dir",
        str(tmp_path / "data"),
    ]
    child = ["env", "POOLGATE_STOP_WITH_PARENT=1", *command, "--engine-url", engine.url]
    err = tmp_path / "err"
    with err.open("wb") as stderr:
        # The shell stays as the parent because it has something to do afterwards.
        shell_script = '"$@"; true'
        parent = subprocess.Popen(
            ["sh", "-c", shell_script, "sh", *child], cwd=ROOT, env=clean_environment(), stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True,
        )  # fmt: skip
    try:
        eventually(lambda: "engine" in err.read_text())
    finally:
        parent.kill()
        parent.wait()
    eventually(lambda: err.read_text().endswith("stopped\n"))
    assert "(the parent process is gone)" in err.read_text()


@pytest.mark.parametrize("words", ["stores", "gateway", "engine"])
def test_a_stop_while_it_starts_leaves_nothing(engine: FakeEngine, tmp_path: Path, words: str) -> None:
    with Up(tmp_path / "data", "--engine-url", engine.url) as starting:
        starting.await_words(words)
        assert starting.stop(signal.SIGINT) == 0
        assert eventually(starting.leaves_nothing)
        assert "Traceback" not in starting.told


def test_an_engine_that_comes_later_is_waited_for_while_the_gateway_answers(tmp_path: Path) -> None:
    late = FakeEngine("--model", "fake-model")
    late.port = free_port()
    with Up(tmp_path / "data", "--engine-url", late.url) as up:
        up.await_ready()
        assert f"No engine answers yet at {late.url}" in up.told
        assert up.chat()[0] in (404, 503)
        asyncio.run(late.start())
        try:
            up.await_words("an engine is ready and serves fake-model")
            assert up.chat()[0] == 200
        finally:
            asyncio.run(late.kill())
        assert up.stop() == 0


def test_a_given_key_is_valid_for_the_run_that_it_was_given_to(engine: FakeEngine, tmp_path: Path) -> None:
    given = ("--engine-url", engine.url, "--key", "sk-local-test-key")
    for _ in range(2):  # the second time it is made valid again
        with Up(tmp_path / "data", *given) as up:
            up.await_ready()
            assert up.key == "sk-local-test-key"
            assert up.chat()[0] == 200
            assert up.stop() == 0
    with Up(tmp_path / "data", "--engine-url", engine.url) as up:
        up.await_ready()
        assert up.chat()[0] == 200
        assert up.chat(key="sk-local-test-key")[0] == 401


def test_without_a_node_it_says_how_one_joins(tmp_path: Path) -> None:
    with Up(tmp_path / "data", "--no-node") as up:
        up.await_ready()
        assert "run `poolgate agent`" in up.told
        assert up.part("agent") is None
        assert up.stop() == 0


def test_a_part_that_dies_again_and_again_ends_everything_with_the_reason(up: Up) -> None:
    seen = set()

    def kill_the_next_agent() -> bool:
        agent = up.part("agent")
        if agent is not None and agent.pid not in seen:
            seen.add(agent.pid)
            agent.kill()
        return up.process.poll() is not None

    eventually(kill_the_next_agent, within_s=90)
    assert up.process.returncode == 1
    assert len(seen) == QUICK_DEATHS_MAX
    assert "the agent was ended by signal 9 and can't be kept running;" in up.told
    assert "agent.log ends with:" in up.told
    assert eventually(up.leaves_nothing)


def test_a_wrong_setting_is_told_before_anything_starts(tmp_path: Path) -> None:
    with Up(tmp_path / "data", POOLGATE_PRICE_BOOK=str(tmp_path / "none.toml")) as up:
        assert up.process.wait(60) == 2
        assert "none.toml" in up.told
        assert up.told.count("\n") == 1
    assert not (tmp_path / "data").exists()


def poolgate(up: Up, *typed: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *typed, "--data-dir", str(folder or up.folder)],
        cwd=ROOT, env=clean_environment(), capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def shell(command: str) -> str:
    return subprocess.run(
        ["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True, env=dict(os.environ)
    ).stdout
