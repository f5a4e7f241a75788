"""Small decisions of the agent: pauses, what a gateway's answer means, node ids, engine logs, engine folders."""

import json
import random
import socket
import uuid
from pathlib import Path

import pytest

from nodes.agent import environment
from nodes.agent.backoff import Backoff
from nodes.agent.build import BuildFailed, Progress, build
from nodes.agent.engine_log import LOG_BYTES_MAX, EngineLog
from nodes.agent.environment import STEPS, engine_status, recipe_hash, write_stamp
from nodes.agent.identity import NodeInUse, node_identity
from nodes.agent.inventory import Inventory, local_address
from nodes.agent.reporter import read_outcome
from nodes.agent.scratch import Scratch
from nodes.protocol import HeartbeatReply


def test_pauses_double_up_to_the_most_and_begin_anew_after_a_success() -> None:
    backoff = Backoff(1.0, 10.0, random.Random(1))
    ceilings = [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    for ceiling in ceilings:
        assert ceiling / 2 <= backoff.next_s() <= ceiling
    backoff.reset()
    assert backoff.next_s() <= 1.0


def test_pauses_stay_bounded_for_ever() -> None:
    backoff = Backoff(1.0, 60.0)
    assert all(backoff.next_s() <= 60.0 for _ in range(5000))


@pytest.mark.parametrize(
    ("status", "body", "is_refused", "words"),
    [
        (409, b'{"error": "taken"}', True, "has given this node to another agent: taken"),
        (401, b'{"error": "Invalid API key"}', True, "refuses the key (Invalid API key)"),
        (403, b'{"error": "pending"}', True, "has not approved this provider: pending"),
        (400, b'{"error": {"message": "epoch must be"}}', False, "answered 400: epoch must be"),
        (502, b"<html>", False, "answered 502: <html>"),
        (200, b"<html>", False, "something else"),
        (200, b"[]", False, "something else"),
    ],
)
def test_a_gateways_refusal_is_told_in_words(status: int, body: bytes, is_refused: bool, words: str) -> None:
    outcome = read_outcome(status, body, "")
    assert outcome.reply is None
    assert outcome.is_refused is is_refused
    assert words in outcome.trouble


def test_a_gateways_reply_and_its_wish_to_wait_are_read() -> None:
    reply = HeartbeatReply(epoch=2)
    assert read_outcome(200, json.dumps(reply.to_json()).encode(), "").reply == reply
    assert read_outcome(429, b"{}", "15").retry_after_s == 15.0
    assert read_outcome(429, b"{}", "soon").retry_after_s == 0.0


def test_the_node_id_stays_and_only_one_agent_may_use_it(tmp_path: Path) -> None:
    with node_identity(tmp_path / "data") as first:
        assert str(uuid.UUID(first)) == first
        with pytest.raises(NodeInUse, match="another agent"), node_identity(tmp_path / "data"):
            pass
    with node_identity(tmp_path / "data") as again:
        assert again == first


def test_a_spoilt_node_id_is_made_anew(tmp_path: Path) -> None:
    (tmp_path / "node_id").write_text("")
    with node_identity(tmp_path) as node_id:
        assert (tmp_path / "node_id").read_text().strip() == node_id


def test_a_node_id_that_was_copied_to_another_machine_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def id_on(machine: str) -> str:
        monkeypatch.setattr("nodes.agent.identity._machine", lambda: machine)
        with node_identity(tmp_path) as node_id:
            return node_id

    first = id_on("one")
    assert id_on("one") == first
    assert id_on("") == first, "a machine that has no name is not known to be another one"
    assert id_on("one") == first
    assert id_on("two") != first


def test_the_telemetry_file_stands_for_gpus_that_nvml_does_not_know(tmp_path: Path) -> None:
    file = tmp_path / "gpus.json"
    file.write_text('[{"name": "A", "vram_mib": 100, "temp_c": 50}, {"name": "B", "vram_mib": 200}]')
    inventory = Inventory(str(file))
    assert (inventory.gpu_indexes, inventory.vram_mib) == ((0, 1), (100, 200))
    status = inventory.gpu_status()
    assert (status["gpu_count"], status["gpu_name"], status["all_gpus"][1]["temp_c"]) == (2, "A", 0)
    file.write_text("[")  # being written
    assert inventory.gpu_status()["gpu_name"] == "A"


def test_an_engines_log_is_bounded_and_keeps_the_one_before(tmp_path: Path) -> None:
    log = EngineLog(tmp_path / "logs" / "engine.log")
    with log.open() as output:
        output.write(b"x" * (LOG_BYTES_MAX + 1))
        output.flush()
        log.keep_bounded()
        output.write(b"after\n\n  \n")
    assert log.path.read_bytes() == b"after\n\n  \n"
    assert log.last_words() == "after"
    assert log.path.with_name("engine.log.1").stat().st_size == LOG_BYTES_MAX + 1
    log.open().close()
    assert log.path.with_name("engine.log.1").read_bytes() == b"after\n\n  \n"


def test_a_host_without_gpus_says_so_with_zeros() -> None:
    inventory = Inventory()
    status = inventory.gpu_status()
    if status["gpu_count"] == 0:
        assert (status["gpu_name"], status["gpu_vram_mib"], status["all_gpus"]) == ("", 0, [])
    spec = inventory.resource_spec()
    assert spec["cpu_count"] == len(inventory.cores) > 0
    assert spec["ram_gb"] > 0


def test_the_address_towards_a_loopback_gateway_is_loopback() -> None:
    assert local_address("http://127.0.0.1:8080") == "127.0.0.1"
    assert local_address("http://name.invalid:1") == ""


def test_an_engine_folder_tells_its_state(tmp_path: Path) -> None:
    folder = tmp_path / "engine"
    assert engine_status(folder).state == "missing"
    folder.mkdir()
    assert engine_status(folder).state == "missing"
    (folder / "stranger").touch()
    assert engine_status(folder).state == "foreign"
    write_stamp(folder, {"recipe": "older", "steps": {}})
    assert engine_status(folder).state == "stale"
    write_stamp(folder, {"recipe": recipe_hash(), "steps": dict.fromkeys(STEPS[:2], 1.0)})
    assert "`packages`" in engine_status(folder).detail
    write_stamp(folder, {"recipe": recipe_hash(), "steps": dict.fromkeys(STEPS, 1.0)})
    assert engine_status(folder).state == "incomplete"  # the stamp says all, but the files are gone
    (folder / "bin").mkdir()
    (folder / "bin" / "python").touch()
    (folder / "models" / "toy").mkdir(parents=True)
    (folder / "models" / "toy" / "poolgate.json").write_text("{}")
    status = engine_status(folder)
    assert status.is_ready
    assert status.models == (folder / "models" / "toy",)


def test_a_folder_with_something_else_is_not_built_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nodes.agent.build.unsupported_reason", lambda: "")
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "thesis.txt").touch()
    with pytest.raises(BuildFailed, match="something else"):
        build(tmp_path / "engine", lambda _: None)
    assert (tmp_path / "engine" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("system", "machine", "is_fit"),
    [
        ("Linux", "x86_64", True),
        ("Linux", "aarch64", True),
        ("Darwin", "arm64", False),
        ("Windows", "AMD64", False),
    ],
)
def test_an_unsupported_machine_is_told_the_way_out(
    monkeypatch: pytest.MonkeyPatch, system: str, machine: str, is_fit: bool
) -> None:
    monkeypatch.setattr(environment.platform, "system", lambda: system)
    monkeypatch.setattr(environment.platform, "machine", lambda: machine)
    reason = environment.unsupported_reason()
    assert (reason == "") is is_fit
    assert is_fit or "--engine-url" in reason


