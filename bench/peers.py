"""The gateways that poolgate is measured beside: their versions, how each is installed, started and told its engines.

Each is run as its makers say, with what costs it least: its simplest policy, no log of requests, no database. Measuring is
left to the questions.
"""

import importlib.metadata
import re
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from bench.bodies import MODEL
from bench.processes import ROOT, free_port

PINS: Mapping[str, str] = {
    "vllm-router": "0.1.17",
    "sglang-router": "0.3.2",
    "litellm": "1.106.0",
    # Debian's: the newest fix that its release has. It keeps nothing older, so nothing closer can be pinned.
    "nginx": "1.22",
    "nghttp2-client": "1.52",
}
"""Every version, and the only place that names them."""

PACKAGES = ("nginx-light", "nghttp2-client")
"""What Debian gives: nginx, and h2load."""

HOME = ROOT / ".bench"


class NotInstalled(RuntimeError):
    """`make bench-peers` installs it."""


class Peer(ABC):
    """One other gateway. `few` is how many of our requests it is asked, as a share: a slow one needs fewer to be timed."""

    name: ClassVar[str]
    about: ClassVar[str]
    key: ClassVar[str] = ""
    few: ClassVar[float] = 1.0
    streams_max: ClassVar[int] = 10**9
    environment: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def install(self) -> None:
        """Into `.bench/`, or by Debian's packages."""

    @abstractmethod
    def version(self) -> str:
        """The installed one. Raises NotInstalled."""

    @abstractmethod
    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        """What starts it on `port` of loopback in front of the engines' URLs; `folder` is its own."""

    def check(self) -> str:
        """The version, if it is the pinned one. Raises NotInstalled."""
        found, wanted = self.version(), PINS[self.name]
        if not (found == wanted or found.startswith(wanted + ".")):
            raise NotInstalled(f"{self.name} is {found}, not {wanted}: make bench-peers")
        return found


class PythonPeer(Peer):
    """A peer from PyPI, in a virtual environment of its own."""

    requirement: ClassVar[str]

    @property
    def venv(self) -> Path:
        return HOME / self.name

    def install(self) -> None:
        if not (self.venv / "bin" / "python").exists():
            subprocess.run([sys.executable, "-m", "venv", self.venv], check=True)
        pip = [
            str(self.venv / "bin" / "python"),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "install",
            "--quiet",
        ]
        subprocess.run([*pip, f"{self.requirement}=={PINS[self.name]}"], check=True)

    def version(self) -> str:
        code = f"import importlib.metadata as m; print(m.version({self.name!r}))"
        try:
            return _output(str(self.venv / "bin" / "python"), "-c", code).strip()
        except (OSError, subprocess.CalledProcessError):
            raise NotInstalled(f"{self.name} is not in {self.venv}: make bench-peers") from None

    def has_rust(self) -> bool:
        """Its work is done by a compiled module, and not by the Python package that once had the name."""
        return any(self.venv.glob("lib/python*/site-packages/**/*_router_rs*.so"))


class VllmRouter(PythonPeer):
    name = "vllm-router"
    about = "Rust; round robin, retries and circuit breakers as they come, no keys; log level error"
    requirement = "vllm-router"

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        return [
            str(self.venv / "bin" / "vllm-router"), "--host", "127.0.0.1", "--port", str(port), "--policy",
            "round_robin", "--log-level", "error", "--prometheus-port", str(free_port()), "--worker-urls", *engines,
        ]  # fmt: skip

    def check(self) -> str:
        return _rust(self, super().check())


class SglangRouter(PythonPeer):
    name = "sglang-router"
    about = "Rust; round robin, retries and circuit breakers as they come, no keys; log level error"
    requirement = "sglang-router"

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        return [
            str(self.venv / "bin" / "sglang-router"), "launch", "--host", "127.0.0.1", "--port", str(port), "--policy",
            "round_robin", "--log-level", "error", "--prometheus-port", str(free_port()), "--worker-urls", *engines,
        ]  # fmt: skip

    def check(self) -> str:
        return _rust(self, super().check())


