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
It needs no database. SIGTERM and Ctrl-C drain the engines (engine_drain_s) before they are stopped."""


class BadArgument(ValueError):
    """An option can't be used; the text says which and why."""


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
    """Run the agent until it ends; its exit code. Raises BadArgument, and CannotStart of `main`."""
    gateway = checked_url(args.gateway, "--gateway")
    engine_urls = [checked_url(url, "--engine-url") for url in args.engine_urls]
    models = [checked_model(folder) for folder in args.models]
    log(settings)
    import asyncio  # here, as what follows: it loads an HTTP client

    from nodes.agent.main import AgentOptions, run_agent

    options = AgentOptions(
        gateway=gateway,
        key=key,
        data_dir=Path(settings.data_dir).absolute(),
        models=tuple(models),
        engine_urls=tuple(engine_urls),
        engine_python=args.engine_python,
        settings=settings,
    )
    return asyncio.run(run_agent(options))


def key_of(args: argparse.Namespace) -> str:
    """Empty when none was given. Taken out of the environment: engines must not inherit it."""
    from_environment = os.environ.pop(KEY_VARIABLE, "")
    return args.key or from_environment


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
