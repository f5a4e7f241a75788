"""Owns `poolgate agent`: the agent of one GPU host, which runs engines and reports them to a gateway.

What it does is nodes/agent's.
"""

import argparse
import os
from pathlib import Path
from urllib.parse import urlsplit

from config.logs import setup_logs
from gateway.cli.output import Refused
from gateway.cli.parsing import Parser, add_command, settings_of, settings_options

KEY_VARIABLE = "POOLGATE_AGENT_KEY"

DETAILS = """\
Starts vLLM for each --model, watches it, restarts it when it dies, and reports it to the gateway, which
then sends it turns. With --engine-url it reports vLLM servers that run already and starts none.
It needs no database. SIGTERM and Ctrl-C drain the engines (engine_drain_s) before they are stopped.

Engines listen on this host alone. A gateway elsewhere reaches them through this agent: by the tunnel that
it opens, which needs nothing but the way out to the gateway; or by its TLS listener at the address that
--advertise names, once the gateway has found it there."""

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
    group.add_argument("--gateway", metavar="URL", required=True, help="base URL of the gateway to report to")
    group.add_argument(
        "--key",
        help=f"provider key, scope `node`; better in {KEY_VARIABLE}: others can see arguments",
    )
    add_engines(group)
    group.add_argument(
        "--reach", choices=("auto", "direct", "agent"), default="auto",
        help="how the gateway gets to the engines: straight at their addresses (direct), or through this agent; "
        "auto: direct if the gateway is on this host",
    )  # fmt: skip
    group.add_argument(
        "--advertise", metavar="HOST:PORT", default="",
        help="address at which the gateway reaches this agent's listener; without it, the tunnel serves",
    )  # fmt: skip
    group.add_argument(
        "--listen", metavar="[HOST]:PORT", default="",
        help="address that the listener listens on, if it is not every one with the port of --advertise",
    )  # fmt: skip


def add_engines(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--model", metavar="FOLDER", dest="models", action="append", default=[], type=Path,
        help="model folder to serve with an engine of its own (repeatable)",
    )  # fmt: skip
    group.add_argument(
        "--engine-url", metavar="URL", dest="engine_urls", action="append", default=[],
        help="vLLM server that runs already, as http://HOST:PORT (repeatable); its models are read from it",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    settings = settings_of(args)
    key = args.key or os.environ.pop(KEY_VARIABLE, "")
    if not key:
        raise Refused(
            f"a provider key is missing: set {KEY_VARIABLE}; `poolgate key create --account NAME --scope node` "
            "makes one"
        )
    gateway = checked_url(args.gateway, "--gateway")
    engine_urls = [checked_url(url, "--engine-url") for url in args.engine_urls]
    models = [checked_model(folder) for folder in args.models]
    reach = checked_reach(args, gateway)
    setup_logs(settings, "agent")
    from nodes.agent.main import AgentOptions, CannotStart, run_to_end  # here: it loads an HTTP client

    options = AgentOptions(
        gateway=gateway,
        key=key,
        data_dir=Path(settings.data_dir).absolute(),
        models=tuple(models),
        engine_urls=tuple(engine_urls),
        reach=reach,
        advertise=args.advertise,
        listen=args.listen,
        settings=settings,
    )
    try:
        run_to_end(options)
    except CannotStart as error:
        raise Refused(str(error)) from error
    return 0


def checked_reach(args: argparse.Namespace, gateway: str) -> str:
    """`direct` or `agent`; Refused for addresses that are none."""
    for option, text in (("--advertise", args.advertise), ("--listen", args.listen)):
        host, _, port = text.rpartition(":")
        if text and not (port.isdecimal() and 0 < int(port) < 65536 and (host or option == "--listen")):
            raise Refused(f"{option} {text}: expected HOST:PORT")
    if args.listen and not args.advertise:
        raise Refused("--listen goes together with --advertise: nobody would know of the listener")
    if args.reach == "direct" and args.advertise:
        raise Refused("--advertise goes together with --reach agent")
    if args.reach != "auto":
        return str(args.reach)
    is_here = urlsplit(gateway).hostname in ("127.0.0.1", "::1", "localhost")
    return "direct" if is_here and not args.advertise else "agent"


def checked_url(url: str, option: str) -> str:
    """`http(s)://host[:port]` without its last slash; Refused for anything else."""
    try:
        parts = urlsplit(url)
        wrong = parts.port == 0
    except ValueError:
        parts, wrong = urlsplit(""), True
    if wrong or parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise Refused(
            f"{option} {url!r} is not an address: write it as http://HOST:PORT, such as http://127.0.0.1:8000"
        )
    if parts.path.rstrip("/"):
        raise Refused(f"{option} {url!r} has a path: leave {parts.path!r} away, paths are added by poolgate")
    return f"{parts.scheme}://{parts.netloc}"


def checked_model(folder: Path) -> Path:
    """An absolute folder that has a model's config.json; Refused for anything else."""
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise Refused(f"--model {folder} is no folder: give one with a model's config.json and safetensors")
    if not (folder / "config.json").is_file():
        raise Refused(f"--model {folder} has no config.json: give the folder of a Hugging Face model")
    return folder