class LiteLlm(PythonPeer):
    name = "litellm"
    about = "Python; one master key, no database, one worker, its own choice among the engines"
    requirement = "litellm[proxy]"
    key = "sk-master-of-the-bench"
    few = 0.03
    streams_max = 0
    environment: ClassVar[Mapping[str, str]] = {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",  # prices from the package: nothing is fetched at the start
        "LITELLM_LOG": "ERROR",
    }

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        config = folder / "litellm.yaml"
        deployments = "\n".join(
            f"  - model_name: {MODEL}\n"
            f"    litellm_params: {{model: openai/{MODEL}, api_base: {engine}/v1, api_key: none}}"
            for engine in engines
        )
        config.write_text(f"model_list:\n{deployments}\ngeneral_settings: {{master_key: {self.key}}}\n")
        return [
            str(self.venv / "bin" / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port),
            "--telemetry", "False",
        ]  # fmt: skip


class Nginx(Peer):
    """The floor: it parses no JSON and knows no tokens."""

    name = "nginx"
    about = "C; one worker, round robin over kept connections, no buffering of answers, no access log"

    def install(self) -> None:
        """Where the system runs services, Debian starts its own nginx too, which may be stopped."""
        subprocess.run(["apt-get", "update", "-qq"], check=True)
        install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *PACKAGES]
        subprocess.run(install, check=True, stdout=subprocess.DEVNULL)

    def version(self) -> str:
        h2load_version()
        return tool_version("nginx", "-v")

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        config = folder / "nginx.conf"
        servers = "".join(f"server {engine.removeprefix('http://')}; " for engine in engines)
        config.write_text(NGINX.format(folder=folder, port=port, servers=servers))
        return ["nginx", "-p", str(folder), "-c", str(config)]


class Bare(Peer):
    """The floor in Python: it does not even parse HTTP."""

    name = "bare uvloop"
    about = (
        "Python; bytes to and from an engine's connection, no HTTP, on poolgate's event loop (bench/bare.py)"
    )
    environment: ClassVar[Mapping[str, str]] = {"PYTHONPATH": str(ROOT)}

    def install(self) -> None:
        """uvloop is poolgate's."""

    def version(self) -> str:
        return importlib.metadata.version("uvloop")

    def check(self) -> str:
        return self.version()

    def command(self, port: int, engines: Sequence[str], folder: Path) -> list[str]:
        return [sys.executable, "-m", "bench.bare", str(port), *engines]


NGINX = """\
daemon off; worker_processes 1; worker_rlimit_nofile 20000; pid {folder}/nginx.pid; error_log {folder}/nginx.log;
events {{ worker_connections 20000; }}
http {{
  access_log off; keepalive_requests 1000000000; client_max_body_size 10m; client_body_buffer_size 128k;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream engines {{ {servers} keepalive 256; keepalive_requests 1000000000; keepalive_timeout 4s; }}
  server {{
    listen 127.0.0.1:{port} backlog=4096;
    location / {{
      proxy_pass http://engines; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
      proxy_read_timeout 300s;
    }}
  }}
}}
"""

PEERS: tuple[Peer, ...] = (VllmRouter(), SglangRouter(), Nginx(), Bare(), LiteLlm())


def tool_version(program: str, flag: str) -> str:
    """The first version number that a program says of itself. Raises NotInstalled."""
    path = shutil.which(program)
    if path is None:
        raise NotInstalled(f"{program} is not installed: make bench-peers")
    found = re.search(r"\d+(\.\d+)+", _output(path, flag))
    return found[0] if found else "unknown"


def h2load_version() -> str:
    """The installed one. Raises NotInstalled."""
    return tool_version("h2load", "--version")


def versions() -> dict[str, str]:
    """What is installed of the peers, by name; those that are not, or are others, are left out."""
    found = {}
    for peer in PEERS:
        try:
            found[peer.name] = peer.check()
        except NotInstalled:
            continue
    return found


def _output(*command: str) -> str:
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return done.stdout + done.stderr  # nginx says its version on standard error


def _rust(peer: PythonPeer, version: str) -> str:
    if not peer.has_rust():
        raise NotInstalled(f"{peer.name} {version} has no compiled router in it")
    return version


def main() -> int:
    """Install all of them (`make bench-peers`)."""
    for peer in PEERS:
        print(f"{peer.name}: {peer.about}", flush=True)
        try:
            found = peer.check()
        except NotInstalled:
            peer.install()
            found = peer.check()
        print(f"  {found} is there", flush=True)
    print(f"h2load {h2load_version()} is there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
