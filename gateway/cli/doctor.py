"""Owns `poolgate doctor`: one line for each thing that must be right on this machine, and what to do where it is not.

What is looked at is checks.py's.
"""

import argparse
from dataclasses import asdict

from rich.markup import escape

from gateway.cli.checks import Check, State, all_checks
from gateway.cli.output import print_json, stdout
from gateway.cli.parsing import Parser, add_command, json_option, settings_of, settings_options

DETAILS = """\
Looks at Python, the stores, the port, the engine's environment, the GPU, the model files, the disk and the
limits of this machine, changes nothing, and says what to do about each that is not well.
The exit code is 1 when one of them fails; warnings don't count."""

EXAMPLES = """\
  poolgate doctor
  poolgate doctor --port 9000 --json"""

STYLE: dict[State, str] = {"ok": "green", "warn": "yellow", "fail": "red"}


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands,
        "doctor",
        "check this machine and say what to do",
        run=run,
        details=DETAILS,
        examples=EXAMPLES,
        options=(settings_options(), json_option()),
    )
    parser.add_argument("--host", help="address that the gateway is to listen on")
    parser.add_argument("--port", type=int, help="port that the gateway is to listen on")


def run(args: argparse.Namespace) -> int:
    checks = all_checks(settings_of(args, host=args.host, port=args.port))
    if args.json:
        print_json([asdict(check) for check in checks])
    else:
        for check in checks:
            show(check)
    return 1 if any(check.state == "fail" for check in checks) else 0


def show(check: Check) -> None:
    console = stdout()
    mark = f"[{STYLE[check.state]}]{check.state:<4}[/]"
    console.print(f"{mark}  {check.name:<12} {escape(check.found)}")
    if check.advice:
        console.print(f"{'':<19}[dim]→[/] {escape(check.advice)}")
