"""Owns the command line `poolgate`: its parser, and how failures are told (exit code 2: typed wrong, 1: failed).

Each command is a module of `gateway.cli`.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Sequence

from config.settings import BadSetting
from gateway.cli import (
    account,
    agent,
    audit,
    budget,
    doctor,
    key,
    limit,
    migrate,
    node,
    recover,
    serve,
    statement,
    tier,
    top,
    up,
    usage,
    version,
)
from gateway.cli.output import Refused
from gateway.cli.parsing import Parser, add_group

DESCRIPTION = """\
One OpenAI-compatible endpoint over a pool of GPU hosts, with the money and the queues that such a pool needs.

New here? `poolgate up` starts the whole system on this machine and prints a key and a first request to paste.
"""

EPILOG = """\
where things are:
  Settings come from a TOML file (--config), then POOLGATE_* variables, then options; docs/settings.md
  lists them. DATABASE_URL and REDIS_URL name real stores; without them commands use those of the data
  folder (--data-dir).

examples:
  poolgate up                                     everything, with a real engine on this machine
  poolgate up --engine-url http://127.0.0.1:8000  the same over a vLLM server that runs already
  poolgate key create --account acme              a new API key, shown once
  poolgate usage --since 7d --by model            what was used and what it cost
  poolgate doctor                                 what is missing here, and what to do about it
"""


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except BadSetting as error:
        return complain(str(error), 2)
    except Refused as error:
        return complain(str(error), 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # noqa: BLE001 - a person at a terminal gets a sentence, never a traceback
        if is_debug():
            traceback.print_exc()
            return 1
        said = str(error).strip() or "no details"
        return complain(f"{type(error).__name__}: {said} (POOLGATE_DEBUG=1 shows where)", 1)
    return code


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="poolgate", description=DESCRIPTION, epilog=EPILOG)
    commands = add_group(parser)
    for module in (
        up,
        serve,
        agent,
        migrate,
        account,
        key,
        limit,
        tier,
        budget,
        node,
        usage,
        statement,
        audit,
        recover,
        top,
        doctor,
        version,
    ):
        module.add(commands)
    return parser


def complain(message: str, code: int) -> int:
    print(f"poolgate: {message}", file=sys.stderr)
    if code == 1 and is_debug():
        traceback.print_exc()
    return code


def is_debug() -> bool:
    return os.environ.get("POOLGATE_DEBUG", "") not in ("", "0")


if __name__ == "__main__":
    sys.exit(main())
