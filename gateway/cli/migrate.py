"""Owns `poolgate migrate`: bring the database's tables to this version.

The SQL files and their lock are config/postgres.py's.
"""

import argparse
import asyncio

from config.postgres import migrate
from gateway.cli.output import print_json, stderr
from gateway.cli.parsing import Parser, add_command, json_option, settings_of, settings_options
from gateway.cli.stores import database_of, explained

DETAILS = """\
Applies the SQL migrations that the database lacks, in order, each in one transaction, under an advisory
lock: it may run on several hosts at once. Migrations go forward only; `poolgate up` runs them by itself."""

EXAMPLES = """\
  DATABASE_URL=postgresql://poolgate@db.example.com/poolgate poolgate migrate
  poolgate migrate --data-dir ./data --json"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    add_command(
        commands, "migrate", "bring the database's tables to this version", run=run, details=DETAILS,
        examples=EXAMPLES, options=(settings_options(), json_option()),
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    with database_of(settings_of(args)) as url, explained(url):
        applied = asyncio.run(migrate(url, progress=lambda line: stderr().print(line, style="dim")))
    if args.json:
        print_json({"applied": applied})
    elif applied:
        print(f"applied {len(applied)}: {', '.join(applied)}")
    else:
        print("the tables are up to date")
    return 0
