"""The agent's command line, shared by `poolgate agent` and by the zipapp: options, and how they become `AgentOptions`."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from config.defaults import Settings

KEY_VARIABLE = "POOLGATE_AGENT_KEY"

DETAILS = """\
Starts vLLM for each --model, watches it, restarts it when it dies, and reports it to the gateway, which
then sends it turns. With --engine-url it reports vLLM servers that run already and starts none.
It needs no database. SIGTERM and Ctrl-C drain the engines (engine_drain_s) before they are stopped.

Engines listen on this host alone. A gateway elsewhere reaches them through this agent: by the tunnel that
it opens, which needs nothing but the way out to the gateway; or by its TLS listener at the address that
--advertise names, once the gateway has found it there."""


class BadArgument(ValueError):
    """An option can't be used; the text says which and why."""


class CannotStart(RuntimeError):
    """The agent can't run as it was asked to; the text says what to change."""


def add_node(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--gateway", metavar="URL", required=True, help="base URL of the gateway to report to")
    group.add_argument(
        "--key",
        help=f"provider key, scope `node`; better in {KEY_VARIABLE}: others can see arguments",
    )
    group.add_argument(
        "--engine-python", metavar="FILE", type=Path,
        help="interpreter of the environment that has vLLM (default: this one, or what `make engine` built)",
    )  # fmt: skip
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


def run(args: argparse.Namespace, settings: Settings, key: str, log: Callable[[Settings], None]) -> int:
    """Run the agent until it ends; its exit code. Raises BadArgument and CannotStart."""
    gateway = checked_url(args.gateway, "--gateway")
    engine_urls = [checked_url(url, "--engine-url") for url in args.engine_urls]
    models = [checked_model(folder) for folder in args.models]
    reach = checked_reach(args, gateway)
    log(settings)
    from nodes.agent.main import AgentOptions, run_to_end  # here: it loads an HTTP client

    options = AgentOptions(
        gateway=gateway,
        key=key,
        data_dir=Path(settings.data_dir).absolute(),
        models=tuple(models),
        engine_urls=tuple(engine_urls),
        engine_python=args.engine_python,
        reach=reach,
        advertise=args.advertise,
        listen=args.listen,
        settings=settings,
    )
    return run_to_end(options)


def key_of(args: argparse.Namespace) -> str:
    """Empty when none was given. Taken out of the environment: engines must not inherit it."""
    from_environment = os.environ.pop(KEY_VARIABLE, "")
    return args.key or from_environment


def checked_reach(args: argparse.Namespace, gateway: str) -> str:
    """`direct` or `agent`; BadArgument for addresses that are none."""
    for option, text in (("--advertise", args.advertise), ("--listen", args.listen)):
        host, _, port = text.rpartition(":")
        if text and not (port.isdecimal() and 0 < int(port) < 65536 and (host or option == "--listen")):
            raise BadArgument(f"{option} {text}: expected HOST:PORT")
    if args.listen and not args.advertise:
        raise BadArgument("--listen goes together with --advertise: nobody would know of the listener")
    if args.reach == "direct" and args.advertise:
        raise BadArgument("--advertise goes together with --reach agent")
    if args.reach != "auto":
        return str(args.reach)
    is_here = urlsplit(gateway).hostname in ("127.0.0.1", "::1", "localhost")
    return "direct" if is_here and not args.advertise else "agent"


def checked_url(url: str, option: str) -> str:
    """`http(s)://host[:port]` without its last slash; BadArgument for anything else."""
    try:
        parts = urlsplit(url)
        wrong = parts.port == 0
    except ValueError:
        parts, wrong = urlsplit(""), True
    if wrong or parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.query:
        raise BadArgument(
            f"{option} {url!r} is not an address: write it as http://HOST:PORT, such as http://127.0.0.1:8000"
        )
    if parts.path.rstrip("/"):
        raise BadArgument(
            f"{option} {url!r} has a path: leave {parts.path!r} away, paths are added by poolgate"
        )
    return f"{parts.scheme}://{parts.netloc}"


def checked_model(folder: Path) -> Path:
    """An absolute folder that has a model's config.json; BadArgument for anything else."""
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise BadArgument(
            f"--model {folder} is no folder: give one with a model's config.json and safetensors"
        )
    if not (folder / "config.json").is_file():
        raise BadArgument(f"--model {folder} has no config.json: give the folder of a Hugging Face model")
    return folder
