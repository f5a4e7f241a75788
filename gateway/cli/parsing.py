"""Owns how the command line is declared: a parser that teaches and suggests, and options that commands share.

What the commands do is left to the modules beside it.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from config.defaults import Settings
from config.settings import load_settings

Run = Callable[[argparse.Namespace], int]

# What the command line itself reads from the environment, beside settings.
OWN_VARIABLES = frozenset(
    {
        "POOLGATE_DEBUG",
        "POOLGATE_ADMIN_KEY",
        "POOLGATE_AGENT_KEY",
        "POOLGATE_STOP_WITH_PARENT",
        "POOLGATE_TORCH_INDEX",
    }
)


class Parser(argparse.ArgumentParser):
    """argparse's parser; its errors are one sentence with what to type next, exit code 2."""

    def __init__(self, **options: Any) -> None:
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        # An abbreviation that works today may be ambiguous with tomorrow's option.
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        known = [choice for action in self._subparsers_actions() for choice in action.choices]
        print(f"{self.prog}: {explain(message, known)} Try: {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def _subparsers_actions(self) -> list[Any]:
        return [action for action in self._actions if isinstance(action.choices, dict)]


def explain(message: str, known: list[str]) -> str:
    """An argparse message as a sentence; a mistyped command gets the nearest known one."""
    if found := re.search(r"invalid choice: '([^']*)'", message):
        typed = found[1]
        if known:
            near = difflib.get_close_matches(typed, known, n=1, cutoff=0.5)
            offer = f"did you mean `{near[0]}`?" if near else f"there are: {', '.join(known)}."
            return f"there is no command `{typed}`; {offer}"
    if message == "the following arguments are required: COMMAND":
        return f"say what to do: {', '.join(known)}."
    if message.startswith("the following arguments are required: "):
        return f"missing: {message.partition(': ')[2]}."
    return f"{message.rstrip('.')}."


def add_command(
    commands: "argparse._SubParsersAction[Parser]", name: str, summary: str, *, run: Run | None = None,
    details: str = "", examples: str = "", options: tuple[Parser, ...] = (),
) -> Parser:  # fmt: skip
    """One command; `summary` stands in the list of commands and opens its own help, `examples` close it."""
    description = summary[:1].upper() + summary[1:] + "." + (f"\n\n{details}" if details else "")
    parser = commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=f"examples:\n{examples}" if examples else None,
        parents=options,
    )
    if run is not None:
        parser.set_defaults(run=run)
    return parser


def add_group(parser: Parser) -> "argparse._SubParsersAction[Parser]":
    """A place for the commands under `parser`; leaving them out is a usage error that lists them."""
    return parser.add_subparsers(
        metavar="COMMAND", dest=f"command_of_{parser.prog}", required=True, title="commands"
    )


def settings_options() -> Parser:
    """Options of every command that reads settings."""
    parser = Parser(add_help=False)
    group = parser.add_argument_group("settings")
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        help="folder of stores, keys and logs of `poolgate up` (default: ./data)",
    )
    group.add_argument(
        "--config", metavar="FILE", type=Path, help="TOML file of settings; POOLGATE_* variables override it"
    )
    return parser


def json_option() -> Parser:
    parser = Parser(add_help=False)
    parser.add_argument("--json", action="store_true", help="print JSON, for programs")
    return parser


def settings_of(args: argparse.Namespace, **overrides: Any) -> Settings:
    """Settings from file and environment, with what the command line says on top; None means not said."""
    said = {"data_dir": getattr(args, "data_dir", None), **overrides}
    environ = {name: value for name, value in os.environ.items() if name not in OWN_VARIABLES}
    return load_settings(args.config, environ, **said)
