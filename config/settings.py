"""Builds the one frozen Settings object from defaults, a TOML file, the environment and the command line.

What settings there are, and what each allows, is said by `defaults`; the parser of the command line is the
gateway's.
"""

import difflib
import ipaddress
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any

from config.compiled import SWITCH
from config.defaults import Settings

PREFIX = "POOLGATE_"
FILE_VARIABLE = "POOLGATE_CONFIG"
# Variables that hosting platforms set by these names.
PLAIN_VARIABLES = {"DATABASE_URL": "database_url", "REDIS_URL": "redis_url"}
# Names with our prefix that are no settings: the file's own, what a parent passes its children, what the
# command line's client commands read, and how modules are imported.
RESERVED_VARIABLES = frozenset(
    {
        FILE_VARIABLE, "POOLGATE_PARENT_FD", "POOLGATE_URL", "POOLGATE_API_KEY", "POOLGATE_AGENT_KEY", "POOLGATE_DEBUG",
        "POOLGATE_STOP_WITH_PARENT", "POOLGATE_TORCH_INDEX", "POOLGATE_LAUNCHED_FROM", SWITCH,
    }
)  # fmt: skip

_KNOBS: dict[str, Field[Any]] = {knob.name: knob for knob in fields(Settings)}
_KIND_WORDS = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
NANO_PER_MAJOR = 10**9
ADMIN_TOKEN_CHARS_MIN = 16


class BadSetting(ValueError):
    """A setting that can't be used; the message names it, its value and what is allowed."""


def load_settings(
    file: Path | None = None, environ: Mapping[str, str] = os.environ, **overrides: Any
) -> Settings:
    """All settings, checked. Raises BadSetting.

    Later ones win: defaults, the file, DATABASE_URL and REDIS_URL, POOLGATE_*, `overrides`. `file` falls back
    to POOLGATE_CONFIG. An override of None was not given.
    """
    if file is None and environ.get(FILE_VARIABLE):
        file = Path(environ[FILE_VARIABLE])
    values = {
        **(_from_file(file) if file else {}),
        **_from_environment(environ),
        **_from_command_line(overrides),
    }
    settings = Settings(**values)
    check_relations(settings)
    return settings


def allowed(knob: Field[Any]) -> str:
    """What a setting allows, in words."""
    meta = knob.metadata
    if meta["choices"]:
        return " or ".join(meta["choices"])
    kind, low, high, unit = _KIND_WORDS[_kind(knob)], meta["low"], meta["high"], meta["unit"]
    bounds = {
        (False, False): "",
        (True, False): f" from {_plain(low)}",
        (False, True): f" up to {_plain(high)}",
        (True, True): f" from {_plain(low)} to {_plain(high)}",
    }[low is not None, high is not None]
    return f"{kind}{bounds}" + (f" ({unit})" if unit else "")


def check_relations(settings: Settings) -> None:
    """Refuse settings that are fine alone and wrong together, or whose text means nothing (BadSetting)."""
    for name, is_fine, wanted in _RULES:
        try:
            fine = is_fine(settings)
        except ValueError:
            fine = False
        if not fine:
            raise BadSetting(f"{name} = {_shown(_KNOBS[name], getattr(settings, name))}: {wanted(settings)}")


_Rule = tuple[str, Callable[[Settings], bool], Callable[[Settings], str]]


def _above(name: str, other: str, why: str, *, or_equal: bool = False) -> _Rule:
    def is_fine(settings: Settings) -> bool:
        value, bound = getattr(settings, name), getattr(settings, other)
        return bool(value >= bound if or_equal else value > bound)

    words = "at least" if or_equal else "greater than"
    return (
        name,
        is_fine,
        lambda settings: f"must be {words} {other} ({_plain(getattr(settings, other))}): {why}",
    )


def _text(name: str, is_fine: Callable[[str], bool], wanted: str) -> _Rule:
    return name, lambda settings: is_fine(getattr(settings, name)), lambda _settings: f"must be {wanted}"


def _are_networks(text: str) -> bool:
    return all(ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip())


_RULES: tuple[_Rule, ...] = (
    _above("heartbeat_grace_s", "heartbeat_interval_s", "a node would leave between two heartbeats"),
    _above("breaker_open_max_s", "breaker_open_s", "the longest is no shorter than the first", or_equal=True),
    _above(
        "engine_restart_max_s", "engine_restart_s", "the longest is no shorter than the first", or_equal=True
    ),
    _above("journal_bytes_max", "journal_segment_bytes", "a file must fit, and the one ahead"),
    _above("complete_tokens_max", "default_model_tokens", "the default would be refused", or_equal=True),
    (
        "minor_per_major", lambda settings: NANO_PER_MAJOR % settings.minor_per_major == 0,
        lambda _settings: "must divide 1000000000: a minor unit is a whole number of nano",
    ),
    (
        "tls_key", lambda settings: bool(settings.tls_certificate) == bool(settings.tls_key),
        lambda _settings: "must go together with tls_certificate: both, or neither",
    ),
    _text("host", bool, "an address; 0.0.0.0 is every one"),
    _text("probe_host", bool, "an address; 0.0.0.0 is every one"),
    _text("hop_host", bool, "an address that other workers can reach"),
    _text("data_dir", bool, "the path of a folder"),
    _text("currency", lambda text: bool(re.fullmatch("[A-Z]{3}", text)), "three capital letters (ISO 4217)"),
    _text(
        "admin_token", lambda text: not text or (len(text) >= ADMIN_TOKEN_CHARS_MIN and text.isascii()),
        f"empty, or {ADMIN_TOKEN_CHARS_MIN} ASCII characters and more: it opens everything",
    ),
    _text(
        "mail_url", lambda url: not url or bool(re.fullmatch(r"smtps?://([^/@]+@)?[^/@:]+(:\d+)?/?", url)),
        "empty, or smtp://USER:PASSWORD@HOST:PORT or smtps://..., with %-escapes in user and password",
    ),
    _text("mail_from", lambda text: bool(re.fullmatch(r"[^@\s<>]+@[^@\s<>]+", text)), "an address, such as gpu@example.com"),
    _text("trusted_proxies", _are_networks, "networks like 10.0.0.0/8, comma separated, no host bits set"),
    _text("node_networks", _are_networks, "networks like 10.0.0.0/8, comma separated, no host bits set"),
    _text(
        "database_url", lambda url: not url or url.startswith(("postgresql://", "postgres://")),
        "empty, or start with postgresql://",
    ),
    _text(
        "redis_url", lambda url: not url or url.startswith(("redis://", "rediss://", "unix://")),
        "empty, or start with redis://, rediss:// or unix://",
    ),
)  # fmt: skip


