"""What becomes of settled turns in the log and in metrics: whole batches, told as if each had been told by itself."""

import io
import json
import logging
import re
from collections.abc import Iterator
from select import PIPE_BUF

import pytest
from hypothesis import given
from hypothesis import strategies as st

import config.logs
from billing.usage import UsageRecord
from config.logs import JsonLines, Shape, bulk, setup_logs
from config.metrics import SECONDS, Histogram, Metrics
from config.settings import load_settings
from gateway import records
from gateway.records import LINE, TurnRecords
from tests.journals import turn

SHAPE = Shape("poolgate.turns", logging.INFO, "turn", ("engine", "count"), frozenset({"engine"}))
TIME = re.compile(r"\d\d:\d\d:\d\d\.\d{3}")

TEXTS = st.text(st.characters(exclude_categories=()), max_size=20) | st.sampled_from(
    [
        'a "quoted" one',
        "back\\slash",
        "%s %d %",
        "new\nline",
        "\x1b[2J",
        "none: None",
        "\u2028",
        "ی",
        "\ud800",
    ]
)
RECORDS = st.builds(
    turn,
    surface=TEXTS, model=TEXTS, outcome=TEXTS, node_id=st.none() | TEXTS, engine_id=st.none() | TEXTS,
    ttft_ms=st.none() | st.integers(0, 10**6), amount_nano=st.integers(0, 2**63), status=st.integers(200, 599),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _logging_is_put_back() -> Iterator[None]:
    root, ours = logging.getLogger(), logging.getLogger("poolgate")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    logging.captureWarnings(capture=False)
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])


class Stream(io.StringIO):
    """Keeps each write by itself."""

    def __init__(self, *, is_terminal: bool = False) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal

    def write(self, text: str, /) -> int:
        self.pieces.append(text)
        return super().write(text)


def logged(stream: io.StringIO, process: str = "worker-1", **settings: str) -> None:
    setup_logs(load_settings(environ={}, **settings), process, stream=stream)


def flushed(*noted: UsageRecord, metrics: Metrics | None = None) -> None:
    written: list[UsageRecord] = []
    turns = TurnRecords(metrics or Metrics(), written.append)
    for record in noted:
        turns.add(record)
    turns.flush()
    assert written == list(noted)


@pytest.mark.parametrize("log_format", ["human", "json"])
@pytest.mark.parametrize("is_terminal", [False, True])
@given(noted=st.lists(RECORDS, min_size=1, max_size=5), process=st.sampled_from(["worker-1", "100%s"]))
def test_lines_of_a_batch_are_those_that_each_turn_would_have_got_by_itself(
    log_format, is_terminal, noted, process
):
    together, each = Stream(is_terminal=is_terminal), Stream(is_terminal=is_terminal)
    logged(together, process, log_format=log_format)
    assert bulk(LINE) is not None
    flushed(*noted)
    logged(each, process, log_format=log_format)
    records._log_each(noted)
    assert TIME.sub("", together.getvalue()) == TIME.sub("", each.getvalue())


def test_whoever_else_listens_gets_each_line_as_a_record(caplog):
    caplog.set_level(logging.INFO, "poolgate")
    flushed(turn(status=200), turn(status=499))
    assert [(record.action, record.status) for record in caplog.records] == [("turn", 200), ("turn", 499)]


@pytest.mark.parametrize("where", ["logger", "handler"])
def test_a_filter_is_asked_about_each_line(where):
    stream = Stream()
    logged(stream)
    owner = logging.getLogger("poolgate.turns") if where == "logger" else logging.getLogger().handlers[0]
    wanted = logging.Filter("poolgate.turns")
    wanted.filter = lambda record: record.status != 499  # type: ignore[method-assign]
    owner.addFilter(wanted)
    try:
        flushed(turn(status=200), turn(status=499))
    finally:
        owner.removeFilter(wanted)
    assert ("status=200" in stream.getvalue(), "status=499" in stream.getvalue()) == (True, False)


