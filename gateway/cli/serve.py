"""Owns `poolgate serve`: the gateway alone, against given stores.

The supervisor and its workers are gateway/supervisor.py's.
"""

import argparse
import os
import signal
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from billing.prices import BadPriceBook, PriceBook
from config.defaults import Settings
from config.embedded import EmbeddedNotRunning, embedded_urls
from config.procs import die_with_parent
from config.settings import BadSetting
from gateway.cli.output import Refused
from gateway.cli.parsing import Parser, add_command, settings_of, settings_options
from gateway.tls import check_certificate

# `poolgate up` was killed and its stores with it: what turns still use can't be recorded.
PARENT_GONE_S = 8.0

DETAILS = """\
Runs the gateway's workers in the foreground until SIGTERM or Ctrl-C; begun turns then have
shutdown_grace_s to end. It starts no stores and no engines: those of DATABASE_URL and REDIS_URL, or
of a running `poolgate up` in --data-dir, are used, and nodes join with `poolgate agent`.
Run `poolgate migrate` before it when the version changed.

SIGHUP reads the settings file, the price book and the TLS files again: one worker after another hands
over to a new one, and no connection is dropped. Settings that are wrong are logged and change nothing.
Variables and options stay those of the start; host, port, probe_* and folders change by a restart only.
With POOLGATE_PROBE_PORT set, /ready, /health and /metrics are also answered there, by the supervisor."""

EXAMPLES = """\
  DATABASE_URL=postgresql://... REDIS_URL=redis://... poolgate serve --host 0.0.0.0 --workers 4
  poolgate serve --config /etc/poolgate.toml        then, after a change of the file: kill -HUP PID
  POOLGATE_TLS_CERTIFICATE=/etc/tls/chain.pem POOLGATE_TLS_KEY=/etc/tls/key.pem poolgate serve
  POOLGATE_LOG_FORMAT=json poolgate serve"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "serve", "run the gateway, with given stores", run=run, details=DETAILS, examples=EXAMPLES,
        options=(settings_options(),),
    )  # fmt: skip
    add_listening(parser)


def add_listening(parser: Parser) -> None:
    group = parser.add_argument_group("gateway")
    group.add_argument("--host", help="address to listen on; 0.0.0.0: the network (default: 127.0.0.1)")
    group.add_argument("--port", type=int, help="port to listen on (default: 8080)")
    group.add_argument("--workers", metavar="N", type=int, help="processes, about one a core (default: 1)")


def run(args: argparse.Namespace) -> int:
    try:
        settings = read_settings(args)
    except EmbeddedNotRunning as error:
        raise Refused(str(error)) from None
    die_with_parent(end_all)
    from gateway.supervisor import serve  # here: the other commands start without loading a web server

    return serve(settings, partial(reread_settings, args))


def read_settings(args: argparse.Namespace) -> Settings:
    """All settings, and what they name is there. Raises BadSetting, EmbeddedNotRunning."""
    settings = settings_of(args, host=args.host, port=args.port, workers=args.workers)
    if not (settings.database_url and settings.redis_url):
        database_url, redis_url = embedded_urls(Path(settings.data_dir))
        settings = replace(
            settings,
            database_url=settings.database_url or database_url,
            redis_url=settings.redis_url or redis_url,
        )
    check_price_book(settings)
    check_certificate(settings)
    return settings


def reread_settings(args: argparse.Namespace) -> Settings:
    """The same again, for a reload: what the files say now, under the environment and options of the start. Raises
    BadSetting."""
    try:
        return read_settings(args)
    except EmbeddedNotRunning as error:
        raise BadSetting(str(error)) from None


def end_all() -> None:
    """Stop as if asked to, but not for long, and the workers with us where the group is ours."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PARENT_GONE_S)
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)


def check_price_book(settings: Settings) -> None:
    """Raises BadSetting: told once here, instead of by each worker that can't start."""
    try:
        PriceBook.load(Path(settings.price_book) if settings.price_book else None)
    except BadPriceBook as error:
        raise BadSetting(f"price_book = {settings.price_book!r}: {error}") from error