def _from_file(file: Path) -> dict[str, Any]:
    try:
        found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadSetting(f"the settings file {file} can't be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadSetting(f"the settings file {file} is not TOML: {error}") from error
    return {name: _checked(_knob(name, f"in {file}"), value, f"in {file}") for name, value in found.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    values = {
        name: _parsed(_KNOBS[name], environ[variable], variable)
        for variable, name in PLAIN_VARIABLES.items()
        if variable in environ
    }
    for variable, text in environ.items():
        if variable.startswith(PREFIX) and variable not in RESERVED_VARIABLES:
            knob = _knob(variable.removeprefix(PREFIX).lower(), "in the environment", shown_as=variable)
            values[knob.name] = _parsed(knob, text, variable)
    return values


def _from_command_line(overrides: Mapping[str, Any]) -> dict[str, Any]:
    values = {}
    for name, value in overrides.items():
        if value is not None:
            knob, source = _knob(name, "on the command line"), "on the command line"
            is_text = isinstance(value, str) and _kind(knob) is not str
            values[name] = _parsed(knob, value, source) if is_text else _checked(knob, value, source)
    return values


def _knob(name: str, source: str, *, shown_as: str = "") -> Field[Any]:
    if name in _KNOBS:
        return _KNOBS[name]
    like = difflib.get_close_matches(name, _KNOBS, n=1)
    meant = ""
    if like:
        meant = f"; did you mean {PREFIX + like[0].upper() if shown_as else like[0]}?"
    raise BadSetting(f"{shown_as or name} ({source}) is not a setting{meant}")


def _parsed(knob: Field[Any], text: str, source: str) -> Any:
    """Text of the environment as the setting's own type."""
    kind = _kind(knob)
    if kind is str:
        return _checked(knob, text, source)
    try:
        value = _TRUTH[text.strip().lower()] if kind is bool else kind(text.strip())
    except (ValueError, KeyError):
        raise _bad(knob, text, source) from None
    return _checked(knob, value, source)


_TRUTH = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def _checked(knob: Field[Any], value: Any, source: str) -> Any:
    """The value, if it has the setting's type and keeps its bounds. A whole number will do for a number."""
    kind, meta = _kind(knob), knob.metadata
    if kind is float and type(value) is int:
        value = float(value)
    is_fine = (
        type(value) is kind
        and not (isinstance(value, float) and not math.isfinite(value))
        and (meta["low"] is None or value >= meta["low"])
        and (meta["high"] is None or value <= meta["high"])
        and (not meta["choices"] or value in meta["choices"])
    )
    if not is_fine:
        raise _bad(knob, value, source)
    return value


def _bad(knob: Field[Any], value: Any, source: str) -> BadSetting:
    return BadSetting(
        f"{knob.name} = {_shown(knob, value)} ({source}): allowed is {allowed(knob)}. "
        f"What it is: {knob.metadata['why']}"
    )


def _shown(knob: Field[Any], value: Any) -> str:
    return "(hidden)" if knob.metadata["secret"] else repr(value)


def _kind(knob: Field[Any]) -> type:
    assert isinstance(knob.type, type), f"{knob.name}: the type of a setting is str, int, float or bool"
    return knob.type


def _plain(value: object) -> str:
    """5 for 5.0: a whole number reads better without its point."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def markdown() -> Iterator[str]:
    """The lines of docs/settings.md."""
    yield "# Settings"
    yield ""
    yield "Printed by `python -m config.settings --markdown`; the list itself is `config/defaults.py`."
    yield ""
    yield (
        "Later ones win: the default, a line in the TOML file that `--config` or `POOLGATE_CONFIG` names, "
        "the variable `POOLGATE_` + the name in capitals (`DATABASE_URL` and `REDIS_URL` also work by these "
        "names), the command line. An unknown name or a value that is not allowed is refused at start."
    )
    yield ""
    yield "| setting | default | allowed | what it is, and why |"
    yield "|---|---|---|---|"
    for knob in _KNOBS.values():
        default = f"`{_plain(knob.default)}`" if knob.default != "" else "empty"
        why = knob.metadata["why"].replace("|", "\\|")
        yield f"| `{knob.name}` | {default} | {allowed(knob)} | {why} |"


def main(arguments: list[str]) -> int:
    """Print the settings' page."""
    if arguments != ["--markdown"]:
        sys.stderr.write("usage: python -m config.settings --markdown\n")
        return 2
    sys.stdout.write("\n".join(markdown()) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
