"""Owns what a log line looks like: one line an event, for people or as JSON, on standard error.

What is logged is left to everyone: words for people, `extra={"action": "node_expired", ...}` for machines,
and never a prompt, a key or a header.
"""

import datetime
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from select import PIPE_BUF
from typing import Any, TextIO

from config.defaults import Settings
from config.lines import interleaved

ROOT = "poolgate"

# What logging puts on every record itself; everything else came with `extra`.
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "action"}
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_PLAIN = "\x1b[0m"

SHOWN_MAX = 10_000
"""Texts of which a shape of lines remembers how they are shown: models, engines."""


def setup_logs(settings: Settings, process: str, *, stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (standard error), marked with the `process` name.

    Our own loggers log from `log_level`, those of libraries from warning. May be called again.
    """
    stream = stream or sys.stderr
    is_json = settings.log_format == "json"
    lines = JsonLines(process) if is_json else HumanLines(process, in_colour=stream.isatty())
    root = logging.getLogger()
    root.handlers[:] = [LineHandler(stream, lines)]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(settings.log_level.upper())
    logging.captureWarnings(capture=True)


@dataclass(frozen=True, slots=True)
class Shape:
    """What lines that come in masses have in common: logger, level, action, and the extras by name, in order."""

    logger: str
    level: int
    action: str
    extras: tuple[str, ...]
    texts: frozenset[str]
    """Those of the extras that are texts; the others are integers or None."""


Row = list[str]
"""One line of a shape: its words, then its extras' values, all as texts."""


def bulk(shape: Shape) -> "Bulk | None":
    """What renders and writes lines of this shape together; None where each must be logged by itself, as somebody else than
    our own handler gets them too, or filters them. Ask anew for each batch: handlers and levels change."""
    log: logging.Logger | None = logging.getLogger(shape.logger)
    handlers: list[logging.Handler] = []
    filters = list(log.filters) if log is not None else []
    while log is not None:
        handlers += log.handlers
        log = log.parent if log.propagate else None
    if len(handlers) != 1 or filters:
        return None
    only = handlers[0]
    return only.bulk(shape) if isinstance(only, LineHandler) else None


class LineHandler(logging.StreamHandler[TextIO]):
    """Our own handler, which can also write many lines of one shape at once."""

    def __init__(self, stream: TextIO, lines: "JsonLines | HumanLines") -> None:
        super().__init__(stream)
        self.setFormatter(lines)
        self._lines = lines
        self._bulks: dict[Shape, Bulk] = {}

    def bulk(self, shape: Shape) -> "Bulk | None":
        """None if this handler filters such lines."""
        if self.filters or self.level > shape.level:
            return None
        if shape not in self._bulks:
            self._bulks[shape] = Bulk(self, self._lines, shape)
        return self._bulks[shape]


class Bulk:
    """Writes lines of one shape, each byte for byte as if it had been logged by itself, at a tenth of the cost.

    The caller passes texts through `shown`, numbers through `digits`, and writes `null` for None; that is what a formatter
    would do to them.
    """

    def __init__(self, handler: LineHandler, lines: "JsonLines | HumanLines", shape: Shape) -> None:
        self._handler = handler
        self._lines = lines
        self._shape = shape
        self.shown: dict[str, str] = Shown(lines.shown)
        self.null = lines.null

    def write(self, rows: list[Row]) -> None:
        """All of them, in writes that no other process's lines come into the middle of. The rows are the handler's then."""
        shape = self._shape
        record = logging.LogRecord(shape.logger, shape.level, "", 0, "", (), None)
        record.action = shape.action
        lines = self._lines.rendered(shape, record, rows)
        with self._handler.lock or nullcontext():
            try:
                for piece in _pieces(lines, PIPE_BUF):
                    self._handler.stream.write(piece)
                    self._handler.flush()
            except Exception:  # noqa: BLE001 - as every handler does: what can't be logged ends nothing
                self._handler.handleError(record)


class Shown(dict[str, str]):
    """Texts as a formatter shows them, remembered: lines that come in masses have few different ones."""

    def __init__(self, show: Callable[[str], str]) -> None:
        super().__init__()
        self._show = show

    def __missing__(self, text: str) -> str:
        if len(self) >= SHOWN_MAX:
            self.clear()
        shown = self[text] = self._show(text)
        return shown


class JsonLines(logging.Formatter):
    """One JSON object a line: ts (UTC, ISO 8601), level, action, process, message, exception, extras."""

    null = "null"

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        # Ours are written last, so that no extra can pass for the time or the level.
        line: dict[str, Any] = {**_extras(record), **self._own(record), "message": record.getMessage()}
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(line, ensure_ascii=False, default=str)

    def _own(self, record: logging.LogRecord) -> dict[str, str]:
        return {
            "ts": _when(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "action": getattr(record, "action", ""),
            "process": self._process,
            "logger": record.name,
        }

    def shown(self, text: str) -> str:
        """The text as it stands between the quotes of a JSON string."""
        return json.dumps(text, ensure_ascii=False)[1:-1]

    def rendered(self, shape: Shape, record: logging.LogRecord, rows: list[Row]) -> list[str]:
        """Lines that have their time, level and name from `record`."""
        own = json.dumps(self._own(record), ensure_ascii=False)[1:-1]
        gaps, before = [], "{"
        for name in shape.extras:
            quote = '"' if name in shape.texts else ""
            gaps.append(f'{before}"{name}": {quote}')
            before = f"{quote}, "
        for row in rows:
            row.append(row.pop(0))
        return interleaved([*gaps, f'{before}{own}, "message": "', '"}\n'], rows)


class HumanLines(logging.Formatter):
    """`12:00:00.123 warning gateway: words (name=value ...)`; an exception's traceback follows, indented."""

    null = "None"

    def __init__(self, process: str, *, in_colour: bool) -> None:
        super().__init__()
        self._process = process
        self._in_colour = in_colour

    def format(self, record: logging.LogRecord) -> str:
        extras = " ".join(f"{name}={_on_one_line(value)}" for name, value in _extras(record).items())
        words = _on_one_line(record.getMessage()) + (f" ({extras})" if extras else "")
        before, after = self._around(record)
        line = before + words + after
        if record.exc_info:
            trace = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            line += "".join(f"\n    {part}" for part in trace.splitlines())
        return line

    def _around(self, record: logging.LogRecord) -> tuple[str, str]:
        """What stands before the words, and behind them."""
        when = _when(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        before = f"{when} {record.levelname.lower():<7} {self._process}: "
        if self._in_colour and record.levelname in _COLOURS:
            return _COLOURS[record.levelname] + before, _PLAIN
        return before, ""

    def shown(self, text: str) -> str:
        """The text with control characters spelled out."""
        return _on_one_line(text)

    def rendered(self, shape: Shape, record: logging.LogRecord, rows: list[Row]) -> list[str]:
        """Lines that have their time, level and name from `record`."""
        before, after = self._around(record)
        first, *others = shape.extras
        gaps = [before, f" ({first}=", *(f" {name}=" for name in others), f"){after}\n"]
        return interleaved(gaps, rows)


def _pieces(lines: list[str], bytes_max: int) -> Iterator[str]:
    """Whole lines, as many at once as fit into so many bytes: a pipe takes those in one go, whoever else writes into it."""
    piece: list[str] = []
    size = 0
    for line in lines:
        length = len(line) if line.isascii() else len(line.encode(errors="replace"))
        if size + length > bytes_max and piece:
            yield "".join(piece)
            piece.clear()
            size = 0
        piece.append(line)
        size += length
    if piece:
        yield "".join(piece)


def _when(record: logging.LogRecord) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(record.created, datetime.UTC)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {name: value for name, value in vars(record).items() if name not in _OWN_FIELDS}


def _on_one_line(value: object) -> str:
    """The text with control characters spelled out: what a client sent can't forge a line."""
    text = str(value)
    if text.isprintable():  # about every text is, and this costs a tenth of looking at each character here
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
