"""Owns `poolgate agent`: the agent of one GPU host, which runs engines and reports them to a gateway.

What it does is nodes/agent's.
"""

import argparse
from pathlib import Path

from config.logs import setup_logs
from gateway.cli.output import Refused
from gateway.cli.parsing import Parser, add_command, settings_of, settings_options
from nodes.agent import arguments
from nodes.agent.arguments import DETAILS, KEY_VARIABLE, add_engines, add_node

__all__ = ["KEY_VARIABLE", "add", "add_engines", "checked_model", "checked_url"]

EXAMPLES = """\
  POOLGATE_AGENT_KEY=dc1-provider-... poolgate agent --gateway https://gateway.example.com --model ~/llama
  poolgate agent --gateway http://127.0.0.1:8080 --key dc1-provider-... --engine-url http://127.0.0.1:8000
  poolgate agent --gateway https://gateway.example.com --model ~/llama --advertise gpu-7.example.com:8443

a key for it, made where the gateway's database is:
  poolgate account create --name rack-1 --provider
  poolgate key create --account rack-1 --scope node"""


def add(commands: "argparse._SubParsersAction[Parser]") -> None:
    parser = add_command(
        commands, "agent", "run the node agent of this GPU host", run=run, details=DETAILS, examples=EXAMPLES,
        options=(settings_options(),),
    )  # fmt: skip
    group = parser.add_argument_group("node")
    add_node(group)


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    key = arguments.key_of(args)
    if not key:
        raise Refused(
            f"a provider key is missing: set {KEY_VARIABLE}; `poolgate key create --account NAME --scope node` "
            "makes one"
        )
    try:
        return arguments.run(args, settings, key, lambda settings: setup_logs(settings, "agent"))
    except (arguments.BadArgument, arguments.CannotStart) as error:
        raise Refused(str(error)) from error


def checked_url(url: str, option: str) -> str:
    """As `arguments.checked_url`; raises Refused."""
    try:
        return arguments.checked_url(url, option)
    except arguments.BadArgument as error:
        raise Refused(str(error)) from error


def checked_model(folder: Path) -> Path:
    """As `arguments.checked_model`; raises Refused."""
    try:
        return arguments.checked_model(folder)
    except arguments.BadArgument as error:
        raise Refused(str(error)) from error
