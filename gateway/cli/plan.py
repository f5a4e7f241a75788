"""Owns what one `poolgate up` is to do, checked before anything is started.

Doing it is up.py's.
"""

import argparse
import ipaddress
import os
import socket
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from urllib.parse import urlsplit

from config.defaults import Settings
from gateway.cli.agent import KEY_VARIABLE, checked_model, checked_url
from gateway.cli.development import check_given_key
from gateway.cli.output import Refused
from gateway.cli.parsing import OWN_VARIABLES, settings_of
from gateway.cli.probes import reachable_base_url, why_port_is_taken
from gateway.cli.serve import check_price_book

DEVELOPER_MODE = "POOLGATE_DEVELOPER_MODE"
LOOPBACK = "127.0.0.0/8,::1/128"
"""Where this command's own agent has its engines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """`settings` have the data folder as an absolute path and the networks of the given engines."""

    settings: Settings
    config: Path | None
    base_url: str
    key: str | None
    has_node: bool
    models: tuple[Path, ...]
    engine_urls: tuple[str, ...]

    @property
    def data_dir(self) -> Path:
        return Path(self.settings.data_dir)

    @property
    def needs_engine(self) -> bool:
        """An engine is to be started here, so its environment must exist."""
        return self.has_node and not self.engine_urls

    def serve_arguments(self) -> list[str]:
        settings = self.settings
        listening = [
            "--host",
            settings.host,
            "--port",
            str(settings.port),
            "--workers",
            str(settings.workers),
        ]
        return ["serve", *self._shared_arguments(), *listening]

    def agent_arguments(self, models: tuple[Path, ...]) -> list[str]:
        arguments = ["agent", "--gateway", self.base_url, "--reach", "direct", *self._shared_arguments()]
        for url in self.engine_urls:
            arguments += ["--engine-url", url]
        for folder in models:
            arguments += ["--model", str(folder)]
        return arguments

    def serve_environment(self, database_url: str, redis_url: str) -> dict[str, str]:
        return {
            **child_environment(),
            "DATABASE_URL": database_url,
            "REDIS_URL": redis_url,
            "POOLGATE_NODE_NETWORKS": self.settings.node_networks,
            **self._developer_mode(),
        }

    def _developer_mode(self) -> dict[str, str]:
        """On loopback nobody else can register: there is no admin to wait for, and mail goes to a folder."""
        if not is_loopback(self.settings.host):
            return {}
        return {DEVELOPER_MODE: os.environ.get(DEVELOPER_MODE, "true")}

    def agent_environment(self, node_key: str) -> dict[str, str]:
        """The key goes by environment: every user of the machine may read arguments."""
        environment = child_environment()
        environment.pop("DATABASE_URL", None)
        environment.pop("REDIS_URL", None)
        return {**environment, KEY_VARIABLE: node_key}

    def _shared_arguments(self) -> list[str]:
        config = ["--config", str(self.config)] if self.config else []
        return [*config, "--data-dir", str(self.data_dir)]


def plan_of(args: argparse.Namespace) -> Plan:
    """Raises Refused and BadSetting; nothing was started or written then."""
    config = args.config.absolute() if args.config else None
    settings = settings_of(args, host=args.host, port=args.port, workers=args.workers)
    engine_urls = tuple(checked_url(url, "--engine-url") for url in args.engine_urls)
    models = tuple(checked_model(folder) for folder in args.models)
    if engine_urls and models:
        raise Refused("--model starts an engine and --engine-url uses one that runs: give one of the two")
    if args.no_node and (engine_urls or models):
        raise Refused("--no-node starts no agent, so it does not go together with --model or --engine-url")
    check_price_book(settings)
    if settings.tls_certificate:
        raise Refused(
            "`poolgate up` serves one machine over plain HTTP: leave tls_certificate away, or use `poolgate serve`"
        )
    if args.key is not None:
        check_given_key(args.key)
        if not is_loopback(settings.host):
            raise Refused(
                f"--key makes a key that others may guess, so it works on loopback only and not with --host "
                f"{settings.host}: leave --key away, or make keys with `poolgate key create`"
            )
    return Plan(
        settings=replace(
            settings,
            data_dir=str(Path(settings.data_dir).expanduser().absolute()),
            node_networks=with_networks(
                settings.node_networks if args.no_node else f"{settings.node_networks},{LOOPBACK}",
                engine_urls,
            ),
        ),
        config=config,
        base_url=reachable_base_url(settings.host, settings.port),
        key=args.key,
        has_node=not args.no_node,
        models=models,
        engine_urls=engine_urls,
    )


def check_port(plan: Plan) -> None:
    """Refused when nothing could listen there."""
    if reason := why_port_is_taken(plan.settings.host, plan.settings.port):
        raise Refused(f"{reason}: stop what uses it, or choose another one with --port")


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def with_networks(networks: str, engine_urls: tuple[str, ...]) -> str:
    """`networks` and those hosts of `engine_urls` that are in none: naming an engine permits reaching it."""
    known = [ipaddress.ip_network(text.strip(), strict=False) for text in networks.split(",") if text.strip()]
    for url in engine_urls:
        for address in addresses_of(urlsplit(url).hostname or ""):
            if not any(address.version == network.version and address in network for network in known):
                known.append(ipaddress.ip_network(str(address)))
    return ",".join(str(network) for network in known)


def addresses_of(host: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """None for a name that can't be resolved: an engine that is not there yet is waited for."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    return sorted({ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in found}, key=str)


def child_environment() -> dict[str, str]:
    """What our own programs get of our environment: not what only this command reads."""
    kept = OWN_VARIABLES - {"POOLGATE_DEBUG"}
    return {name: value for name, value in os.environ.items() if name not in kept}


def engine_folder() -> Path:
    """Where `make engine` builds the CPU engine's environment: inside ours."""
    return Path(sys.prefix) / "engine"
