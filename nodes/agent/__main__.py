"""The agent as a program of its own: what the zipapp starts, and `python -m nodes.agent`."""

import argparse
import os
import sys
from pathlib import Path

from config.logs import setup_logs
from config.settings import BadSetting, load_settings
from nodes.agent.arguments import DETAILS, KEY_VARIABLE, BadArgument, CannotStart, add_node, key_of, run
from nodes.protocol import AGENT_VERSION


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="poolgate-agent", description=DETAILS, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=f"poolgate agent {AGENT_VERSION}")
    add_node(parser.add_argument_group("node"))
    group = parser.add_argument_group("settings", "further settings are read from POOLGATE_* variables")
    group.add_argument("--data-dir", metavar="DIR", help="folder of its id, models, adapters and logs")
    group.add_argument("--config", metavar="FILE", type=Path, help="TOML file of settings")
    args = parser.parse_args(argv)
    key = key_of(args)
    if not key:
        return _complain(f"a provider key is missing: set {KEY_VARIABLE}", 2)
    try:
        settings = load_settings(args.config, os.environ, data_dir=args.data_dir)
        return run(args, settings, key, lambda settings: setup_logs(settings, "agent"))
    except (BadSetting, BadArgument) as error:
        return _complain(str(error), 2)
    except CannotStart as error:
        return _complain(str(error), 1)


def _complain(words: str, code: int) -> int:
    print(f"poolgate-agent: {words}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
