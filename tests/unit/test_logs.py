"""The two forms of a log line."""

import io
import json
import logging
import warnings
from collections.abc import Iterator

import pytest

from config.logs import setup_logs
from config.settings import load_settings

log = logging.getLogger("poolgate.test")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    root, ours, show = logging.getLogger(), logging.getLogger("poolgate"), warnings.showwarning
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(capture=False)
    warnings.showwarning = show
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


def logged(stream: io.StringIO, **settings: str) -> io.StringIO:
    setup_logs(load_settings(environ={}, **settings), "gateway-0", stream=stream)
    return stream


def test_json_carries_the_event_and_its_extras():
    stream = logged(io.StringIO(), log_format="json")
    log.warning("node %s expired", "n1", extra={"action": "node_expired", "node_id": "n1", "silent_s": 91.5})
    line = json.loads(stream.getvalue())
    assert line.pop("ts").endswith("Z")
    assert line == {
        "level": "warning", "action": "node_expired", "process": "gateway-0", "logger": "poolgate.test",
        "message": "node n1 expired", "node_id": "n1", "silent_s": 91.5,
    }  # fmt: skip


def test_an_exception_in_json_is_one_line():
    stream = logged(io.StringIO(), log_format="json")
    try:
        int("first\nsecond")
    except ValueError:
        log.exception("it broke", extra={"action": "broken"})
    assert stream.getvalue().count("\n") == 1
    assert "ValueError: invalid literal" in json.loads(stream.getvalue())["exception"]


def test_no_extra_passes_for_the_level():
    stream = logged(io.StringIO(), log_format="json")
    log.info("words", extra={"action": "x", "level": "error", "ts": "never"})
    line = json.loads(stream.getvalue())
    assert line["level"] == "info"
    assert line["ts"] != "never"


def test_a_human_line_is_plain_where_nobody_watches():
    stream = logged(io.StringIO())
    log.error("node expired", extra={"action": "node_expired", "node_id": "n1"})
    assert stream.getvalue().endswith("error   gateway-0: node expired (node_id=n1)\n")
    assert "\x1b" not in stream.getvalue()


def test_a_human_line_is_coloured_on_a_terminal():
    stream = logged(Terminal())
    log.error("node expired")
    assert "\x1b[31m" in stream.getvalue()


def test_what_a_client_sent_can_not_forge_a_line():
    stream = logged(io.StringIO())
    log.info("model a\n12:00:00 error gateway: all lost\x1b[2J", extra={"action": "x", "model": "b\r\nc"})
    assert stream.getvalue().count("\n") == 1
    assert "\x1b" not in stream.getvalue()


def test_the_level_is_ours_and_libraries_log_from_warning():
    stream = logged(io.StringIO(), log_level="debug")
    log.debug("seen")
    logging.getLogger("asyncio").info("not seen")
    logging.getLogger("asyncio").warning("seen, too")
    assert [line.split(": ", 1)[1] for line in stream.getvalue().splitlines()] == ["seen", "seen, too"]


def test_a_second_setup_replaces_the_first():
    first, second = logged(io.StringIO()), logged(io.StringIO())
    log.info("once")
    assert first.getvalue() == ""
    assert second.getvalue().count("once") == 1