def test_no_line_is_written_below_the_level():
    stream = Stream()
    logged(stream, log_level="warning")
    flushed(turn())
    logged(stream)
    logging.getLogger().handlers[0].setLevel(logging.WARNING)
    flushed(turn())
    assert stream.getvalue() == ""


def test_a_batch_is_written_in_whole_lines_that_a_pipe_takes_in_one_go():
    stream = Stream()
    logged(stream)
    flushed(*[turn(model="ی" * 40) for _ in range(100)], turn(model="long" * PIPE_BUF))
    assert all(piece.endswith("\n") for piece in stream.pieces)
    assert all(len(piece.encode()) <= PIPE_BUF for piece in stream.pieces[:-1])
    assert len(stream.pieces) < 30
    assert stream.getvalue().count("\n") == 101


def test_a_stream_that_fails_ends_nothing(monkeypatch, capsys):
    class Closed(Stream):
        def write(self, text: str, /) -> int:
            raise BrokenPipeError

    logged(Closed())
    monkeypatch.setattr(logging, "raiseExceptions", True)
    flushed(turn())
    assert "BrokenPipeError" in capsys.readouterr().err


def test_texts_are_remembered_within_a_bound(monkeypatch):
    monkeypatch.setattr(config.logs, "SHOWN_MAX", 3)
    shown = config.logs.Shown(JsonLines("p").shown)
    assert [shown[f'"{n}'] for n in range(10)] == [f'\\"{n}' for n in range(10)]
    assert len(shown) <= 3


def test_a_shape_is_prepared_once():
    logged(Stream())
    assert bulk(SHAPE) is bulk(SHAPE)


def test_a_histogram_takes_a_batch_as_it_takes_each():
    metrics, observed = Metrics(), Histogram("each", "by itself", buckets=SECONDS)
    bounds_ms = [round(bound * 1000) for bound in SECONDS]
    times_ms = [0, 1, *bounds_ms, *(bound + 1 for bound in bounds_ms), 10**7]
    flushed(*[turn(duration_ms=time_ms, ttft_ms=time_ms) for time_ms in times_ms], metrics=metrics)
    for time_ms in times_ms:
        observed.observe(time_ms / 1000)
    wanted = [sample.value for sample in observed.collect()[0].samples if sample.name != "each_created"]
    for histogram in (metrics.duration, metrics.first_event):
        found = [sample.value for sample in histogram.collect()[0].samples if "created" not in sample.name]
        assert found == pytest.approx(wanted)


def test_a_batch_is_counted_by_model_and_outcome():
    metrics = Metrics()
    flushed(
        turn(model="a"), turn(model="a", outcome="refused", ttft_ms=None), turn(model="b", loss_nano=7),
        metrics=metrics,
    )  # fmt: skip
    told = metrics.render().decode()
    for line in (
        'poolgate_turns_total{model="a",outcome="finished",route="openai"} 1.0',
        'poolgate_turns_total{model="a",outcome="refused",route="openai"} 1.0',
        'poolgate_tokens_total{kind="prompt",model="a"} 12.0',
        'poolgate_tokens_total{kind="cached_prompt",model="a"} 8.0',
        'poolgate_tokens_total{kind="completion",model="b"} 5.0',
        'poolgate_charged_nano_total{model="a"} 200.0',
        'poolgate_platform_loss_nano_total{node="n"} 7.0',
        'poolgate_first_event_seconds_count{model="a"} 1.0',
        'poolgate_turn_seconds_count{model="a"} 2.0',
    ):
        assert line in told.splitlines()


def test_json_lines_can_be_read():
    stream = Stream()
    logged(stream, log_format="json")
    flushed(turn(model='a"b', ttft_ms=None))
    line = json.loads(stream.getvalue())
    assert (line["message"], line["ttft_ms"], line["action"]) == ('openai a"b finished', None, "turn")
