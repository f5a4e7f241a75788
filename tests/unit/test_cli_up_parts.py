"""What `poolgate up` decides: restarts, logs, addresses and networks, without starting anything."""

import json
from pathlib import Path

import pytest

from config.defaults import Settings
from gateway.cli.logfiles import LOG_BYTES_MAX, LogFile, read_line
from gateway.cli.plan import DEVELOPER_MODE, Plan, is_loopback, with_networks
from gateway.cli.probes import reachable_base_url
from gateway.cli.restarts import PAUSE_MAX_S, QUICK_DEATHS_MAX, WINDOW_S, Restarts, how_it_ended
from gateway.cli.snippets import Greeting, greeting
from gateway.cli.usage import since_of


def test_pauses_grow_and_the_fifth_quick_death_is_the_last() -> None:
    restarts = Restarts()
    pauses = [restarts.pause_s(float(second)) for second in range(QUICK_DEATHS_MAX)]
    assert pauses[-1] is None
    grown = [pause for pause in pauses if pause is not None]
    assert len(grown) == QUICK_DEATHS_MAX - 1
    assert grown == sorted(grown)
    assert max(grown) <= PAUSE_MAX_S


def test_deaths_that_are_far_apart_never_add_up() -> None:
    restarts = Restarts()
    pauses = {restarts.pause_s(number * WINDOW_S) for number in range(50)}
    assert len(pauses) == 1
    assert None not in pauses


def test_an_exit_code_is_told_in_words() -> None:
    assert how_it_ended(-9) == "was ended by signal 9"
    assert how_it_ended(1) == "ended with exit code 1"


def test_only_warnings_and_errors_reach_the_terminal(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "agent.log")
    with log.open() as stream:
        stream.write(b"12:00:00.123 info    agent: engine starts\n")
        stream.write(b"12:00:00.124 warning agent: engine is slow (seconds=3)\n")
        stream.write(b"not a log line\n")
        stream.write(json.dumps({"level": "error", "process": "agent", "message": "gone"}).encode() + b"\n")
        stream.write(b"12:00:00.125 error   agent: half a li")
    assert log.loud_lines() == ["agent: engine is slow (seconds=3)", "agent: gone"]
    with log.open() as stream:
        stream.write(b"ne\n")
    assert log.loud_lines() == []  # a new process has its own beginning


def test_a_half_written_line_is_told_when_it_is_whole(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "agent.log")
    with log.open() as stream:
        stream.write(b"12:00:00.125 error   agent: half a li")
        stream.flush()
        assert log.loud_lines() == []
        stream.write(b"ne\n")
    assert log.loud_lines() == ["agent: half a line"]


def test_a_flood_of_warnings_is_told_shortly(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "gateway.log")
    with log.open() as stream:
        stream.write(b"12:00:00.124 warning worker-1: again\n" * 100)
    assert log.loud_lines()[-1] == f"and 95 more in {log.path}"


def test_a_log_is_cut_under_its_writer_and_goes_on(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "gateway.log")
    with log.open() as stream:
        stream.write(b"x" * (LOG_BYTES_MAX + 1))
        stream.flush()
        log.bound()
        stream.write(b"12:00:00.124 warning worker-1: after the cut\n")
    assert log.loud_lines() == ["worker-1: after the cut"]
    assert log.path.stat().st_size < 100
    assert log.path.with_suffix(".log.1").stat().st_size == LOG_BYTES_MAX + 1


def test_a_log_line_with_a_strange_shape_has_no_level() -> None:
    for line in ("", "{", '{"level": 1}', "[]", '{"message": "x"}', "Traceback (most recent call last):"):
        assert read_line(line) == ("", "")


@pytest.mark.parametrize(
    ("host", "answer"),
    [
        ("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("example.com", False), ("", False),
    ],
)  # fmt: skip
def test_a_weak_key_is_for_loopback_only(host: str, answer: bool) -> None:
    assert is_loopback(host) is answer


@pytest.mark.parametrize(
    ("host", "base_url"),
    [
        ("127.0.0.1", "http://127.0.0.1:9000"),
        ("0.0.0.0", "http://127.0.0.1:9000"),
        ("::", "http://[::1]:9000"),
        ("10.1.2.3", "http://10.1.2.3:9000"),
    ],
)
def test_the_printed_address_can_be_reached_from_here(host: str, base_url: str) -> None:
    assert reachable_base_url(host, 9000) == base_url


def test_a_named_engine_is_permitted_and_nothing_around_it() -> None:
    networks = with_networks("127.0.0.0/8,::1/128", ("http://10.1.2.3:8000", "http://127.0.0.1:8001"))
    assert networks == "127.0.0.0/8,::1/128,10.1.2.3/32"


def test_spans_and_dates_are_understood() -> None:
    assert since_of("24h", 100_000.0) == 100_000.0 - 86_400
    assert since_of("2w", 10_000_000.0) == 10_000_000.0 - 14 * 86_400
    assert since_of("1970-01-02", 0.0) == 86_400.0
    assert since_of("999999w", 1000.0) == 0.0


def test_the_greeting_has_all_that_a_first_user_needs() -> None:
    facts = Greeting(
        base_url="http://127.0.0.1:8080", key="sk-pg-1", balance="100.00 SAR", model="tiny", logs="/data/logs"
    )
    text = greeting(facts)
    for needed in (
        "http://127.0.0.1:8080/v1",
        "sk-pg-1",
        "100.00 SAR",
        "/data/logs",
        "curl -N",
        "import OpenAI",
        '"tiny"',
    ):
        assert needed in text


@pytest.mark.parametrize(("host", "mode"), [("127.0.0.1", "true"), ("localhost", "true"), ("0.0.0.0", None)])
def test_developer_mode_is_for_loopback_and_can_be_turned_off(
    host: str, mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(DEVELOPER_MODE, raising=False)
    plan = Plan(
        settings=Settings(host=host), config=None, base_url="", key=None, has_node=False, models=(), engine_urls=()
    )  # fmt: skip
    assert plan.serve_environment("", "").get(DEVELOPER_MODE) == mode
    monkeypatch.setenv(DEVELOPER_MODE, "false")
    assert plan.serve_environment("", "")[DEVELOPER_MODE] == "false"