def test_every_package_of_the_engine_is_pinned() -> None:
    lines = environment.REQUIREMENTS.read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all("==" in pin for pin in pins)
    left_out = {"torchvision", "torchaudio", "torchcodec", "triton"}
    assert not left_out & {pin.partition("==")[0].lower() for pin in pins}


def test_progress_reads_as_a_line() -> None:
    assert str(Progress("torch", "start", 0.0)).endswith("...")
    assert "kept" not in str(Progress("torch", "kept", 0.0))
    assert "12.3 s" in str(Progress("model", "done", 12.34))
    assert "6/6" in str(Progress("model", "going", 20.0, "x"))


@pytest.mark.parametrize("length", [1, 200])
def test_an_engines_temporary_files_go_with_it_and_leave_room_for_socket_names(
    tmp_path: Path, length: int
) -> None:
    killed = Scratch(tmp_path / ("x" * length))
    killed.make()
    (killed.path / "left").touch()
    scratch = Scratch(tmp_path / ("x" * length))
    scratch.make()
    assert length == 1 or not killed.path.exists()
    assert list(scratch.path.iterdir()) == []
    with socket.socket(socket.AF_UNIX) as server:
        if length > 1:  # pytest's own folders may be long
            server.bind(str(scratch.path / str(uuid.uuid4())))
    used = scratch.path
    scratch.remove()
    assert not used.exists()
    assert list(tmp_path.iterdir()) == []
