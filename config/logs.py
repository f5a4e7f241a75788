"""Owns what a log line looks like: one line an event, for people or as JSON, on standard error.

What is logged is left to everyone: words for people, `extra={"action": "node_expired", ...}` for machines,
and never a prompt, a key or a header.
"""

import datetime
import json
import logging
import sys
import traceback
from typing import Any, TextIO

from config.defaults import Settings

ROOT = "poolgate"

# What logging puts on every record itself; everything else came with `extra`.
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "action"}
_COLOURS = {"DEBUG": "\x1b[2m", "WARNING": "\x1b[33m", "ERROR": "\x1b[31m", "CRITICAL": "\x1b[1;31m"}
_PLAIN = "\x1b[0m"


def setup_logs(settings: Settings, process: str, *, stream: TextIO | None = None) -> None:
    """Send every log line of this process to `stream` (standard error), marked with the `process` name.

    Our own loggers log from `log_level`, those of libraries from warning. May be called again.
    """
    stream = stream or sys.stderr
    is_json = settings.log_format == "json"
    formatter = JsonLines(process) if is_json else HumanLines(process, in_colour=stream.isatty())
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(settings.log_level.upper())
    logging.captureWarnings(capture=True)


class JsonLines(logging.Formatter):
    """One JSON object a line: ts (UTC, ISO 8601), level, action, process, message, exception, extras."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "ts": _when(record).isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "action": getattr(record, "action", ""),
            "process": self._process,
            "logger": record.name,
            "message": record.getMessage(),
        }
        # Ours are written last, so that no extra can pass for the time or the level.
        line = {**_extras(record), **line}
        if record.exc_info:
            line["exception"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
        return json.dumps(line, ensure_ascii=False, default=str)


class HumanLines(logging.Formatter):
    """`12:00:00.123 warning gateway: words (name=value ...)`; an exception's traceback follows, indented."""

    def __init__(self, process: str, *, in_colour: bool) -> None:
        super().__init__()
        self._process = process
        self._in_colour = in_colour

    def format(self, record: logging.LogRecord) -> str:
        when = _when(record).astimezone().strftime("%H:%M:%S.%f")[:-3]
        extras = " ".join(f"{name}={_on_one_line(value)}" for name, value in _extras(record).items())
        words = _on_one_line(record.getMessage()) + (f" ({extras})" if extras else "")
        line = f"{when} {record.levelname.lower():<7} {self._process}: {words}"
        if self._in_colour and record.levelname in _COLOURS:
            line = f"{_COLOURS[record.levelname]}{line}{_PLAIN}"
        if record.exc_info:
            trace = "".join(traceback.format_exception(*record.exc_info)).rstrip()
            line += "".join(f"\n    {part}" for part in trace.splitlines())
        return line


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
