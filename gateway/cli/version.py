"""Owns `poolgate version`: which poolgate, Python and system this is."""

import argparse
import platform
import sys

from gateway import VERSION
from gateway.cli.output import print_json
from gateway.cli.parsing import Parser, add_command, json_option


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    add_command(
        commands,
        "version",
        "print the versions of poolgate and Python",
        run=run,
        options=(json_option(),),
        examples="  poolgate version\n  poolgate version --json",
    )


def run(args: argparse.Namespace) -> int:
    facts = {
        "poolgate": VERSION,
        "python": platform.python_version(),
        "system": platform.platform(),
    }
    if args.json:
        print_json({**facts, "executable": sys.executable})
    else:
        print(f"poolgate {facts['poolgate']} (Python {facts['python']}, {facts['system']})")
    return 0
