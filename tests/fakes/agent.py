"""A node agent as a process of its own, whose engines are stand-ins: `python -m tests.fakes.agent`, its options on stdin.

It is the real agent: heartbeats, health checks, restarts. Only the command that starts an engine is another one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from bench.processes import ROOT, environment
from config.defaults import Settings
from config.logs import setup_logs
from config.procs import Child, spawn_python
from nodes.agent.main import AgentOptions, run_to_end

STOP_S = 30.0


@contextmanager
def agent_process(
    gateway: str,
    key: str,
    folder: Path,
    settings: Settings,
    *,
    model: str,
    knobs: dict[str, Any],
    flags: tuple[str, ...] = (),
    reach: str = "direct",
    advertise: str = "",
) -> Iterator[Child]:
    """An agent with one engine of `model`, which has these knobs and flags; its data folder is `folder`."""
    model_folder = folder / model
    model_folder.mkdir(parents=True, exist_ok=True)
    (model_folder / "config.json").write_text("{}")
    command = (
        sys.executable, "-m", "bench.fake_engine", "--port", "{port}", "--served-model-name", model,
        "--knobs", json.dumps(knobs), *flags,
    )  # fmt: skip
    given = {
        "gateway": gateway, "key": key, "data_dir": str(folder / "data"), "model": str(model_folder),
        "command": command, "reach": reach, "advertise": advertise,
    }  # fmt: skip
    with (folder / "agent.log").open("ab") as output:
        process = spawn_python(
            "tests.fakes.agent", env=environment(settings), cwd=ROOT,
            stdin=subprocess.PIPE, stdout=output, stderr=output,
        )  # fmt: skip
    assert process.stdin is not None
    with process.stdin as stdin:
        stdin.write(json.dumps(given).encode())
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def engine_of(agent: Child) -> psutil.Process | None:
    """The engine process that an agent runs now."""
    for process in psutil.Process(agent.pid).children(recursive=True):
        try:
            if process.cmdline()[1:3] == ["-m", "bench.fake_engine"]:
                return process
        except psutil.NoSuchProcess:
            continue
    return None


def main() -> None:
    from config.settings import load_settings

    given = json.loads(sys.stdin.buffer.read())
    settings = load_settings(environ=os.environ)
    setup_logs(settings, "agent")
    options = AgentOptions(
        gateway=given["gateway"], key=given["key"], data_dir=Path(given["data_dir"]), models=(Path(given["model"]),),
        engine_command=tuple(given["command"]), settings=settings, reach=given["reach"], advertise=given["advertise"],
    )  # fmt: skip
    sys.exit(run_to_end(options))


if __name__ == "__main__":
    main()
